"""Preflight check of what is said: the lines and tables of a small history are what that history says."""

import csv
import dataclasses
import importlib
import io
import math
import os
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from experiments import report
from experiments.device import emulates_bf16
from experiments.expect import Subject, expect, shows
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
    Resumption,
    judge,
    layer_records,
    some,
)
from experiments.page import report_page
from experiments.preflight_pictures import ratio_names, small_history
from experiments.preflight_settings import read_flags
from experiments.settings import PRECISIONS, PRESETS, Settings, flag
from metrics import LayerCount
from src.channels import ChannelState
from utils_quantization import quantized_layers

A_MINUTE, AN_HOUR = timedelta(minutes=1), timedelta(hours=1)
# Settings that a title leaves out: they have no part in the numbers, or stand elsewhere in the same line.
SAID_ELSEWHERE = ("preset", "epochs", "seed", "device", "threads", "data", "data_dir", "output_dir",
                  "figure_format", "preflight", "resume", "rehearse")  # fmt: skip


def lines_show_the_history(subject: Subject) -> str:
    """What is noted of the network against it, and what is printed of a history against its numbers."""
    _compare_start(subject)
    if subject.own_network:
        _compare_signals(subject)
    history = small_history(subject.history, subject.pipeline.evaluator.dense)
    for record in history.epochs:
        _compare_row(record)
    _compare_preflight_line()
    _compare_layer_table(history)
    _compare_csv(history)
    _compare_first_lines(history)
    _compare_title(history, subject.pipeline.settings.preset)
    assert history.final and history.compressed
    # Each ratio is once small and once large.
    ratios = {name: getattr(history.final, name) for name in ratio_names()}
    turned: Any = dict(zip(ratios, [*ratios.values()][::-1], strict=True))
    for final in (history.final, dataclasses.replace(history.final, **turned)):
        _compare_metrics_text(final)
        _compare_run_line(dataclasses.replace(history, final=final), subject.pipeline.settings)
    for made in (history.compressed, dataclasses.replace(history.compressed, slim_macs=2, packed_bytes=3)):
        _compare_compressed_text(made)
    _compare_page(history, subject.pipeline.settings)
    _stand_in_is_named(history, subject.pipeline.settings)
    return "the table, the final metrics, the last line, metrics.csv and report.html"


def _compare_start(subject: Subject) -> None:
    """What is noted of the run, its data and each quantizer before the first epoch."""
    history, data, model, step = subject.history, subject.dataset, subject.pipeline.model, subject.step
    sizes = len(data.train_labels), len(data.test_labels)
    quantized, quantizers = list(quantized_layers(model)), subject.quantizers(model)
    others = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    cuda, ranks = step.device.type == "cuda", step.processes.count
    machine = torch.cuda.get_device_name(step.device) if cuda else f"{subject.threads} threads"
    groups = {id(p): group["name"] for group in step.optimizer.param_groups for p in group["params"]}
    due = {
        "data": DataRecord(data.name, data.source, data.synthetic, data.classes, *sizes),
        "quantized": quantized,
        "full_precision": [name for name in others if name not in quantized],
        "precision": PRECISIONS[subject.pipeline.settings.precision],
        "processes": ranks,
        "threads": subject.threads,
        "device": f"{step.device.type}, {machine}" + f", {ranks} processes" * (ranks > 1),
        "parameter_groups": {
            name: groups[id(p)]
            for quantizer in quantizers.values()
            for name, p in quantizer.named_parameters()
            if id(p) in groups
        },
        "without_codes": [n for n, q in quantizers.items() if not callable(getattr(q, "codes", None))],
        "barriers": list(subject.pipeline.evaluator.dense.barriers),
        "frozen": [
            name
            for name, parameter in model.named_parameters()
            if not parameter.requires_grad and ".quantizer." not in name
        ],
        "needs_host": cuda and ranks == 1 and any(step.host),
        "may_skip": subject.may_skip,
        "emulates_bf16": subject.pipeline.settings.precision == "bf16" and emulates_bf16(step.device),
    }
    # Of a weight with one input channel, or of one pixel, both layouts are the same.
    last = {
        p.is_contiguous(memory_format=torch.channels_last)
        for p in model.parameters()
        if p.ndim == 4 and p.is_contiguous() != p.is_contiguous(memory_format=torch.channels_last)
    }
    if last:
        due["layout"] = "channels_last" if all(last) else "contiguous"
    for name, value in due.items():
        noted = getattr(history, name)
        measured = f"{noted} is noted for {name}, the run has {value}"
        expect(noted == value, measured, "the record of the run's start (experiments/history.py)")
    age = _age(history.origin.date)
    expect(
        # The checks of a large network take minutes, clocks are set, and most time zones are hours apart.
        age is not None and -A_MINUTE < age < AN_HOUR,
        f"{history.origin.date!r} is noted for the run's start, and it is {datetime.now(UTC).isoformat()}",
        "the date in the record of the run's start (experiments/history.py)",
    )
    # Not before it is needed: matplotlib takes half a second. It comes with the settings of plots.py.
    importlib.import_module("experiments.plots")
    matplotlib: Any = sys.modules["matplotlib"]
    of_modules = {m.__name__: m.__version__ for m in (torch, np, matplotlib)}
    versions = {"python": ".".join(map(str, sys.version_info[:3])), **of_modules}
    # What stands behind a plus names the build, which a module and its package may write differently.
    odd = [n for n, v in versions.items() if history.versions.get(n, "").split("+")[0] != v.split("+")[0]]
    expect(
        not odd,
        f"{some([f'{n} {history.versions.get(n)}, which is {versions[n]}' for n in odd])} is noted",
        "the versions in the record of the run's start (experiments/history.py)",
    )
    expect(
        history.origin.command == subject.arguments,
        f"the command {shlex.join(history.origin.command)!r} is noted for {shlex.join(subject.arguments)!r}",
        "the command in the record of the run's start (experiments/history.py)",
    )
    commit, altered = _sources()
    expect(
        commit is None or history.origin.commit == commit + "-dirty" * altered,
        f"commit {history.origin.commit} is noted, git says {commit}, {'' if altered else 'not '}altered",
        "the record of where the run comes from (experiments/history.py)",
    )
    if subject.resumed:
        return
    for name, quantizer in subject.quantizers(subject.pipeline.model).items():
        noted = history.start[name]
        bits: Any = getattr(quantizer, "get_learned_bitwidth", quantizer.get_bitwidth)()
        learned = torch.as_tensor(bits).detach().flatten().tolist()
        numbers = {n: p.detach().mean().item() for n, p in quantizer.named_parameters() if p.requires_grad}
        expect(
            noted.parameters == numbers
            and (len(learned) != 1 or math.isclose(noted.learned_bits, learned[0], rel_tol=1e-6)),
            f"{name} is noted to begin at {noted.learned_bits:.6g} bits and {noted.parameters}, "
            f"and it begins at {learned} and {numbers}",
            "the record of how the quantizers begin (experiments/history.py)",
        )


def _age(date: str) -> timedelta | None:
    """How long ago a date was; None of one that does not say that it is UTC."""
    then = datetime.fromisoformat(date)
    return datetime.now(UTC) - then if then.utcoffset() == timedelta(0) else None


def _sources() -> tuple[str | None, bool]:
    """The commit of these sources, and whether a file differs from it; None where git does not say it."""
    here = Path(__file__).parents[1]

    # What git's own hooks export would name another repository.
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*words: str) -> str:
        said = subprocess.run(
            ["git", "-C", str(here), *words],
            capture_output=True, text=True, timeout=10, check=True, env=surroundings,
        )  # fmt: skip
        return said.stdout.strip()

    try:
        if not (here / ".git").exists():
            return None, False
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, False


@torch.no_grad()
def _compare_signals(subject: Subject) -> None:
    """The share of a layer's output that its batch norm leaves, of the layer's largest channel."""
    model = subject.copied_step().model
    convolutions = [n for n, m in quantized_layers(model).items() if isinstance(m, nn.Conv2d)]
    norms: Any = {n: model.get_submodule(n.replace("conv", "bn")) for n in convolutions}
    for norm in norms.values():
        norm.running_var[1:] = 0  # as of filters that are dead
    layers = layer_records(model, subject.pipeline.evaluator.evaluate(model).count)
    for name, norm in norms.items():
        signal, largest = layers[name].signal, norm.running_var.max().item()
        due = largest / (largest + norm.eps)
        expect(
            signal is not None and math.isclose(signal, due, rel_tol=1e-4, abs_tol=1e-6),
            f"the signal of {name} is noted as {signal}, its batch norm gives {due:.6g}",
            "the signals of a record (experiments/history.py)",
        )


def _expect_shown(what: str, said: dict[str, str], due: dict[str, float]) -> None:
    odd = [f"{n} {said.get(n)} where it is {value:.6g}" for n, value in due.items()
           if not shows(said.get(n, ""), value)]  # fmt: skip
    expect(
        not odd,
        f"{what} shows {some(odd)}",
        f"{what} shows other numbers than its names say: a column or an epoch is mixed up "
        f"(experiments/report.py)",
    )


def _compare_row(record: EpochRecord) -> None:
    """The table's row has each number below its name."""
    data = DataRecord("CIFAR-10", "", False, 10, 1, 1)
    (header,) = [line for line in report.table_header(data).splitlines() if line.startswith("Epoch")]
    names = [cell.strip() for cell in header.split("|")]
    cells = [cell.strip() for cell in report.table_row(record).split("|")]
    due = {"Epoch": record.epoch, "Loss": record.loss, "Acc": 100 * record.accuracy}
    due |= {"Unstr": 100 * record.unstructured_sparsity, "Struct": 100 * record.structured_sparsity}
    due |= {"Bits": record.learned_bits, "Time": record.seconds}
    _expect_shown("a row of the table", dict(zip(names, cells, strict=True)), due)


def _compare_preflight_line() -> None:
    """The line that ends the preflight: what holds, what fails, and what was skipped."""
    cause = "the line that counts the preflight's checks (preflight_line of experiments/report.py)"
    held, skipped, failed = ([Check(status, f"{status} {i}", "") for i in range(count)]
                             for status, count in ((PASS, 5), (SKIP, 2), (FAIL, 3)))  # fmt: skip
    names = f"(skipped: {', '.join(check.name for check in skipped)})"
    for checks, said in (
        (held, "5 checks hold"),
        (held + skipped, f"5 checks hold, 7 s {names}"),
        (held + skipped + failed, f"3 of 10 checks FAIL, 7 s {names}"),
    ):
        line = " ".join(report.preflight_line(checks, 7).split())
        expect(line.startswith(f"Preflight: {said}"), f"{line!r} is said where {said!r} is so", cause)


def _compare_run_line(history: History, settings: Settings) -> None:
    """The last line, which is made to be quoted: the last epoch's numbers, and the checks that hold."""
    assert history.final and history.compressed
    checks = [Check(PASS, "a", ""), Check(PASS, "b", ""), Check(FAIL, "c", ""), Check(SKIP, "d", "")]
    origin = dataclasses.replace(history.origin, commit=f"{'0123456789' * 4}-dirty")
    line = report.run_line(dataclasses.replace(history, origin=origin), settings, checks)
    last = history.epochs[-1]
    pattern = (
        r".*, epoch (\d+), seed (\d+), 0123456\+: (\S+) % accuracy, (\S+) % zeros, (\S+) % zero filters, "
        r"(\S+) learned bits, BOPs (\S+)x / (\S+)x, (\S+) bytes, (\d+) of (\d+) checks.*"
    )
    found = re.fullmatch(pattern, line)
    due = {
        "epoch": last.epoch,
        "seed": history.settings["seed"],
        "accuracy": 100 * last.accuracy,
        "zeros": 100 * last.unstructured_sparsity,
        "filters": 100 * last.structured_sparsity,
        "bits": last.learned_bits,
        "structured": history.final.structured_bops_ratio,
        "unstructured": history.final.unstructured_bops_ratio,
        "bytes": history.compressed.packed_bytes,
        "held": 2,
        "checks": 3,
    }
    said = dict(zip(due, found.groups(), strict=True)) if found else {}
    _expect_shown("the run's last line", said, due)
    for failing in (0, 2):
        preflight = [*[judge(False, "e", "", "")] * failing, *checks[:2], checks[3]]
        line = report.run_line(dataclasses.replace(history, preflight=preflight), settings, checks)
        end = "2 of 3 checks" + f", and {failing} of the preflight FAIL" * bool(failing)
        expect(
            line.endswith(end),
            f"the last line ends in {line[-50:]!r} where {end!r} is so",
            "the preflight's checks in the run's last line (run_line of experiments/report.py)",
        )


def _compare_first_lines(history: History) -> None:
    """Each of the first lines, of a run in which all is out of the ordinary, and of a plain one."""
    assert history.final
    names = [layer.name for layer in history.final.layers]
    quantized, others = names[: len(names) // 2], names[len(names) // 2 :]
    macs = {layer.name: layer.dense_macs for layer in history.final.layers}
    share = sum(macs[name] for name in others) / sum(macs.values())
    plain = dataclasses.replace(
        history, versions={"python": "3.99", "torch": "9.8.7"}, device="cpu, 5 threads", precision="digits",
        data=DataRecord("a set", "a folder", False, 10, 4321, 765), quantized=names, full_precision=[],
        without_codes=[], frozen=[], layout="channels_last", needs_host=False, may_skip=False, barriers=[],
        emulates_bf16=False, resumed=[],
    )  # fmt: skip
    changed: Any = {"preset": "plan", "device": "cpu", "epochs": 31, "batch_size": 33, "seed": 17}
    settings = Settings(**(PRESETS["plan"] | changed))
    due = [
        "Versions: python 3.99, torch 9.8.7",
        "Device: cpu, 5 threads, digits",
        "Preset: plan, with --batch-size 33",
        "Training: 31 epochs of batches of 33, seed 17",
        "Data: a set: 4,321 training and 765 test images (a folder)",
        f"Quantized: {len(names)} of {len(names)} layers; not: none",
    ]
    _expect_lines(plain, settings, due)
    odd = dataclasses.replace(
        plain, data=dataclasses.replace(plain.data, synthetic=True), quantized=quantized,
        full_precision=others, without_codes=["a", "b"], frozen=["c", "d", "e"], layout="contiguous",
        needs_host=True, may_skip=True, barriers=["f", "g"],
        emulates_bf16=True,
        resumed=[Resumption(3, ["one", "another"]), Resumption(5, [])],
    )  # fmt: skip
    due = [
        "*** NOT CIFAR-10: this run uses the a set ***",
        "Versions: python 3.99, torch 9.8.7",
        "Device: cpu, 5 threads, digits (auto: no CUDA or MPS here)",
        "Preset: plan, with --batch-size 33 --model h:i --quantizer j:K",
        "Network: h:i",
        "Training: 31 epochs of batches of 33, seed 17",
        "Data: a set: 4,321 training and 765 test images (a folder)",
        f"Quantized: {len(quantized)} of {len(names)} layers; not: {', '.join(others)}",
        "Quantizer: j:K",
        "Packed: as float32 in 2 quantized layers...",
        "Frozen: 3 parameters ... not trained: c, d, e",
        "Layout: contiguous...",
        "Graphs: none...",
        "Branches: the network may leave layers out...",
        "Warning: this device has no instructions for bf16...",
        "Barriers: no channel is followed through f, g",
        "Resumed: after epoch 3; one; another",
        "Resumed: after epoch 5",
        f"Warning: ... {100 * share:.1f} % of the MACs ... ({len(others)} layers)... {1 / share:.2f}x ...",
    ]
    _expect_lines(odd, dataclasses.replace(settings, device="auto", model="h:i", quantizer="j:K"), due)


def _expect_lines(history: History, settings: Settings, due: list[str]) -> None:
    """The first lines of a history are these, in which three dots stand for any words."""
    assert history.final
    text = report.first_lines(history, settings, history.final.count)
    lines = [" ".join(line.split()) for line in re.split(r"\n(?! )", text)]  # a long line goes on indented
    for line, wanted in zip_longest(lines, due, fillvalue="nothing"):
        expect(
            re.fullmatch(".*".join(map(re.escape, wanted.split("..."))), line) is not None,
            f"{line!r} is said where {wanted!r} is so",
            "the first lines (first_lines of experiments/report.py)",
        )


def _compare_title(history: History, preset: str) -> None:
    """A title names network, data set, epoch, preset, and each setting of the method that is another."""
    shown = dataclasses.replace(history, data=DataRecord("a set", "", False, 10, 1, 1))
    base = Settings(**(PRESETS[preset] | {"preset": preset}))
    others = {
        item.name: _another(item, getattr(base, item.name))
        for item in dataclasses.fields(Settings)
        if item.name not in SAID_ELSEWHERE
    }
    together = {name: value for name, value in others.items() if name != "max_bits"}  # beside fixed bits
    for changed in ({}, *({name: value} for name, value in others.items()), together):
        title = report.picture_title(shown, dataclasses.replace(base, **changed))
        found = re.fullmatch(r"(.+) on a set, preset (\w+)(?:, with (.+))?, epoch (\d+)", title)
        said = [*found.groups("")] if found else []
        flags = {name: value for name, value in changed.items() if name != "model"}
        network = "name" if "model" in changed else "ResNet-20"
        expect(
            bool(said) and read_flags(shlex.split(said.pop(2))) == flags
            and said == [network, preset, str(history.epochs[-1].epoch)],
            f"of {preset} {', '.join(map(flag, changed))} the title {title!r} says something else",
            "the settings that a run's lines and titles name (experiments/settings.py)",
        )  # fmt: skip


def _another(item: dataclasses.Field[Any], value: Any) -> Any:
    """Another value of a setting."""
    if item.metadata["choices"] or item.type is bool:
        return next(other for other in item.metadata["choices"] or (True, False) if other != value)
    made: dict[Any, Any] = {float: 0.625, str: "module:name", tuple[str, ...] | None: ("^a$", "b c")}
    return made.get(item.type, 7)


def _compare_layer_table(history: History) -> None:
    """A row a layer: its numbers under their heads, and channels as alive, constant and nothing."""
    assert history.final
    *rows, total = report.layer_table(history.final.count).splitlines()[2:]
    _, zeros, filters, channels, left, dense = total.split()
    layers = history.final.layers
    summed = {
        "zeros": 100 * sum(x.zero_weights for x in layers) / sum(x.weights for x in layers),
        "MACs left": sum(x.structured_macs for x in layers),
        "MACs": sum(x.dense_macs for x in layers),
        "filters": sum(x.filters for x in layers),
        "alive": sum(x.alive_channels for x in layers),
    }
    said = {"zeros": zeros, "MACs left": left, "MACs": dense, "filters": filters.partition("/")[2]}
    said["alive"] = channels.partition("/")[0]
    _expect_shown("the row of the totals in the layers' table", said, summed)
    cause = "the layers' table (experiments/report.py)"
    expect(
        len(rows) == len(layers), f"the layers' table has {len(rows)} rows, of {len(layers)} layers", cause
    )
    for layer, row in zip(layers, rows, strict=True):
        name, bits, zeros, filters, channels, left, dense = row.split()
        said = {"bits": bits, "zeros": zeros, "MACs left": left, "MACs": dense}
        said |= dict(zip(("zero filters", "filters"), filters.split("/"), strict=True))
        said |= dict(zip(("alive", "constant", "nothing"), channels.split("/"), strict=True))
        due = _channels(layer) | {
            "bits": layer.bits,
            "zeros": 100 * layer.zero_weights / layer.weights,
            "filters": layer.filters,
            "zero filters": layer.zero_filters,
            "MACs left": layer.structured_macs,
            "MACs": layer.dense_macs,
        }
        end = name.removeprefix("..")  # of a long name
        expect(layer.name.endswith(end) and len(end) > 1, f"{name!r} stands for {layer.name}", cause)
        _expect_shown(f"the row of {layer.name} in the layers' table", said, due)


def _channels(layer: LayerCount) -> dict[str, float]:
    words = {"alive": ChannelState.ALIVE, "constant": ChannelState.CONSTANT, "nothing": ChannelState.NULL}
    return {word: sum(s == state for s in layer.states) for word, state in words.items()}


def _compare_csv(history: History) -> None:
    """metrics.csv holds each number of an epoch under its name."""
    rows = list(csv.DictReader(io.StringIO(report.metrics_csv(history))))
    cause = "the columns or rows of metrics.csv (experiments/report.py)"
    expect(len(rows) == len(history.epochs), f"{len(rows)} rows of {len(history.epochs)} epochs", cause)
    for row, record in zip(rows, history.epochs, strict=True):
        numbers: dict[str, Any] = {
            f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.type in (int, float)
        }
        odd = [name for name, value in numbers.items() if row.get(name) != str(value)]
        expect(not odd, f"metrics.csv: epoch {record.epoch} has other numbers for {some(odd)}", cause)


def _compare_metrics_text(final: FinalCounts) -> None:
    """Each ratio that is printed at the end stands behind its own name, and so do the ceilings."""
    lines = report.metrics_lines(final).splitlines()
    cause = "the final metrics as they are printed (experiments/report.py)"
    for name, value in (
        ("Structured BOPs", final.structured_bops_ratio),
        ("Unstructured BOPs", final.unstructured_bops_ratio),
        ("Structured MACs", final.structured_mac_ratio),
        ("Unstructured MACs", final.unstructured_mac_ratio),
    ):
        (line,) = [line for line in lines if line.startswith(name)] or [""]
        said = line.rpartition(" ")[2]
        measured = f"{line!r} is printed where the ratio is {value:.2f}"
        expect(said.endswith("x") and shows(said.removesuffix("x"), value), measured, cause)
    ceilings = re.search(
        r"Ceiling: (\S+)x structured, (\S+)x unstructured, if the (\d+) quantized .* \(of (\S+) MACs\)",
        " ".join(" ".join(lines).split()),
    )
    due = {
        "structured": final.structured_ceiling,
        "unstructured": final.unstructured_ceiling,
        "quantized layers": sum(layer.quantized for layer in final.layers),
        "MACs": final.totals["dense_macs"],
    }
    shown = dict(zip(due, ceilings.groups(), strict=True)) if ceilings else {}
    _expect_shown("the line of the ceilings", shown, due)


def _compare_compressed_text(made: CompressedRecord) -> None:
    """What is printed of the smaller network and the packed file: each number behind its own words."""
    text = " ".join(report.compressed_lines(made).split())
    pattern = (
        r"Smaller network: (\S+) of (\S+) parameters, (\S+) of (\S+) MACs \((\S+)x\).* on (\S+) test images: "
        r"largest difference (\S+) of logits up to (\S+), (\S+) % equal predictions, accuracy (\S+) % "
        r"against (\S+) % Packed file: (\S+) bytes, (\S+) times smaller than the float32 state_dict's (\S+) "
        r"read back: (\S+) logits differ, accuracy (\S+) %"
    )
    due = {
        "parameters": made.slim_parameters,
        "parameters before": made.dense_parameters,
        "MACs": made.slim_macs,
        "MACs before": made.dense_macs,
        "ratio of MACs": made.dense_macs / made.slim_macs,
        "images": made.images,
        "largest difference": made.largest_difference,
        "largest logit": made.largest_logit,
        "equal predictions": 100 * made.agreement,
        "accuracy of the smaller network": 100 * made.slim_accuracy,
        "accuracy of the quantized network": 100 * made.quantized_accuracy,
        "bytes": made.packed_bytes,
        "ratio of bytes": made.float32_bytes / made.packed_bytes,
        "bytes in float32": made.float32_bytes,
        "logits that differ": made.packed_differs,
        "accuracy of the packed file": 100 * made.packed_accuracy,
    }
    found = re.search(pattern, text)
    said = dict(zip(due, found.groups(), strict=True)) if found else {}
    _expect_shown("what is said of the compressed network", said, due)
    for name, seconds in made.latency_seconds.items():
        row = re.search(rf"{name} +(\S+) ms \((\S+) to (\S+)\)", text)
        times = dict(zip(("median", "least", "most"), row.groups(), strict=True)) if row else {}
        _expect_shown(f"the latency of {name}", times, {n: 1e3 * s for n, s in seconds.items()})


def _compare_page(history: History, settings: Settings) -> None:
    """report.html has the run's line, its command, the rows of its tables and every check, whole."""
    assert history.final
    long = " ".join(f"word{i}" for i in range(60))
    checks = [
        Check(PASS, "one <check>", long),
        judge(False, f"another & {long}", f"less < {long}", f"some cause, {long}"),
        Check(SKIP, "a third", f"waits for {long}"),
        judge(False, "a fourth", long, f"one more cause, {long}"),
    ]
    preflight = [Check(PASS, "a first", "holds"), judge(False, "a second", long, f"another cause, {long}")]
    page = report_page(dataclasses.replace(history, preflight=preflight), settings, checks, {})
    due = [report.run_line(history, settings, checks), *map(report.table_row, history.epochs)]
    due += report.layer_table(history.final.count).splitlines()
    due += [shlex.join(history.origin.command), *map(str, history.settings.values())]
    missing = [text for text in due if escape(text) not in page]
    measured = f"report.html lacks {len(missing)} of {len(due)} parts, {missing[:1]} first"
    expect(not missing, measured, "the page of the run (experiments/page.py)")
    rows = re.findall(r"<tr><td class=\"\w+\">(\w+)</td><td>(.*?)</td><td>(.*?)</td></tr>", page)
    texts = [(c.status, escape(c.name), escape(c.message)) for c in [*checks, *preflight]]
    odd = [f"{said[:3]!r:.60}" for said, wanted in zip_longest(rows, texts, fillvalue=()) if said != wanted]
    measured = f"{len(odd)} of {len(texts)} lines of verdict and preflight are others, {some(odd)}"
    expect(not odd, measured, "the page of the run (experiments/page.py): its checks, or their causes")
    shown = " ".join(report.verdict_lines(checks).split())
    for check in (c for c in checks if c.status != PASS):
        cause = f" Likely cause: {check.cause}" * bool(check.cause)
        text = " ".join(f"{check.status} {check.name}: {check.measured}{cause}".split())
        expect(
            text in shown, f"{shown!r:.200} lacks {text!r:.80}", "the verdict's lines (experiments/report.py)"
        )
    again = " ".join(" ".join(report.failed_lines(checks)).split())
    fails = [f"FAIL {c.name}: {c.measured} Likely cause: {c.cause}" for c in checks if c.status == FAIL]
    expect(
        again == " ".join(fails),
        f"of {len(fails)} checks that fail {again.count('FAIL ')} are said once more at the end",
        "what fails, said once more at the end (failed_lines of experiments/report.py)",
    )


def _stand_in_is_named(history: History, settings: Settings) -> None:
    """Where the images are not CIFAR-10's, the first lines, the table and the pictures say so."""
    assert history.final
    for synthetic, whose in ((True, "the stand-in"), (False, "CIFAR-10")):
        data = dataclasses.replace(history.data, name="another set", synthetic=synthetic)
        shown = dataclasses.replace(history, data=data)
        for what, text, mark in (
            ("the first lines", report.first_lines(shown, settings, history.final.count), "NOT CIFAR-10"),
            ("the pictures' title", report.picture_title(shown, settings), "NOT CIFAR-10"),
            ("the table's head", report.table_header(data), data.name),
            ("the last line", report.run_line(shown, settings, []), "NOT CIFAR-10"),
        ):
            expect(
                (mark in " ".join(text.split())) == synthetic,
                f"{what} of {whose}: {mark!r} is {'missing' if synthetic else 'there'}",
                "the mark of the stand-in (experiments/report.py)",
            )
