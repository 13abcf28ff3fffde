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
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
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
    ALONE,
    LostProcessError,
    Processes,
    join_processes,
    leave_processes,
    use_global_batch_norms,
    use_local_batch_norms,
)
from experiments.evaluator import Compression, Evaluator
from experiments.files import OutputError, archive_files, lock_folder, write_json
from experiments.live import (
    EXIT_BAD_INPUT,
    ClosedOutputError,
    LiveLine,
    Stopped,
    StopSignals,
    ignore_sigterm,
    refuse,
)
from experiments.proofs import PACKED, SLIM, Proof, proof_lines, prove
from experiments.schedules import cosine_anneal, linear_warmup
from experiments.settings import PRECISIONS, Settings, parse_settings
from experiments.sparsity import coupled_group_lasso, keep_dead_slices
from experiments.training import (
    NotFiniteError,
    TrainingStep,
    logit_pace,
    make_optimizer,
    measure_accuracy,
    renew_batch_norms,
    set_learning_rates,
    train_epoch,
)
from metrics import TOTALS, format_ratio
from resnet import resnet20
from src.encoding import PackingError
from src.quantizer import DeadZoneLDZCompander
from utils_quantization import attach_weight_quantizers, quantizers

PICTURES = ("accuracy_curve.png", "sparsity_curves.png", "channel_liveness.png", "per_layer_channels.png",
            "channels_over_time.png")  # fmt: skip
RESULTS = (*PICTURES, "history.json", PACKED, SLIM)  # and checkpoints
EXIT_OK, EXIT_FAILED = 0, 1

Record = dict[str, Any]


@dataclass
class Run:
    """What a run consists of once it is set up, and what it has found so far."""

    settings: Settings
    processes: Processes
    live: LiveLine
    signals: StopSignals
    device: torch.device
    dataset: Dataset
    train_batches: TrainBatches
    test_batches: TestBatches
    model: nn.Module
    evaluator: Evaluator
    penalty: Callable[[nn.Module], torch.Tensor]
    optimizer: torch.optim.Optimizer
    step: TrainingStep
    head: Record  # what history.json says of the run as a whole
    start: Record  # the logits before the first epoch
    compression: Compression
    records: list[Record] = field(default_factory=list)  # one an epoch
    resumed: list[Record] = field(default_factory=list)
    stopped: str | None = None  # why, if before the last epoch
    not_finite: str | None = None  # the same, if numbers were the reason
    status: int = EXIT_OK


def main(arguments: list[str] | None = None) -> int:
    live = LiveLine()
    processes = ALONE
    try:
        with StopSignals() as signals, contextlib.ExitStack() as held:
            processes = join_processes()
            live.silent = not processes.first
            try:
                # The first alone reads them, so that a mistake is said once.
                settings = processes.broadcast(parse_settings(arguments) if processes.first else None)
                if processes.first:
                    held.enter_context(lock_folder(settings.output_dir, live.say))
                found = find_checkpoint(settings, processes, live) if settings.resume else None
                run = set_up(settings, processes, live, signals)
                if found:
                    go_on(run, found)
                begin(run)
            except (ValueError, DataError) as error:
                live.clear()
                return refuse(str(error)) if processes.first else EXIT_BAD_INPUT
            train(run)
            return report(run) if processes.first else run.status
    except Stopped as stop:
        live.say(f"stopped by {stop.name} outside the epochs; --resume goes on from the last checkpoint")
        return stop.status
    except LostProcessError as error:
        live.say(f"{error}; --resume goes on from the last checkpoint")
        return EXIT_FAILED
    except OutputError as error:
        live.clear()
        return refuse(str(error))
    except ClosedOutputError as error:
        live.close()
        return refuse(f"{error}, so the run stopped; --resume goes on from its last checkpoint")
    finally:
        leave_processes(processes)


def find_checkpoint(settings: Settings, processes: Processes, live: LiveLine) -> Checkpoint | None:
    """The one to go on from. Raises: ValueError if it has other settings, OutputError if all are damaged."""
    found = processes.broadcast(
        checkpoint.last_checkpoint(settings.output_dir, live.say) if processes.first else None
    )
    if found:
        checkpoint.check_settings(found.settings, settings)
    return found


def set_up(settings: Settings, processes: Processes, live: LiveLine, signals: StopSignals) -> Run:
    """Model, quantizers, data, optimizer. Raises: ValueError or DataError for what cannot be run."""
    device = prepare_device(settings, processes)
    torch.manual_seed(settings.seed)
    model = resnet20().to(device)
    evaluator = Evaluator(model)
    quantized = attach_weight_quantizers(model, settings.exclude_layers, DeadZoneLDZCompander, {})
    if device.type != "mps":  # where channels_last has given wrong batch-norm gradients
        model.to(memory_format=torch.channels_last)
    if processes.count > 1:
        use_global_batch_norms(model, processes)
    dataset = processes.broadcast(load(settings, live) if processes.first else None)
    train_batches = TrainBatches(dataset, settings.batch_size, settings.seed, device, processes)
    penalty = coupled_group_lasso(model)
    optimizer = make_optimizer(model, settings, settings.epochs * len(train_batches))
    keep_dead = keep_dead_slices(model) if settings.keep_dead == "yes" else None
    return Run(
        settings=settings,
        processes=processes,
        live=live,
        signals=signals,
        device=device,
        dataset=dataset,
        train_batches=train_batches,
        test_batches=TestBatches(dataset, device, processes=processes),
        model=model,
        evaluator=evaluator,
        penalty=penalty,
        optimizer=optimizer,
        step=TrainingStep(model, optimizer, penalty, settings.precision, keep_dead, processes),
        head=describe_run(settings, dataset, device, processes, model, quantized),
        start=logits(model),
        compression=evaluator.evaluate(model),
    )


def go_on(run: Run, found: Checkpoint) -> None:
    """Take up where the checkpoint left off. Raises: ValueError if it is of another run."""
    said = what_changed(found, run.settings, run.head)
    checkpoint.restore(found, run.model, run.optimizer)
    run.start, run.records = found.start, found.records
    run.resumed = [*found.resumed, {"after_epoch": found.epochs, "said": said}]
    run.head["lines"].append(f"Resumed:   after epoch {found.epochs}" + "".join(f"; {s}" for s in said))
    run.compression = run.evaluator.evaluate(run.model)


def begin(run: Run) -> None:
    """The first lines and the table up to here; a new run moves an earlier one's files out of its way."""
    folder = run.settings.output_dir
    if run.settings.resume and not run.records:
        run.head["lines"].append(f"Resumed:   no, there is no checkpoint in {folder}: this is a new run")
    if run.processes.first and not run.records:
        # Checkpoints first: if this is cut short, --resume must not take up what was left of them.
        files = [*checkpoint.checkpoint_paths(folder), *(folder / name for name in RESULTS)]
        aside = archive_files(folder, files)
        if aside:
            run.head["lines"].append(
                f"Earlier:   the files of an earlier run in {folder} were moved to {aside}"
            )
    run.live.say("\n".join(run.head.pop("lines")))
    run.live.say(table_header(run.dataset))
    for done in range(len(run.records)):
        show_epoch(run.live, run.records[: done + 1])


def train(run: Run) -> None:
    """The epochs that are left, until the last or until something stops them."""
    try:
        for epoch in range(len(run.records), run.settings.epochs):
            record = one_epoch(run, epoch)
            with run.signals.held():  # history, checkpoint and table have an epoch all three or not at all
                run.records.append(record)
                if run.processes.first:
                    save(run)
                show_epoch(run.live, run.records)
        return
    except Stopped as stop:
        ignore_sigterm()
        run.stopped = f"stopped by {stop.name} in epoch {len(run.records) + 1}"
        run.status = stop.status
    except NotFiniteError as error:
        run.stopped = run.not_finite = f"stopped in epoch {len(run.records) + 1}: {error}"
        run.status = EXIT_FAILED
    except LostProcessError as error:
        ignore_sigterm()  # which torchrun sends once it sees the same
        run.stopped = f"stopped in epoch {len(run.records) + 1}: {error}"
        run.status = EXIT_FAILED
    run.live.say(run.stopped + ("; --resume goes on from the last checkpoint" if run.records else ""))


def one_epoch(run: Run, epoch: int) -> Record:
    """Train, test, count; the epoch's record, from which the table, the pictures and the verdict are made."""
    settings, model, began = run.settings, run.model, time.perf_counter()
    set_learning_rates(run.optimizer, cosine_anneal(0)(epoch, settings.epochs))
    sparsity = linear_warmup(settings.sparsity_delay, settings.sparsity_ramp)
    weight = settings.sparsity_weight * sparsity(epoch, settings.epochs)
    losses = train_epoch(run.step, run.train_batches, epoch, weight, run.live.steps(epoch))
    if settings.batch_norm_batches:
        renew_batch_norms(model, run.train_batches, epoch, settings.batch_norm_batches, settings.precision)
    accuracy = measure_accuracy(model, run.test_batches, settings.precision, run.processes)
    with torch.no_grad():
        penalty_now = run.penalty(model).item()
    run.compression = run.evaluator.evaluate(model)
    return {
        "epoch": epoch + 1,
        "loss": losses.loss,
        "cross_entropy": losses.cross_entropy,
        "penalty": penalty_now,
        "sparsity_weight": weight,
        "accuracy": accuracy,
        **sparsities(run.compression),
        "layers": recorded_layers(model, run.compression, run.start),
        "seconds": time.perf_counter() - began,
    }


def load(settings: Settings, live: LiveLine) -> Dataset:
    return load_dataset(
        settings.data, settings.data_dir, settings.limit_train, settings.limit_test, live.say, live.progress
    )


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
        steps = -(-now["data"]["train_images"] // settings.batch_size)  # an epoch
        pace, paced = (logit_pace(settings, total * steps) for total in (settings.epochs, epochs))
        said.append(
            f"--epochs was {epochs}, is {settings.epochs}: the learning rates go on at {rate:.4f} of their "
            f"peak instead of {was:.4f}"
            + (f", the logits' peak being {pace / paced:.4f} of what it was" if pace != paced else "")
            + f"; a run of {settings.epochs} epochs from the start gives other numbers"
        )
    return said


def surroundings(head: Record) -> Record:
    """What a run's digits depend on beside its settings."""
    data = {k: v for k, v in head["data"].items() if k != "source"}
    return {"torch": head["versions"]["torch"], "device": head["device"], "data": data}


def save(run: Run) -> None:
    """Leave a checkpoint. One that cannot be written is said, and the run goes on: the next may succeed."""
    state = Checkpoint(
        settings=run.settings.to_json(),
        surroundings=surroundings(run.head),
        model=run.model.state_dict(),
        optimizer=run.optimizer.state_dict()["state"],
        random=checkpoint.random_states(),
        start=run.start,
        records=run.records,
        resumed=run.resumed,
    )
    try:
        checkpoint.save_checkpoint(run.settings.output_dir, state)
    except OutputError as error:
        run.live.say(f"      ! no checkpoint of epoch {len(run.records)}: {error}")


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


def report(run: Run) -> int:
    """The final metrics, the pictures, the verdict and history.json; the exit status that they call for."""
    settings, live, compression = run.settings, run.live, run.compression
    path = settings.output_dir / "history.json"
    history = run.head | {
        "settings": settings.to_json(),
        "resumed": run.resumed,
        "stopped": run.stopped,
        "epochs": run.records,
    }
    if run.records:
        live.say(metrics_lines(compression))
    write_json(path, history)  # already, so that nothing that follows can cost it
    if not run.records:
        live.say("no epoch was finished, so there is nothing to draw")
        return run.status
    pictures = draw(settings, run.records, compression, run.dataset)
    proof: Proof | PackingError | None = None
    if not run.stopped:  # else its weights are of an epoch that no row describes
        live.progress("making the smaller network and the packed file")
        use_local_batch_norms(run.model)
        whole_test_set = TestBatches(run.dataset, run.device)
        try:
            proof = prove(
                run.model, compression.count, whole_test_set, settings.output_dir, settings.to_json()
            )
            live.say(proof_lines(proof))
        except PackingError as error:
            proof = error
            live.say(f"\nNo smaller network and no packed file: {error}")
    checks = verdict(run.records, settings, compression.count, run.model, pictures, run.not_finite, proof)
    live.say("\n".join(["", "--- Verdict ---", *map(str, checks)]))
    history |= {
        "final": final_metrics(compression),
        "proof": proof.to_json() if isinstance(proof, Proof) else None,
        "verdict": [asdict(c) for c in checks],
    }
    write_json(path, history)
    made = [settings.output_dir / name for name in (PACKED, SLIM)] if isinstance(proof, Proof) else []
    live.say("\nFiles: " + ", ".join(str(p) for p in (*pictures, path, *made)))
    failed = any(check.status == FAIL for check in checks)
    return run.status or (EXIT_FAILED if failed else EXIT_OK)


def draw(settings: Settings, records: list[Record], compression: Compression, dataset: Dataset) -> list[Path]:
    """The pictures, from the records and counts alone; returns their paths."""
    os.environ["MPLBACKEND"] = "agg"  # no window is opened, whatever else the user has set
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
