"""What a run tells a person, as text made from its history. Prints nothing."""

import textwrap
from collections.abc import Sequence

from experiments.history import Check, CompressedRecord, DataRecord, EpochRecord, FinalCounts, History
from experiments.settings import Settings
from metrics import NetworkCount, format_ratio, ratio

MUCH_LEFT_OUT = 0.1  # share of the MACs; the stem and the classifier are 1.1 %
COLOURS = {"PASS": "32", "FAIL": "1;31", "SKIP": "33"}  # green, bold red, yellow

PICTURES = ("accuracy_curve.png", "sparsity_curves.png", "channel_liveness.png", "per_layer_channels.png",
            "channels_over_time.png")  # fmt: skip


def first_lines(history: History, settings: Settings, notes: Sequence[str] = ()) -> str:
    """What runs, on what and with which data; `notes` say what else is out of the ordinary."""
    data, auto_cpu = history.data, settings.device == "auto" and history.device.startswith("cpu")
    layers = len(history.quantized) + len(history.full_precision)
    stand_in = f"*** NOT CIFAR-10: this run uses the {data.name}. {data.source} ***"
    return "\n".join([
        *([stand_in] if data.synthetic else []),
        f"Versions:  {', '.join(f'{k} {v}' for k, v in history.versions.items())}",
        f"Device:    {history.device}, {history.precision}"
        + (" (auto: no CUDA or MPS here)" if auto_cpu else ""),
        f"Preset:    {settings.described()}",
        f"Training:  {settings.epochs} epochs of batches of {settings.batch_size}, seed {settings.seed}",
        f"Data:      {data.name}: {data.train_images:,} training and {data.test_images:,} test images "
        f"({data.source})",
        f"Quantized: {len(history.quantized)} of {layers} layers; not: "
        f"{', '.join(history.full_precision) or 'none'}",
        *([f"Quantizer: {settings.quantizer}"] if settings.quantizer != Settings.quantizer else []),
        *([f"Packed:    as float32 in {len(history.without_codes)} quantized layers, since their quantizer "
           f"gives no codes"] if history.without_codes else []),
        *notes,
    ])  # fmt: skip


def check_lines(check: Check, colour: bool = False, width: int = 80) -> list[str]:
    """A check as lines of text, broken between words alone: a PASS in one line, shortened, all else whole.

    The cause of a FAIL stands on a line of its own. Colours are a terminal's.
    """
    measured, _, cause = check.message.partition(". Likely cause: ")
    first = f"{check.status}  {check.name}: {measured}"
    if check.status == "PASS":
        lines = [first if len(first) <= width else first[: width - 3].rpartition(" ")[0] + " ..."]
    else:
        lines = _wrapped(first, width) + (_wrapped(f"      Likely cause: {cause}", width) if cause else [])
    if colour:
        lines[0] = f"\x1b[{COLOURS[check.status]}m{check.status}\x1b[0m{lines[0][len(check.status) :]}"
    return lines


def _wrapped(line: str, width: int) -> list[str]:
    return textwrap.wrap(
        line, width, subsequent_indent="      ", break_long_words=False, break_on_hyphens=False
    )


def preflight_lines(checks: Sequence[Check], seconds: float, whole: bool = False) -> str:
    """What the preflight found: a line where all holds, else what fails; with `whole` a line a check."""
    failed, skipped = ([c for c in checks if c.status == status] for status in ("FAIL", "SKIP"))
    lines = [line for c in checks if whole or c.status == "FAIL" for line in check_lines(c)]
    left_out = f" (skipped: {', '.join(c.name for c in skipped)})" if skipped else ""
    if failed:
        lines.append(f"Preflight: {len(failed)} of {len(checks)} checks FAIL, {seconds:.0f} s{left_out}")
    else:
        lines.append(f"Preflight: {len(checks) - len(skipped)} checks hold, {seconds:.0f} s{left_out}")
    return "\n".join(lines)


def left_out_lines(dense: NetworkCount, full_precision: Sequence[str]) -> list[str]:
    """A warning where --exclude-layers leaves so much in full precision that little can be gained."""
    left = sum(layer.dense_macs for layer in dense.layers if layer.name in full_precision)
    share = left / dense.total("dense_macs")
    if len(full_precision) == len(dense.layers) or share < MUCH_LEFT_OUT:
        return []
    return [
        f"Warning:   --exclude-layers leaves {100 * share:.1f} % of the MACs in full precision "
        f"({len(full_precision)} layers): no more than {format_ratio(1 / share)} fewer are possible"
    ]


def table_header(data: DataRecord) -> str:
    """The head of the table; it names the stand-in where the images are not CIFAR-10's."""
    mark = f"  [{data.name}]" if data.synthetic else ""
    return (
        "\nEpoch |     Loss |    Acc |  Unstr | Struct |  Bits |   Time" + mark + "\n"
        "      | CE + pen |      % |      % |      % |  mean |      s\n"
        "------+----------+--------+--------+--------+-------+-------"
    )


def table_row(record: EpochRecord) -> str:
    """One epoch's row of the table."""
    return (
        f"{record.epoch:5d} | {record.loss:8.4f} | {100 * record.accuracy:6.2f} | "
        f"{100 * record.unstructured_sparsity:6.2f} | {100 * record.structured_sparsity:6.2f} | "
        f"{record.learned_bits:5.2f} | {record.seconds:6.1f}"
    )


def metrics_lines(final: FinalCounts) -> str:
    """The compression ratios, and the ceiling that the layers in full precision set to them."""
    quantized = len(final.count.quantized)
    return "\n".join([
        "",
        "--- Final Compression Metrics ---",
        f"Structured BOPs compression:   {format_ratio(final.structured_bops_ratio)}",
        f"Unstructured BOPs compression: {format_ratio(final.unstructured_bops_ratio)}",
        f"Structured MACs compression:   {format_ratio(final.structured_mac_ratio)}",
        f"Unstructured MACs compression: {format_ratio(final.unstructured_mac_ratio)}",
        f"Ceiling: {format_ratio(final.structured_ceiling)} structured, "
        f"{format_ratio(final.unstructured_ceiling)} unstructured, if the {quantized} quantized layers "
        f"cost nothing (of {final.totals['dense_macs']:,} MACs)",
    ])  # fmt: skip


def compressed_lines(found: CompressedRecord) -> str:
    """The smaller network and the packed file against the quantized network."""
    smaller = format_ratio(ratio(found.dense_macs, found.slim_macs))
    rows = [
        f"  {name:<26} {1e3 * t['median']:8.2f} ms ({1e3 * t['least']:.2f} to {1e3 * t['most']:.2f})"
        for name, t in found.latency_seconds.items()
    ]
    return "\n".join([
        "",
        "--- The Compressed Network ---",
        f"Smaller network: {found.slim_parameters:,} of {found.dense_parameters:,} parameters, "
        f"{found.slim_macs:,} of {found.dense_macs:,} MACs ({smaller}), counted on the network itself",
        f"  against the quantized network on {found.images:,} test images: largest difference "
        f"{found.largest_difference:.2g} of logits up to {found.largest_logit:.3g}, "
        f"{100 * found.agreement:.2f} % equal predictions",
        f"  accuracy {100 * found.slim_accuracy:.2f} % against {100 * found.quantized_accuracy:.2f} %",
        f"Packed file: {found.packed_bytes:,} bytes, {found.float32_bytes / found.packed_bytes:.1f} times "
        f"smaller than the float32 state_dict's {found.float32_bytes:,}",
        f"  read back: {found.packed_differs} logits differ, accuracy {100 * found.packed_accuracy:.2f} %",
        "Latency, median (spread):",
        *rows,
        "  Zero weights and low bits give no speed-up in this runtime; only channels that are gone do.",
    ])  # fmt: skip


def verdict_lines(checks: Sequence[Check], colour: bool = False) -> str:
    """The verdict for a terminal of 80 columns; history.json has every message whole."""
    return "\n".join(
        ["", "--- Verdict ---", *(line for check in checks for line in check_lines(check, colour))]
    )


def picture_title(history: History, settings: Settings) -> str:
    """What every picture's title says: network, data set, settings, epoch."""
    data = history.data
    name = f"{data.name.upper()}, NOT CIFAR-10" if data.synthetic else data.name
    depth = len(history.quantized) + len(history.full_precision)
    return f"ResNet-{depth} on {name}, preset {settings.described()}, epoch {history.epochs[-1].epoch}"


def layer_table(count: NetworkCount) -> str:
    """The counts of each layer, a row a layer, and the totals below."""
    header = (
        f"{'Layer':<16} {'Bits':>4} {'Zero weights':>15} {'Zero filters':>12} "
        f"{'Alive/Const/Null':>16} {'Dense MACs':>12} {'Struct MACs':>12} {'Unstr MACs':>12}"
    )
    rows = [
        f"{x.name:<16} {x.bits:>4} {x.zero_weights:>7}/{x.weights:<7} {x.zero_filters:>7}/{x.filters:<4} "
        f"{f'{x.alive_channels}/{x.constant_channels}/{x.null_channels}':>16} "
        f"{x.dense_macs:>12,} {x.structured_macs:>12,} {x.unstructured_macs:>12,}"
        for x in count.layers
    ]
    total = count.total
    rows.append(
        f"{'Total':<16} {'':>4} {total('zero_weights'):>7}/{total('weights'):<7} "
        f"{total('zero_filters'):>7}/{total('filters'):<4} "
        f"{'/'.join(str(total(f'{s}_channels')) for s in ('alive', 'constant', 'null')):>16} "
        f"{total('dense_macs'):>12,} {total('structured_macs'):>12,} {total('unstructured_macs'):>12,}"
    )
    return "\n".join([header, *rows])
