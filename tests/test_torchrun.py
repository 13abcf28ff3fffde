"""Whole runs as torchrun starts them: each in a folder of its own, two at a time."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from folders import PICTURES, RunFolder
from programs import DEADLINE, environment, wait_until

from experiments.checkpoint import load_checkpoint
from experiments.history import EpochRecord

pytestmark = pytest.mark.slow

SMALL = ["--preflight", "off",
         "--data", "synthetic", "--limit-train", "129", "--limit-test", "31", "--batch-size", "65",
         "--threads", "1", "--sparsity-delay", "0", "--sparsity-ramp", "1"]  # fmt: skip
TWO_EPOCHS, THREE_EPOCHS = [*SMALL, "--epochs", "2"], [*SMALL, "--epochs", "3"]
ROW = re.compile(r"^ +(\d+) \|" + r" *[\d.]+ \|" * 5 + r" *[\d.]+$", re.MULTILINE)
STOPPED_FILES = [*PICTURES, "history.json", "metrics.csv", "report.html"]
FILES = [*STOPPED_FILES, "checkpoint_0001.pt", "checkpoint_0002.pt", "compressed.codeq", "slim.pt2"]

# torchrun, but for a limit of its own: 30 seconds after a worker is lost it kills the others, which may need
# longer for their last files on a machine that is busy with other work.
TORCHRUN = f"""
from torch.distributed.elastic.multiprocessing.api import PContext
from torch.distributed.run import main
close = PContext.close
PContext.close = lambda self, death_sig=None, timeout=None: close(self, death_sig, {DEADLINE})
main()
"""

# The script, in which rank 1 waits for good at the start of its second epoch. Rank 0 then waits for rank 1 in
# a collective, so that a test can end the run there, however late it looks at it. Of the checks before it
# trains, where it is to make them, it makes that of the ranks alone: the others take seconds.
RANK_1_WAITS = """
import os, signal, sys
from experiments import data, preflight, training
data.SYNTHETIC_TRAIN, data.SYNTHETIC_TEST = 200, 100
preflight.CHECKS = tuple((name, check, ()) for name, check, _ in preflight.CHECKS if name == "ranks")
train_epoch, calls = training.train_epoch, []
def waiting(*arguments, **named):
    calls.append(arguments)
    while len(calls) == 2 and os.environ["RANK"] == "1":
        signal.pause()
    return train_epoch(*arguments, **named)
training.train_epoch = waiting
from experiments.debug_run import main
sys.exit(main())
"""


# The script, which makes no more of the stand-in than it uses.
QUICK = """
import sys
from experiments import compressed, data
data.SYNTHETIC_TRAIN, data.SYNTHETIC_TEST, compressed.LATENCY_RUNS = 200, 100, 1
from experiments.debug_run import main
sys.exit(main())
"""

# The same, of which only the epochs matter: its end takes as long as all else.
ENDS_QUICKLY = """
import sys
from experiments import compressed, data, plots
data.SYNTHETIC_TRAIN, data.SYNTHETIC_TEST = 200, 100
compressed.exported, plots.rendered = lambda *_: b"an exported network", lambda *_: b"a picture"
compressed.measure_latency = lambda *_: {}
from experiments.debug_run import main
sys.exit(main())
"""


class LaunchedRun(RunFolder):
    """A run of the script by `count` processes in `folder`, and what they printed so far."""

    def __init__(self, folder: Path, count: int, *arguments: str, code: str = "") -> None:
        super().__init__(folder)
        folder.mkdir(parents=True, exist_ok=True)
        start = len(list(folder.glob("out-*")))  # A resumed run has a folder that an earlier one printed to.
        self.printed = {name: folder / f"{name}-{start}" for name in ("out", "err")}
        script = ["-m", "experiments.debug_run"]
        if code:
            script = [*(["--no-python", sys.executable] if count > 1 else []), "-c", code]
        launcher = ["-c", TORCHRUN, f"--nproc-per-node={count}"] if count > 1 else []
        # This variable marks every process of the run, also one whose parent is gone.
        mark = {"TEST_RUN": str(folder)}
        with self.printed["out"].open("wb") as out, self.printed["err"].open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, *script, *arguments],
                cwd=folder, env=environment() | mark, stdout=out, stderr=err, start_new_session=True,
            )  # fmt: skip

    def wait_for_row(self, epoch: int) -> None:
        def printed() -> bool:
            assert self.process.poll() is None, f"it ended early:\n{self.out}\n{self.err}"
            return epoch in self.rows

        wait_until(printed, f"row {epoch} of the table")

    def worker(self, rank: int) -> int:
        (pid,) = (pid for pid, env in marked(self.folder) if f"RANK={rank}".encode() in env)
        return pid

    def end(self) -> "LaunchedRun":
        self.status = self.process.wait(DEADLINE)
        return self

    @property
    def out(self) -> str:
        return self.printed["out"].read_text()

    @property
    def err(self) -> str:
        return self.printed["err"].read_text()

    @property
    def rows(self) -> list[int]:
        return [int(epoch) for epoch in ROW.findall(self.out)]

    def epoch(self, number: int) -> EpochRecord:
        return load_checkpoint(self.output / f"checkpoint_{number:04d}.pt").history.epochs[-1]


def marked(folder: Path) -> list[tuple[int, list[bytes]]]:
    """The processes of the runs in `folder`, each with its environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            variables = path.read_bytes().split(b"\0")
            if f"TEST_RUN={folder}".encode() in variables:
                found.append((int(path.parent.name), variables))
    return found


def train_by_one(base: Path) -> LaunchedRun:
    return LaunchedRun(base / "alone", 1, *TWO_EPOCHS, code=ENDS_QUICKLY).end()


def train_by_two(base: Path) -> LaunchedRun:
    return LaunchedRun(base / "two", 2, *TWO_EPOCHS, code=QUICK).end()


def kill_one_and_resume_by_one(base: Path) -> tuple[LaunchedRun, list[str], LaunchedRun]:
    """Kill a worker in the second epoch, list the files, and let one process finish the run."""
    killed = LaunchedRun(base / "killed", 2, *TWO_EPOCHS, code=RANK_1_WAITS)
    killed.wait_for_row(1)
    os.kill(killed.worker(1), signal.SIGKILL)
    files = killed.end().files
    return killed, files, LaunchedRun(base / "killed", 1, *TWO_EPOCHS, "--resume", code=ENDS_QUICKLY).end()


def resume_by_two_and_terminate(base: Path, alone: Future[LaunchedRun]) -> LaunchedRun:
    """Let two processes go on after the first epoch of one, and terminate torchrun in the third epoch."""
    checkpoint = alone.result().output / "checkpoint_0001.pt"
    folder = base / "resumed"
    (folder / "debug_output").mkdir(parents=True)
    shutil.copy(checkpoint, folder / "debug_output")
    run = LaunchedRun(folder, 2, *THREE_EPOCHS, "--resume", "--preflight", "stop", code=RANK_1_WAITS)
    run.wait_for_row(2)
    os.kill(run.process.pid, signal.SIGTERM)
    return run.end()


def refuse(base: Path) -> LaunchedRun:
    """What rank 0 alone finds is tested for settings; this is a mistake that each rank finds."""
    return LaunchedRun(base / "refused", 2, *SMALL, "--batch-size", "1").end()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[dict[str, Future[Any]]]:
    base = tmp_path_factory.mktemp("runs")
    with ThreadPoolExecutor(2) as pool:
        alone = pool.submit(train_by_one, base)
        yield {
            "alone": alone,
            "two": pool.submit(train_by_two, base),
            "resumed": pool.submit(resume_by_two_and_terminate, base, alone),
            "killed": pool.submit(kill_one_and_resume_by_one, base),
            "refused": pool.submit(refuse, base),
        }
        pool.shutdown(wait=False, cancel_futures=True)
        for folder in base.iterdir():
            for pid, _ in marked(folder):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def assert_none_left(run: LaunchedRun) -> None:
    wait_until(lambda: not marked(run.folder), "the end of the run's processes")


def test_two_processes_print_one_table_and_write_one_set_of_files(runs):
    run = runs["two"].result()
    assert run.rows == [1, 2]
    for once in (
        "Versions: ",
        "Epoch |",
        "--- Final Compression Metrics ---",
        "--- Verdict ---",
        "Files in ",
    ):
        assert run.out.count(once) == 1
    assert "error" not in run.out
    assert run.files == sorted(FILES)
    assert run.status in (0, 1)  # After so few steps the verdict may fail.
    assert_none_left(run)


def test_the_first_lines_and_the_history_say_how_many_processes_ran(runs):
    run = runs["two"].result()
    assert re.search(r"^Device: .*, 2 processes, ", run.out, re.MULTILINE)
    assert run.history["processes"] == 2
    assert run.history["device"] == "cpu, 1 threads, 2 processes"
    assert "processes" not in runs["alone"].result().out


def test_the_proofs_of_two_processes_hold_on_the_whole_test_set(runs):
    out = runs["two"].result().out
    assert "on 31 test images" in out
    for check in ("smaller network gives the same logits", "packed file gives the same logits"):
        assert f"PASS  {check}" in out


def test_the_first_epoch_of_two_processes_is_near_that_of_one(runs):
    two, alone = runs["two"].result().history["epochs"][0], runs["alone"].result().epoch(1)
    assert two["loss"] == pytest.approx(alone.loss, rel=0.02)
    assert two["penalty"] == pytest.approx(alone.penalty, rel=0.02)
    assert two["unstructured_sparsity"] == pytest.approx(alone.unstructured_sparsity, abs=0.002)


def test_a_killed_worker_ends_the_run_with_a_sentence_about_it(runs):
    killed, *_ = runs["killed"].result()
    assert killed.status != 0
    assert killed.rows == [1]
    assert "gone" in killed.out or "SIGTERM" in killed.out
    assert "SIGKILL" in killed.err
    assert_none_left(killed)


def test_a_killed_worker_costs_none_of_the_finished_epochs_files(runs):
    _, files, _ = runs["killed"].result()
    assert files == sorted([*STOPPED_FILES, "checkpoint_0001.pt"])


def test_one_process_finishes_what_two_began(runs):
    *_, resumed = runs["killed"].result()
    assert resumed.rows == [1, 2]
    (went_on,) = resumed.history["resumed"]
    assert went_on["after_epoch"] == 1
    assert went_on["differences"] == [
        "device cpu, 1 threads, 2 processes before, cpu, 1 threads now: the last digits may differ"
    ]
    assert resumed.history["stopped"] is None
    assert resumed.files == sorted(FILES)
    # The undisturbed run of two has the same first epoch to the bit, and nearly the same second one.
    two = runs["two"].result()
    assert resumed.epoch(1).loss == two.epoch(1).loss
    assert resumed.epoch(2).penalty == pytest.approx(two.epoch(2).penalty, rel=0.02)


def test_two_processes_resume_what_one_began(runs):
    resumed, alone = runs["resumed"].result(), runs["alone"].result()
    assert resumed.rows == [1, 2]
    same = ("loss", "accuracy", "penalty", "unstructured_sparsity", "seconds")
    first = resumed.history["epochs"][0]
    assert [first[key] for key in same] == [getattr(alone.epoch(1), key) for key in same]
    assert "device cpu, 1 threads before, cpu, 1 threads, 2 processes now" in " ".join(resumed.out.split())
    second, like = resumed.history["epochs"][1], runs["two"].result().epoch(2)
    assert second["penalty"] == pytest.approx(like.penalty, rel=0.05)


def test_two_processes_that_resume_still_agree_with_one(runs):
    (check,) = runs["resumed"].result().history["preflight"]
    assert (check["status"], check["name"]) == ("PASS", "ranks") and check["message"].startswith("2 ranks")


def test_sigterm_to_the_launcher_still_writes_the_finished_epochs_files(runs):
    run = runs["resumed"].result()
    assert run.status != 0
    assert run.out.count("stopped by SIGTERM in epoch 3; ") == 1
    assert run.history["stopped"] == "stopped by SIGTERM in epoch 3"
    assert [record["epoch"] for record in run.history["epochs"]] == [1, 2]
    assert run.files == sorted([*STOPPED_FILES, "checkpoint_0001.pt", "checkpoint_0002.pt"])
    assert_none_left(run)


def test_bad_input_is_refused_in_one_sentence_and_once(runs):
    run = runs["refused"].result()
    assert run.status != 0
    assert run.out == ""
    said = "error: --batch-size is 1, which 2 processes cannot share; give 2 or more"
    assert [line for line in run.err.splitlines() if line.startswith("error: ")] == [said]
    assert "/experiments/" not in run.err  # A traceback would name a file of the program.
    assert_none_left(run)
