"""Train a quantized ResNet-20 for a few epochs and show that the whole CoDeQ pipeline works.

    python -m experiments.debug_run
    python -m experiments.debug_run --preset plan --output-dir debug_output_plan
    python -m experiments.debug_run --help

Prints a table row an epoch, the compression ratios and a verdict; writes four pictures and history.json.
Exit status: 0, or 1 when a line of the verdict fails or the loss stops being finite, 2 for bad input,
130 after Ctrl-C (the finished epochs' files are written first).
"""

import platform
import shutil
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.checks import FAIL, early_warnings, verdict
from experiments.data import DataError, Dataset, TestBatches, TrainBatches, load_dataset
from experiments.device import describe_device, prepare_device
from experiments.evaluator import Compression, Evaluator
from experiments.files import OutputError, prepare_folder, write_json
from experiments.proofs import PACKED, SLIM, proof_lines, prove
from experiments.schedules import cosine_anneal, linear_warmup
from experiments.settings import PRECISIONS, Settings, parse_settings
from experiments.sparsity import coupled_group_lasso, keep_dead_slices
from experiments.training import (
    NotFiniteError,
    TrainingStep,
    make_optimizer,
    measure_accuracy,
    renew_batch_norms,
    set_learning_rates,
    train_epoch,
)
from metrics import TOTALS, format_ratio
from resnet import resnet20
from src.quantizer import DeadZoneLDZCompander
from utils_quantization import attach_weight_quantizers, quantizers

PICTURES = ("accuracy_curve.png", "sparsity_curves.png", "channel_liveness.png", "per_layer_channels.png",
            "channels_over_time.png")  # fmt: skip
EXIT_OK, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130

Record = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    settings = parse_settings(arguments)
    live = LiveLine()
    try:
        return run(settings, live)
    except KeyboardInterrupt:
        live.say("stopped by Ctrl-C before the first epoch or after the last")
        return EXIT_INTERRUPTED
    except (ValueError, DataError, OutputError) as error:
        live.clear()
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def run(settings: Settings, live: "LiveLine") -> int:
    """The whole run: data, model, quantizers, optimizer, loop, report. Returns the exit status."""
    device = prepare_device(settings)
    torch.manual_seed(settings.seed)
    model = resnet20().to(device)
    evaluator = Evaluator(model)
    quantized = attach_weight_quantizers(model, settings.exclude_layers, DeadZoneLDZCompander, {})
    if device.type != "mps":  # where channels_last has given wrong batch-norm gradients
        model.to(memory_format=torch.channels_last)
    prepare_folder(settings.output_dir)
    dataset = load_dataset(
        settings.data, settings.data_dir, settings.limit_train, settings.limit_test, live.say, live.progress
    )
    train_batches = TrainBatches(dataset, settings.batch_size, settings.seed, device)
    test_batches = TestBatches(dataset, device)
    penalty = coupled_group_lasso(model)
    optimizer = make_optimizer(model, settings, settings.epochs * len(train_batches))
    keep_dead = keep_dead_slices(model) if settings.keep_dead == "yes" else None
    step = TrainingStep(model, optimizer, penalty, settings.precision, keep_dead)
    learning_rate = cosine_anneal(0)
    sparsity = linear_warmup(settings.sparsity_delay, settings.sparsity_ramp)
    head = describe_run(settings, dataset, device, model, quantized)
    live.say("\n".join(head["lines"]))
    live.say(table_header(dataset))

    start = logits(model)
    records: list[Record] = []
    compression = evaluator.evaluate(model)
    stopped: str | None = None
    not_finite: str | None = None
    status, warned = EXIT_OK, set[str]()
    try:
        for epoch in range(settings.epochs):
            began = time.perf_counter()
            set_learning_rates(optimizer, learning_rate(epoch, settings.epochs))
            weight = settings.sparsity_weight * sparsity(epoch, settings.epochs)
            losses = train_epoch(step, train_batches, epoch, weight, live.steps(epoch))
            if settings.batch_norm_batches:
                renew_batch_norms(
                    model, train_batches, epoch, settings.batch_norm_batches, settings.precision
                )
            accuracy = measure_accuracy(model, test_batches, settings.precision)
            with torch.no_grad():
                penalty_now = penalty(model).item()
            compression = evaluator.evaluate(model)
            records.append({
                "epoch": epoch + 1,
                "loss": losses.loss,
                "cross_entropy": losses.cross_entropy,
                "penalty": penalty_now,
                "sparsity_weight": weight,
                "accuracy": accuracy,
                **sparsities(compression),
                "layers": recorded_layers(model, compression, start),
                "seconds": time.perf_counter() - began,
            })  # fmt: skip
            live.say(table_row(records[-1]))
            for about, sentence in early_warnings(records):
                if about not in warned:
                    live.say(f"      ! {sentence}")
                    warned.add(about)
    except KeyboardInterrupt:
        stopped, status = f"stopped by Ctrl-C in epoch {len(records) + 1}", EXIT_INTERRUPTED
    except NotFiniteError as error:
        stopped = not_finite = f"stopped in epoch {len(records) + 1}: {error}"
        status = EXIT_FAILED
    if stopped:
        live.say(stopped)
    verdict_status = report(
        settings, head, records, compression, model, dataset, test_batches, stopped, not_finite, live
    )
    return status or verdict_status


def describe_run(
    settings: Settings, dataset: Dataset, device: torch.device, model: nn.Module, quantized: list[str]
) -> dict[str, Any]:
    """The run's first lines, and the same as data for history.json."""
    packages = ("torch", "torchvision", "numpy", "matplotlib")
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    candidates = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    full = [n for n in candidates if n not in quantized]
    data = (
        f"{dataset.name}: {len(dataset.train_labels):,} training and {len(dataset.test_labels):,} test images"
    )
    lines = [
        f"Versions:  {', '.join(f'{k} {v}' for k, v in versions.items())}",
        f"Device:    {describe_device(device)}, {PRECISIONS[settings.precision]}"
        + (" (auto: no CUDA or MPS here)" if settings.device == "auto" and device.type == "cpu" else ""),
        f"Preset:    {settings.preset}, {settings.epochs} epochs of batches of {settings.batch_size}, "
        f"seed {settings.seed}",
        f"Data:      {data} ({dataset.source})",
        f"Quantized: {len(quantized)} of {len(candidates)} layers; not: {', '.join(full) or 'none'}",
    ]
    if dataset.synthetic:
        lines.insert(0, f"*** NOT CIFAR-10: this run uses the {dataset.name}. {dataset.source} ***")
    return {
        "lines": lines,
        "versions": versions,
        "device": describe_device(device),
        "precision": PRECISIONS[settings.precision],
        "threads": torch.get_num_threads(),
        "data": {"name": dataset.name, "source": dataset.source, "synthetic": dataset.synthetic,
                 "train_images": len(dataset.train_labels), "test_images": len(dataset.test_labels)},
        "quantized": quantized,
        "full_precision": full,
    }  # fmt: skip


def table_header(dataset: Dataset) -> str:
    mark = f"  [{dataset.name}]" if dataset.synthetic else ""
    return (
        "\nEpoch |     Loss |    Acc |  Unstr | Struct |  Bits |   Time" + mark + "\n"
        "      | CE + pen |      % |      % |      % |  mean |      s\n"
        "------+----------+--------+--------+--------+-------+-------"
    )


def table_row(record: Record) -> str:
    return (
        f"{record['epoch']:5d} | {record['loss']:8.4f} | {100 * record['accuracy']:6.2f} | "
        f"{100 * record['unstructured_sparsity']:6.2f} | {100 * record['structured_sparsity']:6.2f} | "
        f"{record['learned_bits']:5.2f} | {record['seconds']:6.1f}"
    )


def sparsities(compression: Compression) -> Record:
    count = compression.count
    return {
        "unstructured_sparsity": count.unstructured_sparsity,
        "structured_sparsity": count.structured_sparsity,
        "learned_bits": count.mean_learned_bits,
        "bits": count.mean_bits,
    }


def logits(model: nn.Module) -> dict[str, dict[str, float]]:
    """Each quantized layer's two logits and its learned bits, by layer name."""
    return {
        name: {
            "bit_logit": q.logit_bit.item(),
            "deadzone_logit": q.logit_dz.item(),
            "learned_bits": q.get_learned_bitwidth().item(),
        }
        for name, q in quantizers(model).items()
    }


def recorded_layers(model: nn.Module, compression: Compression, start: dict[str, dict[str, float]]) -> Record:
    """What history.json keeps of each quantized layer at each epoch; gradients are the last step's."""
    counts = {layer.name: layer for layer in compression.count.layers}
    now, found = logits(model), quantizers(model)
    return {
        name: {
            **now[name],
            **{f"{key}_start": value for key, value in start[name].items()},
            "bit_gradient": _gradient(found[name].logit_bit),
            "deadzone_gradient": _gradient(found[name].logit_dz),
            **{key: getattr(counts[name], key) for key in LAYER_COUNTS},
        }
        for name in found
    }


LAYER_COUNTS = ("bits", "weights", "zero_weights", "filters", "zero_filters",
                "alive_channels", "constant_channels", "null_channels")  # fmt: skip


def _gradient(parameter: nn.Parameter) -> float | None:
    return None if parameter.grad is None else parameter.grad.item()


def report(
    settings: Settings,
    head: dict[str, Any],
    records: list[Record],
    compression: Compression,
    model: nn.Module,
    dataset: Dataset,
    test_batches: TestBatches,
    stopped: str | None,
    not_finite: str | None,
    live: "LiveLine",
) -> int:
    """The pictures, the final metrics, the verdict and history.json; the exit status that they call for."""
    history = {k: v for k, v in head.items() if k != "lines"} | {
        "settings": settings.to_json(), "stopped": stopped, "epochs": records}  # fmt: skip
    path = settings.output_dir / "history.json"
    if not records:
        live.say("no epoch was finished, so there is nothing to draw")
        write_json(path, history)
        return EXIT_OK
    pictures = draw(settings, records, compression, dataset)
    live.progress("making the smaller network and the packed file")
    # A run that was stopped in an epoch has weights that no row of its table describes.
    proof = None if stopped else prove(
        model, compression.count, test_batches, settings.output_dir, settings.to_json()
    )  # fmt: skip
    checks = verdict(records, settings, compression.count, model, pictures, not_finite, proof)
    live.say(metrics_lines(compression))
    if proof:
        live.say(proof_lines(proof))
    live.say("\n".join(["", "--- Verdict ---", *map(str, checks)]))
    write_json(
        path,
        history
        | {
            "final": final_metrics(compression),
            "proof": proof and proof.to_json(),
            "verdict": [asdict(c) for c in checks],
        },
    )
    made = [settings.output_dir / name for name in (PACKED, SLIM)] if proof else []
    live.say("\nFiles: " + ", ".join(str(p) for p in (*pictures, path, *made)))
    return EXIT_FAILED if any(check.status == FAIL for check in checks) else EXIT_OK


def draw(settings: Settings, records: list[Record], compression: Compression, dataset: Dataset) -> list[Path]:
    """The four pictures, from the records and counts alone; returns their paths."""
    from experiments import plots  # matplotlib costs a second: not before the first training step

    name = f"{dataset.name.upper()}, NOT CIFAR-10" if dataset.synthetic else dataset.name
    what = f"ResNet-20 on {name}, preset {settings.preset}, epoch {records[-1]['epoch']}"
    warmup = (settings.sparsity_delay, settings.sparsity_ramp)
    figures = (
        plots.accuracy_figure(records, f"Accuracy: {what}", warmup),
        plots.sparsity_figure(records, f"Sparsity and bits: {what}", warmup),
        plots.channel_liveness_figure(compression.count, f"Channels: {what}"),
        plots.per_layer_figure(compression.count, f"Channels and bits a layer: {what}"),
        plots.channels_over_time_figure(records, f"Channels alive: {what}", warmup),
    )
    paths = [settings.output_dir / picture for picture in PICTURES]
    for figure, path in zip(figures, paths, strict=True):
        plots.save_figure(figure, path)
    return paths


def metrics_lines(compression: Compression) -> str:
    kept = compression.count.quantized
    return "\n".join([
        "",
        "--- Final Compression Metrics ---",
        f"Structured BOPs compression:   {format_ratio(compression.structured_bops_ratio)}",
        f"Unstructured BOPs compression: {format_ratio(compression.unstructured_bops_ratio)}",
        f"Structured MACs compression:   {format_ratio(compression.structured_mac_ratio)}",
        f"Unstructured MACs compression: {format_ratio(compression.unstructured_mac_ratio)}",
        f"Ceiling: {format_ratio(compression.structured_ceiling)} structured, "
        f"{format_ratio(compression.unstructured_ceiling)} unstructured, if the {len(kept)} quantized layers "
        f"cost nothing (of {compression.dense_macs:,} MACs)",
    ])  # fmt: skip


RATIOS = ("structured_bops_ratio", "unstructured_bops_ratio", "structured_mac_ratio",
          "unstructured_mac_ratio", "structured_ceiling", "unstructured_ceiling")  # fmt: skip


def final_metrics(compression: Compression) -> Record:
    """The final counts for history.json: the ratios, the totals, a record a layer."""
    return {
        **{key: getattr(compression, key) for key in RATIOS},
        **sparsities(compression),
        "totals": {key: compression.count.total(key) for key in TOTALS},
        "layers": [asdict(layer) for layer in compression.count.layers],
    }


class LiveLine:
    """Whole lines to standard output; on a terminal, one more below them that is rewritten in place."""

    def __init__(self) -> None:
        self.on_terminal = sys.stdout.isatty()
        self.shown = False
        self.last = 0.0

    def say(self, text: str) -> None:
        self.clear()
        print(text, flush=True)

    def progress(self, text: str) -> None:
        if self.on_terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{text[:width]}", end="", flush=True)
            self.shown = True

    def clear(self) -> None:
        if self.shown:
            print("\r\x1b[K", end="", flush=True)
            self.shown = False

    def steps(self, epoch: int):  # type: ignore[no-untyped-def]
        """The progress of one epoch's training steps, at most ten times a second; None off a terminal."""
        if not self.on_terminal:
            return None

        def show(done: int, total: int, seconds: float) -> None:
            now = time.monotonic()
            if now - self.last > 0.1 or done == total:
                self.last = now
                left = seconds / done * (total - done)
                self.progress(
                    f"epoch {epoch + 1}: step {done}/{total}, {done / seconds:.1f} steps/s, {left:.0f} s left"
                )

        return show


if __name__ == "__main__":
    sys.exit(main())
