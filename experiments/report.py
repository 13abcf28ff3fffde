"""What a run tells a person, as text made from its history. Prints nothing."""

import csv
import io
import textwrap
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from experiments.history import (
    FAIL,
    PASS,
    SKIP,
    Check,
    CompressedRecord,
    DataRecord,
    EpochRecord,
    FinalCounts,
    History,
    short_commit,
)
from experiments.network import network_name
from experiments.settings import Settings
from metrics import LayerCount, NetworkCount, format_ratio, ratio

MUCH_LEFT_OUT = 0.1  # share of the MACs; the stem and the classifier are 1.1 %
COLUMNS = 80  # of a line
COLOURS = {"PASS": "32", "FAIL": "1;31", "SKIP": "33"}  # green, bold red, yellow

CSV, PAGE = "metrics.csv", "report.html"
PICTURES = ("accuracy_curve.png", "sparsity_curves.png", "channel_liveness.png", "per_layer_channels.png",
            "channels_over_time.png")  # fmt: skip


def first_lines(history: History, settings: Settings, dense: NetworkCount) -> str:
    """What runs, on what and with which data, and what else is out of the ordinary."""
    data, auto_cpu = history.data, settings.device == "auto" and history.device.startswith("cpu")
    layers = len(history.quantized) + len(history.full_precision)
    stand_in = f"*** NOT CIFAR-10: this run uses the {data.name} ***"
    lines = [
        *([stand_in] if data.synthetic else []),
        f"Versions:  {', '.join(f'{k} {v}' for k, v in history.versions.items())}",
        f"Device:    {history.device}, {history.precision}"
        + (" (auto: no CUDA or MPS here)" if auto_cpu else ""),
        f"Preset:    {settings.described()}",
        *([f"Network:   {settings.model}"] if settings.model != Settings.model else []),
        f"Training:  {settings.epochs} epochs of batches of {settings.batch_size}, seed {settings.seed}",
        f"Data:      {data.name}: {data.train_images:,} training and {data.test_images:,} test images "
        f"({data.source})",
        f"Quantized: {len(history.quantized)} of {layers} layers; not: "
        f"{', '.join(history.full_precision) or 'none'}",
        *([f"Quantizer: {settings.quantizer}"] if settings.quantizer != Settings.quantizer else []),
        *([f"Packed:    as float32 in {len(history.without_codes)} quantized layers, since their quantizer "
           f"gives no codes"] if history.without_codes else []),
        *([f"Frozen:    {len(history.frozen)} parameters are not trained: {', '.join(history.frozen)}"]
          if history.frozen else []),
        *([f"Layout:    {history.layout}, because the network raises an error for channels_last"]
          if history.layout == "contiguous" and not history.device.startswith("mps") else []),
        *(["Graphs:    none, because the forward pass needs the host: kernels are launched one by one"]
          if history.needs_host else []),
        *(["Branches:  the network may leave layers out of a training step, which the checks allow, since it "
           "decides by numbers on the host"] if history.may_skip else []),
        *(["Warning:   this device has no instructions for bf16: it takes many times as long here as float32"]
          if history.emulates_bf16 else []),
        *([f"Barriers:  no channel is followed through {', '.join(history.barriers)}"]
          if history.barriers else []),
        *("; ".join([f"Resumed:   after epoch {r.after_epoch}", *r.differences]) for r in history.resumed),
        *_left_out(dense, history.full_precision),
    ]  # fmt: skip
    return "\n".join(line for each in lines for line in _wrapped(each, 11))


def check_lines(check: Check, colour: bool = False) -> list[str]:
    """A check as lines of text, broken between words alone: a PASS in one line, shortened, all else whole.

    The cause of a FAIL stands on a line of its own. Colours are a terminal's.
    """
    first = f"{check.status}  {check.name}: {check.measured}"
    if check.status == "PASS":
        lines = [first if len(first) <= COLUMNS else first[: COLUMNS - 3].rpartition(" ")[0] + " ..."]
    else:
        lines = _wrapped(first) + (_wrapped(f"      Likely cause: {check.cause}") if check.cause else [])
    if colour:
        lines[0] = f"\x1b[{COLOURS[check.status]}m{check.status}\x1b[0m{lines[0][len(check.status) :]}"
    return lines


def _wrapped(line: str, indent: int = 6) -> list[str]:
    """The line as several, broken between words alone."""
    return textwrap.wrap(
        line, COLUMNS, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )


def _left_out(dense: NetworkCount, full_precision: Sequence[str]) -> list[str]:
    """A warning where --exclude-layers leaves so much in full precision that little can be gained."""
    left = sum(layer.dense_macs for layer in dense.layers if layer.name in full_precision)
    share = left / dense.total("dense_macs")
    if len(full_precision) == len(dense.layers) or share < MUCH_LEFT_OUT:
        return []
    return [
        f"Warning:   --exclude-layers leaves {100 * share:.1f} % of the MACs in full precision "
        f"({len(full_precision)} layers): no more than {format_ratio(1 / share)} fewer are possible"
    ]


def preflight_line(checks: Sequence[Check], seconds: float) -> str:
    """How many checks of the preflight hold or fail, and which were skipped."""
    failed, skipped = ([c for c in checks if c.status == status] for status in ("FAIL", "SKIP"))
    left_out = f" (skipped: {', '.join(c.name for c in skipped)})" if skipped else ""
    said = (
        f"{len(failed)} of {len(checks)} checks FAIL"
        if failed
        else f"{len(checks) - len(skipped)} checks hold"
    )
    return "\n".join(_wrapped(f"Preflight: {said}, {seconds:.0f} s{left_out}", 11))


def table_header(data: DataRecord) -> str:
    """The head of the table; it names the stand-in where the images are not CIFAR-10's."""
    mark = f"[{data.name}]\n" if data.synthetic else ""
    return (
        f"\n{mark}Epoch |     Loss |    Acc |  Unstr | Struct |  Bits |   Time\n"
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
        *_wrapped(
            f"Ceiling: {format_ratio(final.structured_ceiling)} structured, "
            f"{format_ratio(final.unstructured_ceiling)} unstructured, if the {quantized} quantized layers "
            f"cost nothing (of {final.totals['dense_macs']:,} MACs)",
            9,
        ),
        "",
        layer_table(final.count),
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
        f"Smaller network: {found.slim_parameters:,} of {found.dense_parameters:,} parameters,",
        f"  {found.slim_macs:,} of {found.dense_macs:,} MACs ({smaller}), counted on the network itself",
        f"  against the quantized network on {found.images:,} test images:",
        f"  largest difference {found.largest_difference:.2g} of logits up to {found.largest_logit:.3g}, "
        f"{100 * found.agreement:.2f} % equal predictions,",
        f"  accuracy {100 * found.slim_accuracy:.2f} % against {100 * found.quantized_accuracy:.2f} %",
        f"Packed file: {found.packed_bytes:,} bytes,",
        f"  {found.float32_bytes / found.packed_bytes:.1f} times smaller than the float32 state_dict's "
        f"{found.float32_bytes:,}",
        f"  read back: {found.packed_differs} logits differ, accuracy {100 * found.packed_accuracy:.2f} %",
        "Latency, median (spread):",
        *rows,
        "  Zero weights and low bits give no speed-up in this runtime; channels that",
        "  are gone do where they save more than it costs to select the others.",
    ])  # fmt: skip


def verdict_lines(checks: Sequence[Check], colour: bool = False) -> str:
    """The verdict for a terminal of 80 columns; history.json has every message whole."""
    return "\n".join(
        ["", "--- Verdict ---", *(line for check in checks for line in check_lines(check, colour))]
    )


def file_lines(paths: Sequence[Path]) -> str:
    """The files that a run leaves in its folder: the pictures, the history, the compressed network."""
    names = ", ".join(path.name for path in paths)
    lines = textwrap.wrap(names, COLUMNS - 2, initial_indent="  ", subsequent_indent="  ")
    return "\n".join([f"\nFiles in {paths[0].parent}:", *lines]) if paths else ""


def picture_title(history: History, settings: Settings) -> str:
    """What every picture's title says: network, data set, settings, epoch."""
    data = history.data
    name = f"{data.name.upper()}, NOT CIFAR-10" if data.synthetic else data.name
    network, preset = network_name(settings.model), settings.described(but=("model",))
    return f"{network} on {name}, preset {preset}, epoch {history.epochs[-1].epoch}"


def layer_table(count: NetworkCount) -> str:
    """The counts of each layer, a row a layer of at most 80 columns, and the totals below.

    Channels are those alive, those that leave a constant, and those that leave nothing.
    """
    longest = max(len(layer.name) for layer in count.layers)
    width = min(max(longest, 5), 20)
    heads = (
        (f"{'Layer':<{width}}", "Bits", "Zeros", "Filters", "Channels", "MACs left", "of"),
        (" " * width, "", "%", "zero/all", "alive/c/null", "structured", "dense"),
    )
    header = "\n".join("{} {:>4} {:>6} {:>9} {:>13} {:>11} {:>11}".format(*words) for words in heads)
    rows = [_layer_row(_shortened(x.name, width), width, str(x.bits), x) for x in count.layers]
    return "\n".join([header, *rows, _layer_row("Total", width, "", count)])


def _layer_row(name: str, width: int, bits: str, counts: LayerCount | NetworkCount) -> str:
    of = counts.total if isinstance(counts, NetworkCount) else lambda name: getattr(counts, name)
    filters = f"{of('zero_filters')}/{of('filters')}"
    states = "/".join(str(of(f"{state}_channels")) for state in ("alive", "constant", "null"))
    return (
        f"{name:<{width}} {bits:>4} {100 * of('zero_weights') / of('weights'):6.2f} {filters:>9} "
        f"{states:>13} {of('structured_macs'):>11,} {of('dense_macs'):>11,}"
    )


def _shortened(name: str, width: int) -> str:
    """The end of a name says more than its beginning."""
    return name if len(name) <= width else ".." + name[2 - width :]


def metrics_csv(history: History) -> str:
    """The table's numbers and more, a row an epoch, for other programs: shares are of 1."""
    columns = [f.name for f in fields(EpochRecord) if f.type in (int, float)]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    table.writerows([getattr(record, name) for name in columns] for record in history.epochs)
    return text.getvalue()


def failed_lines(checks: Sequence[Check], colour: bool = False) -> list[str]:
    """What fails, said once more at the end, where it is seen."""
    return [line for c in checks if c.status == FAIL for line in check_lines(c, colour)]


def run_line(history: History, settings: Settings, checks: Sequence[Check]) -> str:
    """The run in one line, to be pasted elsewhere."""
    counted = [c for c in checks if c.status != SKIP]
    held = sum(c.status == PASS for c in counted)
    final, last = history.final, history.epochs[-1]
    packed = f"{history.compressed.packed_bytes:,} bytes" if history.compressed else "not packed"
    assert final
    code = short_commit(history.origin.commit)
    before = sum(c.status == FAIL for c in history.preflight)
    return (
        f"{picture_title(history, settings)}, seed {settings.seed}, {code}: "
        f"{100 * last.accuracy:.2f} % accuracy, {100 * last.unstructured_sparsity:.1f} % zeros, "
        f"{100 * last.structured_sparsity:.1f} % zero filters, {last.learned_bits:.2f} learned bits, BOPs "
        f"{format_ratio(final.structured_bops_ratio)} / {format_ratio(final.unstructured_bops_ratio)}, "
        f"{packed}, {held} of {len(counted)} checks"
        + (f", and {before} of the preflight FAIL" if before else "")
    )
