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
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from experiments import report
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
    judge,
    layer_records,
    some,
)
from experiments.page import report_page
from experiments.preflight_pictures import ratio_names, small_history
from experiments.settings import PRECISIONS, Settings
from metrics import LayerCount
from src.channels import ChannelState
from utils_quantization import quantized_layers


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
    _compare_first_lines(history, subject.pipeline.settings)
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
    """What is noted of the data and of each quantizer before the first epoch."""
    history, data, model = subject.history, subject.dataset, subject.pipeline.model
    sizes = len(data.train_labels), len(data.test_labels)
    quantized = list(quantized_layers(model))
    others = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    due = {
        "data": DataRecord(data.name, data.source, data.synthetic, data.classes, *sizes),
        "quantized": quantized,
        "full_precision": [name for name in others if name not in quantized],
        "precision": PRECISIONS[subject.pipeline.settings.precision],
        "processes": subject.step.processes.count,
        "threads": subject.threads,
    }
    for name, value in due.items():
        noted = getattr(history, name)
        measured = f"{noted} is noted for {name}, the run has {value}"
        expect(noted == value, measured, "the record of the run's start (experiments/history.py)")
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
    line, last = report.run_line(history, settings, checks), history.epochs[-1]
    pattern = (
        r".*, epoch (\d+), seed (\d+), .*: (\S+) % accuracy, (\S+) % zeros, (\S+) % zero filters, "
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


def _compare_first_lines(history: History, settings: Settings) -> None:
    """The sizes of both sets; where rates, decays or the penalty are others, the flag in lines and titles."""
    assert history.final
    data = dataclasses.replace(history.data, train_images=4321, test_images=765)
    text = report.first_lines(dataclasses.replace(history, data=data), settings, history.final.count)
    found = re.search(r"(\S+) training and (\S+) test images", " ".join(text.split()))
    said = dict(zip(("training images", "test images"), found.groups(), strict=True)) if found else {}
    _expect_shown("the first lines", said, {"training images": 4321, "test images": 765})
    method = r"(.*_(lr|decay|warmup)|sparsity_.*|beta2|batch_size|batch_norm_batches|pace_steps)"
    for name in (f.name for f in dataclasses.fields(settings) if re.fullmatch(method, f.name)):
        changed: dict[str, Any] = {name: 7 if isinstance(getattr(settings, name), int) else 0.625}
        other = dataclasses.replace(settings, **changed)
        title = report.picture_title(history, other)
        expect(
            f"--{name.replace('_', '-')} " in title,
            f"of --{name.replace('_', '-')} {getattr(other, name)} the title {title!r} says nothing",
            "the settings that a run's lines and titles name (experiments/settings.py)",
        )


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
        r"Ceiling: (\S+)x structured, (\S+)x unstructured", " ".join(" ".join(lines).split())
    )
    shown = dict(zip(("structured", "unstructured"), ceilings.groups(), strict=True)) if ceilings else {}
    due = {"structured": final.structured_ceiling, "unstructured": final.unstructured_ceiling}
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
