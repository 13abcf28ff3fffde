"""Train a quantized ResNet-20 for a few epochs and show that the whole CoDeQ pipeline works.

    python -m experiments.debug_run
    python -m experiments.debug_run --preset plan --output-dir debug_output_plan
    python -m experiments.debug_run --resume
    torchrun --nproc-per-node=2 -m experiments.debug_run
    python -m experiments.debug_run --help

Prints a table row an epoch, the compression ratios and a verdict; writes five pictures, history.json, the
compressed network, and after every epoch a checkpoint for --resume.
Exit status: 0, or 1 when a line of the verdict fails, the loss stops being finite or another process is lost,
2 for bad input, 130 after Ctrl-C, 143 after SIGTERM (the finished epochs' files are written first). torchrun
itself ends with 1 in all these cases but 0.
"""

import contextlib
import platform
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments import checkpoint
from experiments.checkpoint import Checkpoint
from experiments.checks import FAIL, early_warnings, verdict
from experiments.data import DataError, Dataset, TestBatches, TrainBatches, load_dataset
from experiments.device import describe_device, prepare_device
from experiments.distributed import (
    LostProcessError,
    Processes,
    join_processes,
    leave_processes,
    use_global_batch_norms,
    use_local_batch_norms,
)
from experiments.evaluator import Compression, Evaluator
from experiments.files import OutputError, hold_folder, set_aside, write_json
from experiments.live import ClosedOutputError, LiveLine, Stopped, ignore_sigterm, stop_signals
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
RESULTS = (*PICTURES, "history.json", PACKED, SLIM, checkpoint.PATTERN)  # what a run leaves in its folder
EXIT_OK, EXIT_FAILED, EXIT_BAD_INPUT = 0, 1, 2

Record = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    live = LiveLine()
    processes = Processes()
    try:
        with stop_signals():
            processes = join_processes()
            live.silent = not processes.first
            # The first alone reads them, so that a mistake is said once.
            settings = processes.from_first(parse_settings(arguments) if processes.first else None)
            return run(settings, processes, live)
    except Stopped as stop:
        live.say(f"stopped by {stop.name} outside the epochs; --resume goes on from the last checkpoint")
        return stop.status
    except LostProcessError as error:
        live.say(f"{error}; --resume goes on from the last checkpoint")
        return EXIT_FAILED
    except ClosedOutputError as error:
        live.close()
        return _refused(processes, f"{error}, so the run stopped; --resume goes on from its last checkpoint")
    except (ValueError, DataError, OutputError) as error:
        live.clear()
        return _refused(processes, str(error))
    finally:
        leave_processes(processes)


def _refused(processes: Processes, sentence: str) -> int:
    if processes.first:
        print(f"error: {sentence}", file=sys.stderr)
    return EXIT_BAD_INPUT


def run(settings: Settings, processes: Processes, live: LiveLine) -> int:
    """The whole run: data, model, quantizers, optimizer, loop, report. Returns the exit status."""
    device = prepare_device(settings, processes)
    held = hold_folder(settings.output_dir, live.say) if processes.first else contextlib.nullcontext()
    with held:
        dataset = processes.from_first(load(settings, live) if processes.first else None)
        train_batches = TrainBatches(dataset, settings.batch_size, settings.seed, device, processes)
        test_batches = TestBatches(dataset, device, processes=processes)

        torch.manual_seed(settings.seed)
        model = resnet20().to(device)
        evaluator = Evaluator(model)
        quantized = attach_weight_quantizers(model, settings.exclude_layers, DeadZoneLDZCompander, {})
        if device.type != "mps":  # where channels_last has given wrong batch-norm gradients
            model.to(memory_format=torch.channels_last)
        if processes.count > 1:
            use_global_batch_norms(model, processes)
        penalty = coupled_group_lasso(model)
        optimizer = make_optimizer(model, settings, settings.epochs * len(train_batches))
        keep_dead = keep_dead_slices(model) if settings.keep_dead == "yes" else None
        step = TrainingStep(model, optimizer, penalty, settings.precision, keep_dead, processes)
        learning_rate = cosine_anneal(0)
        sparsity = linear_warmup(settings.sparsity_delay, settings.sparsity_ramp)

        head = describe_run(settings, dataset, device, processes, model, quantized)
        start = logits(model)
        records: list[Record] = []
        resumed: list[dict[str, Any]] = []
        found = processes.from_first(
            checkpoint.last_checkpoint(settings.output_dir, live.say)
            if settings.resume and processes.first
            else None
        )
        if found:
            checkpoint.check_settings(found.settings, settings)
            said = what_changed(found, settings, head)
            checkpoint.restore(found, model, optimizer)
            start, records = found.start, found.records
            resumed = [*found.resumed, {"after_epoch": found.epochs, "said": said}]
            head["lines"] += [f"Resumed:   after epoch {found.epochs}" + "".join(f"; {s}" for s in said)]
        elif processes.first:
            head["lines"] += make_room(settings)
        live.say("\n".join(head["lines"]))
        live.say(table_header(dataset))
        for done in range(len(records)):
            show_epoch(live, records[: done + 1])

        compression = evaluator.evaluate(model)
        stopped: str | None = None
        not_finite: str | None = None
        status = EXIT_OK
        try:
            for epoch in range(len(records), settings.epochs):
                began = time.perf_counter()
                set_learning_rates(optimizer, learning_rate(epoch, settings.epochs))
                weight = settings.sparsity_weight * sparsity(epoch, settings.epochs)
                losses = train_epoch(step, train_batches, epoch, weight, live.steps(epoch))
                if settings.batch_norm_batches:
                    renew_batch_norms(
                        model, train_batches, epoch, settings.batch_norm_batches, settings.precision
                    )
                accuracy = measure_accuracy(model, test_batches, settings.precision, processes)
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
                if processes.first:
                    save(settings, head, model, optimizer, start, records, resumed, live)
                show_epoch(live, records)
        except Stopped as stop:
            stopped, status = f"stopped by {stop.name} in epoch {len(records) + 1}", stop.status
        except NotFiniteError as error:
            stopped = not_finite = f"stopped in epoch {len(records) + 1}: {error}"
            status = EXIT_FAILED
        except LostProcessError as error:
            ignore_sigterm()  # which torchrun sends once it sees the same; what follows is quick
            stopped, status = f"stopped in epoch {len(records) + 1}: {error}", EXIT_FAILED
        if not processes.first:
            return status
        if stopped:
            live.say(stopped + ("; --resume goes on after the last epoch above" if records else ""))
        use_local_batch_norms(model)
        history = {k: v for k, v in head.items() if k != "lines"} | {
            "settings": settings.to_json(),
            "resumed": resumed,
            "stopped": stopped,
            "epochs": records,
        }
        verdict_status = report(settings, history, compression, model, dataset, device, not_finite, live)
        return status or verdict_status


def load(settings: Settings, live: LiveLine) -> Dataset:
    return load_dataset(
        settings.data, settings.data_dir, settings.limit_train, settings.limit_test, live.say, live.progress
    )


def make_room(settings: Settings) -> list[str]:
    """Move an earlier run's files out of the way of this one's; the lines that say so."""
    lines = []
    if settings.resume:
        lines.append(f"Resumed:   no, there is no checkpoint in {settings.output_dir}: this is a new run")
    aside = set_aside(settings.output_dir, RESULTS)
    if aside:
        lines.append(f"Earlier:   the files of an earlier run in {settings.output_dir} were moved to {aside}")
    return lines


def what_changed(found: Checkpoint, settings: Settings, head: Record) -> list[str]:
    """What a run that goes on has otherwise than before, in words. Raises: ValueError if the data has."""
    before, now = found.surroundings, surroundings(head)
    if before["data"] != now["data"]:
        raise ValueError(
            f"--resume: this run would go on with the {now['data']['name']} ({now['data']['train_images']:,} "
            f"training images), and it began with the {before['data']['name']} "
            f"({before['data']['train_images']:,}); give the same data"
        )
    said = [f"{key} {before[key]} before, {now[key]} now: the last digits may differ"
            for key in now if before[key] != now[key]]  # fmt: skip
    epochs = found.settings["epochs"]
    if settings.epochs != epochs:
        rate, was = (cosine_anneal(0)(found.epochs, total) for total in (settings.epochs, epochs))
        said.append(
            f"--epochs was {epochs}, is {settings.epochs}: the learning rates go on at {rate:.4f} of their "
            f"peak instead of {was:.4f}; a run of {settings.epochs} epochs from the start gives other numbers"
        )
    return said


def surroundings(head: Record) -> Record:
    """What a run's digits depend on beside its settings."""
    data = {k: v for k, v in head["data"].items() if k != "source"}
    return {"torch": head["versions"]["torch"], "device": head["device"], "data": data}


def save(
    settings: Settings,
    head: Record,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    start: Record,
    records: list[Record],
    resumed: list[Record],
    live: LiveLine,
) -> None:
    """Leave a checkpoint. One that cannot be written is said, and the run goes on: the next may succeed."""
    state = Checkpoint(
        settings=settings.to_json(),
        surroundings=surroundings(head),
        model=model.state_dict(),
        optimizer=optimizer.state_dict()["state"],
        random=checkpoint.random_states(),
        start=start,
        records=records,
        resumed=resumed,
    )
    try:
        checkpoint.save_checkpoint(settings.output_dir, state)
    except OutputError as error:
        live.say(f"      ! no checkpoint of epoch {len(records)}: {error}")


def show_epoch(live: LiveLine, records: list[Record]) -> None:
    """The last record's row of the table, and below it the warnings that no earlier row gave."""
    live.say(table_row(records[-1]))
    before = {about for end in range(1, len(records)) for about, _ in early_warnings(records[:end])}
    for about, sentence in early_warnings(records):
        if about not in before:
            live.say(f"      ! {sentence}")


def describe_run(
    settings: Settings,
    dataset: Dataset,
    device: torch.device,
    processes: Processes,
    model: nn.Module,
    quantized: list[str],
) -> Record:
    """The run's first lines, and the same as data for history.json."""
    packages = ("torch", "torchvision", "numpy", "matplotlib")
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    candidates = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    full = [n for n in candidates if n not in quantized]
    data = (
        f"{dataset.name}: {len(dataset.train_labels):,} training and {len(dataset.test_labels):,} test images"
    )
    where = describe_device(device) + (f", {processes.count} processes" if processes.count > 1 else "")
    lines = [
        f"Versions:  {', '.join(f'{k} {v}' for k, v in versions.items())}",
        f"Device:    {where}, {PRECISIONS[settings.precision]}"
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
        "device": where,
        "precision": PRECISIONS[settings.precision],
        "threads": torch.get_num_threads(),
        "processes": processes.count,
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
    history: Record,
    compression: Compression,
    model: nn.Module,
    dataset: Dataset,
    device: torch.device,
    not_finite: str | None,
    live: LiveLine,
) -> int:
    """The final metrics, the pictures, the verdict and history.json; the exit status that they call for."""
    path, records = settings.output_dir / "history.json", history["epochs"]
    if not records:
        live.say("no epoch was finished, so there is nothing to draw")
        write_json(path, history)
        return EXIT_OK
    live.say(metrics_lines(compression))
    pictures = draw(settings, records, compression, dataset)
    proof = None
    if not history["stopped"]:  # else the weights are of an epoch that no row of the table describes
        live.progress("making the smaller network and the packed file")
        whole_test_set = TestBatches(dataset, device)
        proof = prove(model, compression.count, whole_test_set, settings.output_dir, settings.to_json())
        live.say(proof_lines(proof))
    checks = verdict(records, settings, compression.count, model, pictures, not_finite, proof)
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
    """The pictures, from the records and counts alone; returns their paths."""
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


if __name__ == "__main__":
    sys.exit(main())
