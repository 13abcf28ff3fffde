"""The script from command to files: what it prints and writes, what each mistake says, how it stops."""

import fcntl
import os
import pty
import re
import runpy
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import PICTURES, RunFolder, names, tree
from programs import DEADLINE, environment, environment_at_start
from random_images import random_dataset

from experiments import cifar, data, debug_run, device, plots, report, training
from experiments.data import Dataset
from experiments.debug_run import main
from experiments.history import Check, History
from experiments.live import Stopped
from experiments.report import check_lines
from experiments.settings import Settings

PROOFS = ["compressed.codeq", "slim.pt2"]
SMALL = ["--data", "synthetic", "--limit-train", "256", "--limit-test", "128", "--threads", "1",
         "--preflight", "off"]  # fmt: skip
TWO_EPOCHS = [*SMALL, "--epochs", "2", "--batch-size", "64"]
BLOCKS = [f"layer{stage}.{i}" for stage in (1, 2, 3) for i in range(3)]
ROW = re.compile(r"^ *(\d+) \|" + r" *(-?[\d.]+) \|" * 5 + r" *([\d.]+)$")
COLUMNS = (
    "epoch",
    "loss",
    "accuracy",
    "unstructured_sparsity",
    "structured_sparsity",
    "learned_bits",
    "seconds",
)


def files_after(epochs: int, stopped: bool = False) -> list[str]:
    """What a run leaves; a network that was stopped in an epoch is not packed."""
    checkpoints = [f"checkpoint_{epoch:04d}.pt" for epoch in (epochs - 1, epochs) if epoch > 0]
    texts = ["history.json", "metrics.csv", "report.html"]
    return sorted([*PICTURES, *texts, *checkpoints, *([] if stopped else PROOFS)])


# Real runs, each in a process and a folder of its own. Those that need no watching go side by side.


def start(
    folder: Path, arguments: list[str], code: str | None = None, **streams: Any
) -> subprocess.Popen[Any]:
    folder.mkdir(parents=True, exist_ok=True)
    program = ["-c", code] if code else ["-m", "experiments.debug_run"]
    return subprocess.Popen([sys.executable, *program, *arguments], cwd=folder, env=environment(), **streams)


@dataclass
class Finished(RunFolder):
    """A run that has ended: its folder, its exit status and what it printed."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def rows(self) -> list[dict[str, float]]:
        found = [match for line in self.lines if (match := ROW.match(line))]
        return [dict(zip(COLUMNS, map(float, match.groups()), strict=True)) for match in found]


# The script, which makes no more of the stand-in than it uses, and times the networks once.
QUICK = """
import sys
from experiments import compressed, data
data.SYNTHETIC_TRAIN, data.SYNTHETIC_TEST, compressed.LATENCY_RUNS = 300, 150, 1
from experiments.debug_run import main
sys.exit(main())
"""
DIVERGING = [*SMALL, "--epochs", "3", "--batch-size", "256", "--weights-lr", "1e30"]
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The runs that need no watching, all at once: name -> (folder, process, its terminal)."""
    base = tmp_path_factory.mktemp("runs")
    terminal, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    running = {
        "log": (start(base / "log", TWO_EPOCHS, QUICK, **PIPES), None),
        "terminal": (
            start(base / "terminal", TWO_EPOCHS, QUICK, stdout=inside, stderr=subprocess.PIPE),
            terminal,
        ),
        "diverging": (start(base / "diverging", DIVERGING, QUICK, **PIPES), None),
    }
    os.close(inside)
    yield {name: (base / name, *rest) for name, rest in running.items()}
    for process, _ in running.values():
        process.kill()
    os.close(terminal)


def finished(started: dict[str, Any], name: str) -> Finished:
    folder, process, _ = started[name]
    out, err = process.communicate(timeout=DEADLINE)
    return Finished(folder, process.returncode, out, err)


@pytest.fixture(scope="module")
def log(started) -> Finished:
    return finished(started, "log")


@pytest.fixture(scope="module")
def diverging(started) -> Finished:
    return finished(started, "diverging")


@pytest.fixture(scope="module")
def terminal(started) -> Finished:
    folder, process, master = started["terminal"]
    written = b""
    try:
        while block := os.read(master, 1 << 16):
            written += block
    except OSError:  # how Linux says that the other end is closed
        pass
    _, err = process.communicate(timeout=DEADLINE)
    return Finished(folder, process.returncode, written.decode(), err.decode())


# The parent may ignore SIGINT, as background jobs of a shell do, and a child inherits that.
INTERRUPTIBLE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from experiments import data
data.SYNTHETIC_TRAIN, data.SYNTHETIC_TEST = 300, 150
from experiments.debug_run import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Finished:
    """Ctrl-C in the second epoch of a run whose verdict would fail: its bit logits cannot move."""
    folder = tmp_path_factory.mktemp("interrupted")
    arguments = [*SMALL, "--epochs", "50", "--batch-size", "32", "--bit-lr", "0"]
    process = start(folder, arguments, code=INTERRUPTIBLE, **PIPES)
    seen = []
    for line in process.stdout:
        seen.append(line)
        if ROW.match(line.rstrip("\n")):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=DEADLINE)
    return Finished(folder, process.returncode, "".join(seen) + out, err)


# What a run prints


def test_a_run_of_two_epochs_succeeds_without_a_word_on_stderr(log):
    assert log.err == ""
    failed = any(line.startswith("FAIL") for line in log.lines)
    assert log.status == (1 if failed else 0), log.out


def test_it_writes_the_pictures_the_history_the_checkpoints_and_the_two_networks_and_nothing_else(log):
    assert log.files == files_after(2)
    for picture in PICTURES:
        assert (log.output / picture).read_bytes().startswith(b"\x89PNG\r\n")
    assert names(log.folder) == ["debug_output"]


def test_it_first_says_what_runs(log):
    head = log.out.partition("\nEpoch |")[0]
    assert f"torch {torch.__version__.split('+')[0]}" in head and "numpy" in head and "python" in head
    assert re.search(r"^Device: +cpu, 1 threads", head, re.M) or "cuda" in head
    assert "seed 0" in head
    assert "256 training and 128 test images" in head
    assert "Quantized: 18 of 20 layers; not: conv1, linear" in head


def test_the_parts_come_in_the_order_of_the_plan(log):
    parts = ["Versions:", "Device:", "Data:", "Quantized:", "\nEpoch |", "\n    1 |", "\n    2 |",
             "\n--- Final Compression Metrics ---\n", "\nLayer ", "\n--- Verdict ---\n",
             "\nFiles in "]  # fmt: skip
    places = [log.out.find(part) for part in parts]
    assert -1 not in places and places == sorted(places)


def test_the_header_names_the_plans_columns_in_its_order_with_units(log):
    (header,) = [line for line in log.lines if line.startswith("Epoch |")]
    units = log.lines[log.lines.index(header) + 1]
    names = [cell.strip() for cell in header.partition("  [")[0].split("|")]
    assert names == ["Epoch", "Loss", "Acc", "Unstr", "Struct", "Bits", "Time"]
    assert [cell.strip() for cell in units.split("|")] == ["", "CE + pen", "%", "%", "%", "mean", "s"]
    assert header.index("|") == units.index("|")


def test_every_row_stands_below_its_header(log):
    (header,) = [line for line in log.lines if line.startswith("Epoch |")]
    bars = [i for i, c in enumerate(header) if c == "|"]
    rows = [line for line in log.lines if ROW.match(line)]
    assert len(rows) == 2
    assert all([i for i, c in enumerate(row) if c == "|"] == bars for row in rows)


def assert_rows_are_the_history(run: Finished) -> None:
    records = run.history["epochs"]
    assert (
        [row["epoch"] for row in run.rows]
        == [r["epoch"] for r in records]
        == list(range(1, len(records) + 1))
    )
    for row, r in zip(run.rows, records, strict=True):
        assert row["loss"] == pytest.approx(r["loss"], abs=5.1e-5)
        for share in ("accuracy", "unstructured_sparsity", "structured_sparsity"):
            assert row[share] == pytest.approx(100 * r[share], abs=5.1e-3)
        assert row["learned_bits"] == pytest.approx(r["learned_bits"], abs=5.1e-3)
        assert row["seconds"] == pytest.approx(r["seconds"], abs=0.051)


def test_the_tables_rows_are_the_historys_records(log):
    assert len(log.rows) == 2
    assert_rows_are_the_history(log)


def test_the_four_ratios_and_the_ceiling_are_the_historys(log):
    final = log.history["final"]
    text = log.out.partition("Final Compression Metrics")[2].partition("--- Verdict")[0]
    printed = dict(re.findall(r"^(.*?) compression: +([\d.]+)x$", text, re.M))
    assert list(printed) == ["Structured BOPs", "Unstructured BOPs", "Structured MACs", "Unstructured MACs"]
    keys = [
        "structured_bops_ratio",
        "unstructured_bops_ratio",
        "structured_mac_ratio",
        "unstructured_mac_ratio",
    ]
    for number, key in zip(printed.values(), keys, strict=True):
        assert float(number) == pytest.approx(final[key], abs=5.1e-3)
    assert f"Ceiling: {final['structured_ceiling']:.2f}x structured" in text
    # Stem and classifier stay: 443,008 of 40,551,040 MACs.
    assert final["unstructured_ceiling"] == pytest.approx(40_551_040 / 443_008, rel=1e-3)


def test_the_verdict_is_printed_as_the_history_has_it(log):
    printed = log.out.partition("--- Verdict ---\n")[2].partition("\n\n")[0].splitlines()
    checks = [Check(**c) for c in log.history["verdict"]]
    kept = printed.pop()  # of the file itself, which cannot have this line
    assert kept == "PASS  files hold the run: history.json, metrics.csv, report.html, 5 pictures"
    assert printed == [line for check in checks for line in check_lines(check)]
    assert {check.status for check in checks} <= {"PASS", "SKIP"} and len(checks) == 24


def test_at_the_end_stand_the_files_where_they_are_and_the_run_in_one_line(log):
    named = log.out[log.out.index("\nFiles in ") :]
    folder, names = named.strip().partition("\n\n")[0].removeprefix("Files in ").split(":", 1)
    files = [name.strip() for name in names.replace("\n", " ").split(",")]
    assert sorted(files) == [name for name in files_after(2) if not name.startswith("checkpoint")]
    assert all((log.folder / folder / name).is_file() for name in files)
    assert re.fullmatch(
        r"ResNet-20 on .* NOT CIFAR-10, preset debug, .*, seed 0, .*: .* checks", log.lines[-1]
    )
    assert all(len(line) <= 80 for line in log.lines[:-1])


def test_the_history_tells_where_the_run_comes_from(log):
    origin = log.history["origin"]
    assert datetime.fromisoformat(origin["date"]).utcoffset() == timedelta(0)
    assert "--limit-train" in origin["command"]
    assert origin["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", origin["commit"])


def test_the_history_tells_the_whole_run(log):
    history = log.history
    assert (
        history["settings"]
        == Settings(
            data="synthetic",
            limit_train=256,
            limit_test=128,
            threads=1,
            preflight="off",
            epochs=2,
            batch_size=64,
        ).to_json()
    )
    assert set(history["versions"]) == {"python", "torch", "numpy", "matplotlib"}
    assert history["data"]["train_images"] == 256 and history["data"]["test_images"] == 128
    assert history["stopped"] is None and history["resumed"] == []
    assert history["quantized"] == [f"{b}.{c}" for b in BLOCKS for c in ("conv1", "conv2")]
    assert history["full_precision"] == ["conv1", "linear"]
    assert history["precision"] == "float32" and history["threads"] == 1
    layers = history["final"]["layers"]
    assert len(layers) == 20 and sum(x["dense_macs"] for x in layers) == 40_551_040
    for key, total in history["final"]["totals"].items():
        assert key.endswith("bops") or total == sum(x[key] for x in layers)
    assert history["final"]["totals"]["dense_bops"] == 41_524_264_960


def test_the_history_has_both_logits_of_every_quantized_layer_at_the_start_and_in_each_epoch(log):
    start = log.history["start"]
    assert list(start) == log.history["quantized"]
    assert all(layer["parameters"] == {"logit_bit": 3.0, "logit_dz": 3.0} for layer in start.values())
    for record in log.history["epochs"]:
        assert list(record["layers"]) == log.history["quantized"]
        for numbers in record["layers"].values():
            assert 3.0 not in numbers["parameters"].values() and all(numbers["gradients"].values())
            assert list(numbers["parameters"]) == list(numbers["gradients"]) == ["logit_bit", "logit_dz"]
        weights = sum(numbers["weights"] for numbers in record["layers"].values())
        zero = sum(numbers["zero_weights"] for numbers in record["layers"].values())
        assert record["unstructured_sparsity"] == pytest.approx(zero / weights)
        assert record["learned_bits"] == pytest.approx(
            sum(numbers["learned_bits"] for numbers in record["layers"].values()) / 18
        )
        assert record["coefficient"] == 0 and record["loss"] == pytest.approx(record["cross_entropy"])


# The stand-in


def test_nobody_can_mistake_the_stand_in_for_cifar10(log):
    assert log.lines[0].startswith("*** NOT CIFAR-10")
    assert "synthetic stand-in" in log.lines[0]
    assert "\n[synthetic stand-in]\nEpoch |" in log.out
    told = log.history["data"]
    assert told["synthetic"] is True and told["name"] == "synthetic stand-in"


# Twice the same


def without_seconds(lines: list[str]) -> list[str]:
    lines = [re.sub(r"\| +[\d.]+$", "| s", line) if ROW.match(line) else line for line in lines]
    lines = [re.sub("about .* for", "about s for", line) for line in lines]
    return [line.partition(" ms (")[0][:30] if " ms (" in line else line for line in lines]


def screen(written: str) -> list[str]:
    """The lines that stay on a terminal: what follows the last clearing of each."""
    return [line.replace("\r", "").rpartition("\x1b[K")[2] for line in written.split("\n")[:-1]]


def test_the_same_settings_give_the_same_output_digit_for_digit_save_the_seconds(log, terminal):
    assert without_seconds(screen(terminal.out)) == without_seconds(log.lines)
    assert terminal.status == log.status and terminal.err == ""


def test_the_same_settings_give_the_same_history_and_pictures_save_the_seconds(log, terminal):
    histories = [log.history, terminal.history]
    for history in histories:
        for record in history["epochs"]:
            assert record.pop("seconds") > 0
        assert history["compressed"].pop("latency_seconds") and history.pop("origin")
    assert histories[0] == histories[1]
    trees = [tree(run.output) for run in (log, terminal)]
    assert [trees[0][picture] for picture in PICTURES] == [trees[1][picture] for picture in PICTURES]


# The live line


def test_a_log_has_no_live_line_and_no_control_character(log):
    assert "\r" not in log.out and "\x1b" not in log.out and "\b" not in log.out
    assert "steps/s" not in log.out


def test_a_terminal_has_one_live_line_with_step_speed_and_time_left(terminal):
    shown = re.findall(r"\r\x1b\[K([^\r\n]+)", terminal.out)
    live = [text for text in shown if text.startswith("epoch")]
    pattern = re.compile(r"^epoch [12] of 2: (step \d/4, [\d.]+ steps/s, \d+ s left|testing and counting)$")
    assert live and all(pattern.match(text) for text in live), live
    for epoch in (1, 2):
        assert any(text.startswith(f"epoch {epoch} of 2: step 4/4") for text in live), (
            "the last step is always shown"
        )


# Ctrl-C


@pytest.mark.slow
def test_ctrl_c_ends_with_the_files_of_the_finished_epochs_and_status_130(interrupted):
    assert interrupted.err == ""
    finished = len(interrupted.rows)
    assert interrupted.files == files_after(finished, stopped=True)
    assert 1 <= finished < 50
    assert_rows_are_the_history(interrupted)
    said = f"stopped by Ctrl-C in epoch {finished + 1}; --resume goes on from the last checkpoint"
    assert said in interrupted.lines
    assert interrupted.history["stopped"] == f"stopped by Ctrl-C in epoch {finished + 1}"
    assert "--- Verdict ---" in interrupted.lines and "final" in interrupted.history


@pytest.mark.slow
def test_ctrl_c_is_status_130_whatever_the_verdict_says(interrupted):
    assert any(line.startswith("FAIL  bit parameters learn") for line in interrupted.lines)
    assert interrupted.status == 130


# Numbers that are not finite


def test_a_loss_that_is_not_finite_stops_the_run_with_epoch_step_and_layer_and_status_1(diverging):
    (line,) = [line for line in diverging.lines if line.startswith("stopped")]
    pattern = r"stopped in epoch 2: the loss is not finite at step 1; .*: (the output of|parameter) \w+"
    assert re.match(pattern, line), line
    assert diverging.status == 1
    assert diverging.err == ""
    assert diverging.history["stopped"] == line.removesuffix(
        "; give a lower --weights-lr or --sparsity-weight"
    )


def test_a_loss_that_is_not_finite_leaves_the_files_of_the_finished_epochs(diverging):
    assert diverging.files == files_after(1, stopped=True)
    assert len(diverging.rows) == 1
    assert_rows_are_the_history(diverging)


def test_a_loss_that_is_not_finite_fails_the_verdicts_line_about_it(diverging):
    once, again = [line for line in diverging.lines if "loss is finite" in line]
    assert once.startswith("FAIL") and again == once


# Runs inside this process, on a handful of images: quick, and with faults planted where no flag reaches.


@pytest.fixture
def here(quick_end, monkeypatch, tmp_path, capsys):
    """Runs `main` in this process in a folder of its own, on a handful of images unless `--data` is given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(device, "keep_freed_memory", lambda keep=True: True)
    stand_in, cifar = random_dataset(16, name="synthetic stand-in"), random_dataset(16, name="CIFAR-10")
    monkeypatch.setattr(data, "synthetic_dataset", lambda source: replace(stand_in, source=source))
    threads = torch.get_num_threads()

    def run(*arguments: str) -> Finished:
        if "--data" not in arguments:
            monkeypatch.setattr(debug_run, "load_dataset", lambda *_: replace(cifar, synthetic=False))
        always = ["--device", "cpu"] if "--device" not in arguments else []
        try:
            status = main(["--threads", "1", "--preflight", "off", *always, *arguments])
        except SystemExit as stopped:
            status = stopped.code
        out, err = capsys.readouterr()
        return Finished(tmp_path, status, out, err)

    yield run
    torch.set_num_threads(threads)


def in_epoch(
    monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[torch.nn.Module], None], before: bool
) -> None:
    """Have `act` done to the model before the only step of an epoch (from 1), or as the end of that step."""
    real = training.train_epoch

    def train_epoch(step: Any, batches: Any, epoch: int, *rest: Any) -> Any:
        if epoch != number - 1:
            return real(step, batches, epoch, *rest)
        if before:
            act(step.model)
            return real(step, batches, epoch, *rest)
        assert len(batches) == 1
        move = step.optimizer.step
        with monkeypatch.context() as patch:
            patch.setattr(step.optimizer, "step", lambda: (move(), act(step.model)))
            return real(step, batches, epoch, *rest)

    monkeypatch.setattr(debug_run, "train_epoch", train_epoch)


def interrupt(model: torch.nn.Module) -> None:
    raise Stopped(signal.SIGINT)


def test_a_run_on_cifar10_bears_no_mark_of_the_stand_in(here):
    run = here("--epochs", "1")
    assert run.lines[0].startswith("Versions:")
    assert "stand-in" not in run.out and "NOT CIFAR-10" not in run.out
    assert run.history["data"]["synthetic"] is False
    assert run.files == files_after(1)


def test_the_plan_preset_quantizes_the_nine_conv2_and_names_the_eleven_others(here):
    run = here("--preset", "plan", "--epochs", "1")
    others = ["conv1", *[f"{block}.conv1" for block in BLOCKS], "linear"]
    assert f"Quantized: 9 of 20 layers; not: {', '.join(others)}" in " ".join(run.out.split())
    assert run.history["quantized"] == [f"{block}.conv2" for block in BLOCKS]
    assert run.history["full_precision"] == others
    assert "the 9 quantized layers cost nothing" in " ".join(run.out.split())


def test_patterns_that_exclude_every_layer_give_a_plain_network_and_fail_no_line_about_quantizers(here):
    run = here("--exclude-layers", ".", "--epochs", "2")
    assert any(line.startswith("Quantized: 0 of 20 layers") for line in run.lines)
    assert all(row["learned_bits"] == 32 and row["unstructured_sparsity"] == 0 for row in run.rows)
    assert [c["name"] for c in run.history["verdict"] if c["status"] == "FAIL"] == []
    assert run.status == 0 and run.files == files_after(2)


def test_ctrl_c_in_the_first_epoch_writes_the_history_alone_and_gives_130(here, monkeypatch):
    in_epoch(monkeypatch, 1, interrupt, before=True)
    run = here("--epochs", "2")
    assert run.status == 130 and run.err == ""
    assert run.files == ["history.json"]
    assert run.history["epochs"] == [] and "Ctrl-C in epoch 1" in run.history["stopped"]


def test_ctrl_c_while_the_data_is_being_fetched_gives_130_and_no_traceback(here, monkeypatch):
    def fetch(*_: object) -> Dataset:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(cifar, "_download", fetch)
    try:
        run = here("--data", "cifar10")
    except KeyboardInterrupt:
        pytest.fail("main() lets Ctrl-C through as a traceback")
    assert run.status == 130 and run.err == ""
    assert run.lines[-1] == "stopped by Ctrl-C; nothing was trained"


def poison(model: torch.nn.Module) -> None:
    with torch.no_grad():
        model.layer2[1].conv1.parametrizations.weight.original[0, 0, 0, 0] = float("nan")


def blind(model: torch.nn.Module) -> None:
    with torch.no_grad():
        model.layer2[1].conv1.parametrizations.weight[0].quantizer.logit_bit.fill_(float("nan"))


@pytest.mark.parametrize("harm", [poison, blind], ids=["a weight", "a logit"])
@pytest.mark.parametrize("before", [True, False], ids=["before a step", "in the last step"])
def test_parameters_that_stop_being_finite_stop_the_run_with_its_files_whichever_step_it_was(
    here, monkeypatch, harm, before
):
    in_epoch(monkeypatch, 2, harm, before)
    run = here("--epochs", "3")
    assert run.err == ""
    assert run.status == 1
    assert "stopped in epoch" in run.out and "layer2.1.conv1" in run.history["stopped"]
    finished = len(run.history["epochs"])
    assert finished >= 1 and run.files == files_after(finished, stopped=True)


@pytest.mark.parametrize("number", ["1e39", "1e300"])
def test_a_coefficient_beyond_float32_is_a_loss_that_is_not_finite_or_a_sentence(here, number):
    run = here("--sparsity-weight", number, "--sparsity-delay", "0", "--sparsity-ramp", "0", "--epochs", "1")
    assert (run.status == 1 and "step 1" in run.out) or (run.status == 2 and "--sparsity-weight" in run.err)


@pytest.mark.slow
def test_a_warning_is_said_once_under_the_row_of_its_epoch(here):
    run = here("--epochs", "3", "--bit-lr", "0")
    warned = [i for i, line in enumerate(run.lines) if line.lstrip().startswith("!") and "not moved" in line]
    assert len(warned) == 1
    assert ROW.match(run.lines[warned[0] - 1]).group(1) == "1"
    assert run.status == 1  # and the verdict fails


# The pictures' titles


@pytest.mark.parametrize("synthetic", [True, False])
def test_every_title_says_what_the_run_was_on_and_marks_the_stand_in(tmp_path, log, synthetic):
    history = History.from_json(log.history)
    name = "synthetic stand-in" if synthetic else "CIFAR-10"
    history.data = replace(history.data, name=name, synthetic=synthetic)
    settings = Settings(output_dir=tmp_path, preset="plan")
    figures = plots.figures(history, report.picture_title(history, settings))
    drawn = {name: " ".join(axes.get_title() for axes in f.axes) for name, f in figures.items()}
    assert sorted(drawn) == PICTURES
    for title in drawn.values():
        assert "ResNet-20" in title and "preset plan" in title and "epoch 2" in title
        assert ("NOT CIFAR-10" in title) == ("SYNTHETIC STAND-IN" in title) == synthetic
        assert synthetic or "on CIFAR-10" in title


# No CIFAR-10 to be had


def test_auto_without_a_source_goes_on_with_the_stand_in_and_says_so_loudly(here, monkeypatch):
    def refuse(url: str, *_: object) -> None:
        raise cifar._SourceFailed("Connection refused")

    monkeypatch.setattr(cifar, "_fetch", refuse)
    run = here("--data", "auto", "--epochs", "1")
    head = run.out.partition("Versions:")[0]
    assert "NO CIFAR-10" in head and "Connection refused" in head
    assert "*** NOT CIFAR-10" in head and "synthetic stand-in" in head
    assert "\n[synthetic stand-in]\nEpoch |" in run.out
    assert run.history["data"]["synthetic"] is True
    assert "Connection refused" in run.history["data"]["source"]


# Bad input. The table of all cases is in test_bad_input.py.


def test_from_the_command_line_bad_input_is_one_line_on_stderr_and_status_2(tmp_path):
    process = start(tmp_path, ["--exclude-layers", "conv9", "--device", "cpu"], **PIPES)
    out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out) == (2, "")
    assert err.count("\n") == 1 and "'conv9'" in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_output_folder_that_vanishes_during_the_run_is_one_sentence_too(here, monkeypatch, tmp_path):
    def replace_folder(model: torch.nn.Module) -> None:
        (tmp_path / "debug_output").rmdir()
        (tmp_path / "debug_output").write_text("a file in its place")

    in_epoch(monkeypatch, 1, replace_folder, before=True)
    run = here("--epochs", "1")
    assert run.status == 2
    assert [line for line in run.lines if "no checkpoint of epoch 1" in line]
    assert "--- Final Compression Metrics ---" in run.lines  # what cannot be written is at least said
    assert run.err.startswith("error: ") and run.err.count("\n") == 1 and "debug_output" in run.err


# The user's plan

PLAN_SCRIPT = """
import torch
import torch.nn.functional as F

from experiments.evaluator import Evaluator
from experiments.schedules import cosine_anneal, linear_warmup
from experiments.sparsity import coupled_group_lasso
from resnet import resnet20
from src.quantizer import DeadZoneLDZCompander
from utils_quantization import attach_weight_quantizers, toggle_quantization

torch.manual_seed(0)
EPOCHS = 3
model = resnet20()
assert sum(p.numel() for p in model.parameters()) == 269_722
evaluator = Evaluator(model, input_size=(3, 32, 32))

attach_weight_quantizers(
    model=model,
    exclude_layers=["conv1", "bn", "linear"],
    quantizer=DeadZoneLDZCompander,
    quantizer_kwargs={
        "fixed_bit_val": 4,
        "max_bits": 8,
        "init_bit_logit": 3.0,
        "init_deadzone_logit": 3.0,
        "learnable_bit": True,
        "learnable_deadzone": True,
    },
    enabled=False,
)
toggle_quantization(model, enabled=True)

weights, bits, deadzones = [], [], []
for name, parameter in model.named_parameters():
    kind = bits if "logit_bit" in name else deadzones if "logit_dz" in name else weights
    kind.append(parameter)
optimizer = torch.optim.AdamW(
    [
        {"params": weights, "lr": 1e-3, "weight_decay": 0.0},
        {"params": bits, "lr": 1e-3, "weight_decay": 0.01},
        {"params": deadzones, "lr": 1e-3, "weight_decay": 0.01},
    ]
)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)
sparsity_loss = coupled_group_lasso(model)
sparsity_schedule = linear_warmup(delay=1, ramp=1)
images, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
before = [p.detach().clone() for p in model.parameters()]
print(f"{'Epoch':>5} | {'Loss':>8} | {'Acc':>6} | {'Unstr':>6} | {'Struct':>6} | {'Bits':>5}")
coefficients = []
for epoch in range(EPOCHS):
    model.train()
    coefficient = sparsity_schedule(epoch, EPOCHS)
    coefficients.append(coefficient)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels) + coefficient * sparsity_loss(model)
    loss.backward()
    optimizer.step()
    scheduler.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(images).argmax(1) == labels).float().mean().item()
    layers = [m for m in model.modules() if hasattr(m, "parametrizations")]
    widths = [m.parametrizations.weight[0].quantizer.get_bitwidth().item() for m in layers]
    zero = sum((m.weight == 0).sum().item() for m in layers) / sum(m.weight.numel() for m in layers)
    dead = sum((m.weight == 0).flatten(1).all(1).sum().item() for m in layers)
    print(f"{epoch + 1:5d} | {loss.item():8.4f} | {accuracy:6.2%} | {zero:6.2%} | {dead:6d} | "
          f"{sum(widths) / len(widths):5.2f}")
moved = sum(not torch.equal(p, q) for p, q in zip(model.parameters(), before))

results = evaluator.evaluate(model)
print("--- Final Compression Metrics ---")
print(f"Structured BOPs:   {results.structured_bops_ratio:.2f}x")
print(f"Unstructured BOPs: {results.unstructured_bops_ratio:.2f}x")
print(f"Structured MACs:   {results.structured_mac_ratio:.2f}x")
print(f"Unstructured MACs: {results.unstructured_mac_ratio:.2f}x")
figure = evaluator.plot_channel_liveness(model)
figure.savefig("channel_liveness.png")
"""


def test_the_users_own_script_runs_on_the_fixed_names_unchanged(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.py").write_text(PLAN_SCRIPT)
    left = runpy.run_path("plan.py")
    out = capsys.readouterr().out
    assert left["coefficients"] == [0, 0, 1]
    assert len(left["layers"]) == 9 and left["widths"] == [8.0] * 9
    assert left["moved"] == len(list(left["model"].parameters()))
    assert out.count(" | ") == 5 * 4 and out.count("x\n") == 4
    results = left["results"]
    # 9 of 20 layers at 8 instead of 32 bits: 21,233,664 of 40,551,040 MACs.
    at_8_bits = 40_551_040 / (40_551_040 - 21_233_664 * 3 / 4)
    assert results.structured_bops_ratio == pytest.approx(at_8_bits, rel=1e-3)
    assert 1 <= results.structured_mac_ratio <= results.unstructured_mac_ratio < 1.1
    assert (tmp_path / "channel_liveness.png").read_bytes().startswith(b"\x89PNG")


# Started otherwise


# Python's own start of a file, four times in one process, so that torch is imported once.
AS_FILES = """
import runpy, sys
for path in sys.argv[1:]:
    for name in [n for n in sys.modules if n.partition(".")[0] in ("experiments", "src")]:
        del sys.modules[name]
    sys.path[0], sys.argv = path.rpartition("/")[0], [path, "--help"]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        assert not end.code
"""


COMMANDS = ("debug_run", "sweep", "verify", "benchmark")


@pytest.mark.slow
def test_every_command_runs_as_a_file_too_from_any_folder(tmp_path):
    paths = [Path(debug_run.__file__).with_name(f"{name}.py").as_posix() for name in COMMANDS]
    command = [sys.executable, "-c", AS_FILES, *paths]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("usage") == len(COMMANDS)


# Each command's help, on a full disk, in one process.
HELP_ON_A_FULL_DISK = """
import os, runpy, sys
for name in sys.argv[1:]:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    sys.argv = [name, "--help"]
    try:
        runpy.run_module(f"experiments.{name}", run_name="__main__")
    except SystemExit as end:
        assert end.code == 2, name
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_help_that_cannot_be_written_is_told_by_status_2(tmp_path):
    command = [sys.executable, "-c", HELP_ON_A_FULL_DISK, *COMMANDS]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=DEADLINE
    )
    said = "error: standard output takes no more (No space left on device)\n"
    assert (done.returncode, done.stderr) == (0, len(COMMANDS) * said)


# Ctrl-C as soon as torch is looked for.
CTRL_C_AT_IMPORT = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_while_a_command_imports_ends_it_without_a_word(tmp_path, name):
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}"],
        env=environment_at_start(CTRL_C_AT_IMPORT, tmp_path / "start"),
        capture_output=True, text=True, timeout=DEADLINE,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


# The benchmark as a file, whose first child only looks for the command that it was to be.
FIRST_CHILD = """
import runpy, subprocess, sys
Popen = subprocess.Popen

class First(Popen):
    def __init__(self, command, *rest, **how):
        if "-m" in command:  # what torch starts is none of its children
            find = f"import importlib.util, sys; sys.exit(not importlib.util.find_spec({command[2]!r}))"
            sys.exit(Popen([command[0], "-c", find], **how).wait())
        super().__init__(command, *rest, **how)

subprocess.Popen = First
sys.path[0], sys.argv = sys.argv[1].rpartition("/")[0], sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_the_benchmark_as_a_file_finds_the_commands_that_it_starts_from_any_folder(tmp_path):
    path = Path(debug_run.__file__).with_name("benchmark.py").as_posix()
    alone = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", FIRST_CHILD, path]
    done = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stderr) == (0, "")
