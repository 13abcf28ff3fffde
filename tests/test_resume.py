"""Runs that are stopped or killed, or whose disk fills up, end once resumed as an undisturbed run does.

    KILLS=50 python -m pytest -m slow tests/test_resume.py

kills runs 50 times at random moments; without KILLS it is 3 times.
"""

import contextlib
import copy
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from folders import PICTURES, RunFolder, tree
from programs import DEADLINE, ROOT, environment, environment_at_start, wait_until
from same import assert_same

from experiments.checkpoint import checkpoint_path, load_checkpoint

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("KILLS", "3"))
TINY = ["--preflight", "off",
        "--data", "synthetic", "--limit-train", "256", "--limit-test", "128", "--threads", "1",
        "--epochs", "3", "--batch-size", "64", "--sparsity-delay", "1", "--sparsity-ramp", "1"]  # fmt: skip
ONE_STEP = [*TINY, "--limit-train", "64", "--limit-test", "16"]  # One step an epoch.
ROW = re.compile(r"^ *\d+ \|")
RESULTS = sorted([*PICTURES, "checkpoint_0002.pt", "checkpoint_0003.pt", "compressed.codeq", "history.json",
                  "metrics.csv", "report.html", "slim.pt2"])  # fmt: skip

# Importing torch takes longer than a tiny run, and so does what it imports when it first traces and exports
# a network: one process does both, and forks for every run. The runs make no more of the stand-in than they
# use, and time the networks once: neither is what is tested here.
FORK_SERVER = """
import json, os, signal, sys, traceback
import experiments.debug_run, experiments.plots, torch
from experiments import compressed, data
from pathlib import Path
from resnet import resnet20
from src.graph import trace_network
data.SYNTHETIC_TRAIN, data.SYNTHETIC_TEST, compressed.LATENCY_RUNS = 256, 128, 1
trace_network(resnet20(), (3, 32, 32))
compressed.exported(torch.nn.Conv2d(3, 1, 1))
for line in sys.stdin:
    folder, arguments, code = json.loads(line)
    child = os.fork()
    if child:
        print(child, flush=True)
        _, status, usage = os.wait4(child, 0)
        print(os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, flush=True)
        continue
    status = 99
    try:
        os.chdir(folder)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        exec(code)
        status = experiments.debug_run.main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
"""


@dataclass
class ForkedRun(RunFolder):
    """A run that has ended."""

    status: int
    cpu_seconds: float

    @property
    def out(self) -> str:
        return (self.folder / "out.txt").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err.txt").read_text()

    @property
    def rows(self) -> list[str]:
        """The rows of the table without their last column, the seconds."""
        return [line.rpartition("|")[0] for line in self.out.splitlines() if ROW.match(line)]


class ForkServer:
    """A process that has imported all packages and runs one run at a time, in a fork of itself."""

    def __init__(self) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORK_SERVER], cwd=ROOT, env=environment(), **pipes
        )

    def start(self, folder: Path, arguments: list[str], code: str = "") -> int:
        """Start a run in `folder` that first executes `code`, and return the id of its process."""
        folder.mkdir(exist_ok=True)
        for name in ("out.txt", "err.txt"):
            (folder / name).write_text("")
        self.folder = folder
        self.process.stdin.write(json.dumps([str(folder), arguments, code]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> ForkedRun:
        status, cpu_seconds = self.process.stdout.readline().split()
        return ForkedRun(self.folder, int(status), float(cpu_seconds))

    def run(self, folder: Path, arguments: list[str], code: str = "") -> ForkedRun:
        self.start(folder, arguments, code)
        return self.wait()


@contextlib.contextmanager
def serving() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.process.stdin.close()
    server.process.wait(DEADLINE)
    server.process.stdout.close()


@pytest.fixture(scope="module")
def fork_servers() -> Iterator[list[ForkServer]]:
    with serving() as first, serving() as second:
        yield [first, second]


@pytest.fixture(scope="module")
def fork_server(fork_servers) -> ForkServer:
    return fork_servers[0]


@pytest.fixture(scope="module")
def undisturbed(fork_servers, tmp_path_factory) -> ForkedRun:
    return fork_servers[0].run(tmp_path_factory.mktemp("undisturbed"), TINY)


def without_time(history: dict[str, Any]) -> dict[str, Any]:
    kept = copy.deepcopy(history)
    del kept["resumed"], kept["origin"]
    for record in kept["epochs"]:
        assert record.pop("seconds") > 0
    assert kept["compressed"].pop("latency_seconds")
    return kept


def assert_same_end(run: ForkedRun, undisturbed: ForkedRun) -> None:
    assert run.err == "" and run.status == undisturbed.status
    # One that was killed after its last epoch leaves files of its end, which are moved aside.
    assert [name for name in run.files if not name.startswith("earlier-")] == undisturbed.files == RESULTS
    assert run.rows == undisturbed.rows and len(run.rows) == 3
    assert without_time(run.history) == without_time(undisturbed.history)
    ours, theirs = (load_checkpoint(checkpoint_path(r.output, 3)) for r in (run, undisturbed))
    for part in ("model", "optimizer", "random"):
        assert_same(getattr(ours, part), getattr(theirs, part))
    for name in (*(n for n in RESULTS if n.endswith(".png")), "compressed.codeq"):
        assert (run.output / name).read_bytes() == (undisturbed.output / name).read_bytes(), name


def assert_nothing_half_written(folder: Path) -> None:
    """Check that every file is whole as soon as it has its final name."""
    for path in folder.glob("*.json"):
        json.loads(path.read_text())
    for path in folder.glob("checkpoint_*.pt"):
        load_checkpoint(path)
    for path in folder.glob("*.png"):
        assert path.read_bytes().endswith(b"IEND\xaeB`\x82")


# Killed


def kill_and_resume(undisturbed: ForkedRun, folder: Path) -> int:
    """Kill runs until `KILLS` of them were, resume each, and return how many came to their end.

    The moment is drawn from all the processor time that a run takes. The kernel counts that time and kills,
    by SIGPROF, which a program can no more tidy up after than after SIGKILL. A run that outlives its moment,
    or that has its last checkpoint already, comes to its end, and a new run begins: without that, most of
    the kills would find the training done.
    """
    drawn, killed, ends, arguments = random.Random(0), 0, 0, TINY
    longest = undisturbed.cpu_seconds
    with serving() as server:
        while True:
            trained = checkpoint_path(folder / str(ends) / "debug_output", 3).exists()
            kill = killed < KILLS and not trained
            code = f"signal.setitimer(signal.ITIMER_PROF, {drawn.uniform(0, longest)})" if kill else ""
            run = server.run(folder / str(ends), arguments, code)
            if run.status == -signal.SIGPROF:
                killed, arguments = killed + 1, [*TINY, "--resume"]
                if run.output.exists():
                    assert_nothing_half_written(run.output)
                continue
            assert_same_end(run, undisturbed)
            longest = min(longest, run.cpu_seconds)  # The first run of a process is slower than the next.
            ends, arguments = ends + 1, TINY
            if killed == KILLS:
                return ends


# The process sends itself a signal just before a file's bytes are forced to the disk, or before the file gets
# its name. Files are written in this order: three checkpoints, each with
# metrics.csv, then history.json, the networks, the pictures and report.html.
AT_CALL = """
import itertools, pathlib
calls, real = itertools.count(1), {owner}.{name}
def signalling(*arguments):
    if next(calls) == {at}:
        {half}
        os.kill(os.getpid(), signal.{signal})
    return real(*arguments)
{owner}.{name} = signalling
"""


def signal_at(name: str, at: int, signal: str = "SIGKILL") -> str:
    """Return code that sends `signal` at call number `at` of os.fsync or Path.replace, as `name` says."""
    if name == "fsync":
        # Only half of the bytes are in the file then.
        half = "os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)"
        return AT_CALL.format(owner="os", name="fsync", at=at, half=half, signal=signal)
    return AT_CALL.format(owner="pathlib.Path", name="replace", at=at, half="pass", signal=signal)


def test_killed_inside_write_after_write_it_ends_as_if_undisturbed(fork_server, undisturbed, tmp_path):
    """The kills hit the first checkpoint, the second, and the first file after the last."""
    folder, arguments = tmp_path / "run", TINY
    for name, at in (("fsync", 1), ("fsync", 3), ("replace", 5)):
        run = fork_server.run(folder, arguments, signal_at(name, at))
        assert run.status == -signal.SIGKILL and run.err == ""
        assert_nothing_half_written(run.output)
        litter = [n for n in run.files if n.endswith(".part")]
        assert len(litter) == 1
        arguments = [*TINY, "--resume"]
    assert_same_end(fork_server.run(folder, arguments), undisturbed)


# Where files matter, not what is in them: a file of the same size stands for the exported network.
QUICK_END = """
from experiments import plots
compressed.exported = lambda *_: bytes(2 << 20)
compressed.read_back = lambda content, network, *_: (sum(p.numel() for p in network.parameters()), 0.0)
plots.rendered = lambda *_: b"a picture"
"""


# Stopped by a signal


# Code before a run that acts at the start of an epoch, counted from 1.
IN_EPOCH = """
import itertools, shutil, subprocess
real = experiments.debug_run.train_epoch
def train_epoch(step, batches, epoch, *rest):
    if epoch == {number} - 1:
        {act}
    return real(step, batches, epoch, *rest)
experiments.debug_run.train_epoch = train_epoch
"""


# In the second batch of an epoch, so that the network then is that of a half-finished epoch.
SIGNAL_IN_A_STEP = """
calls, watched = itertools.count(1), batches.batches
        normalise = watched.normalise
        def signalling(images):
            if next(calls) == 2:
                os.kill(os.getpid(), signal.{signal})
            return normalise(images)
        watched.normalise = signalling"""


def signal_in_epoch(number: int, signal: str) -> str:
    return IN_EPOCH.format(number=number, act=SIGNAL_IN_A_STEP.format(signal=signal).strip())


@pytest.fixture(scope="module")
def stopped(fork_servers, undisturbed, tmp_path_factory) -> tuple[ForkedRun, ForkedRun]:
    """A run that gets SIGTERM in its second epoch, and the run that resumes from a copy of its files."""
    folder = tmp_path_factory.mktemp("stopped")
    run = fork_servers[1].run(folder, TINY, signal_in_epoch(2, "SIGTERM"))
    again = tmp_path_factory.mktemp("again")
    shutil.copytree(run.output, again / "debug_output")
    return run, fork_servers[1].run(again, [*TINY, "--resume"])


def test_sigterm_is_status_143_with_the_files_of_the_finished_epochs(stopped):
    run, _ = stopped
    assert run.status == 143 and run.err == ""
    assert len(run.history["epochs"]) == 1
    assert run.history["stopped"] == "stopped by SIGTERM in epoch 2"
    # The network of a half-finished epoch is neither packed nor exported.
    assert run.files == sorted(
        [*PICTURES, "checkpoint_0001.pt", "history.json", "metrics.csv", "report.html"]
    )


def test_after_sigterm_a_resumed_run_says_after_which_epoch_and_ends_as_if_undisturbed(stopped, undisturbed):
    _, resumed = stopped
    assert_same_end(resumed, undisturbed)
    assert resumed.history["resumed"] == [{"after_epoch": 1, "differences": []}]
    assert "Resumed:   after epoch 1\n" in resumed.out
    assert undisturbed.history["resumed"] == []


@pytest.mark.parametrize("code", [signal_in_epoch(1, "SIGINT"), signal_at("replace", 7, "SIGINT")],
                         ids=["in the first epoch", "while the files are made"])  # fmt: skip
def test_ctrl_c_at_any_moment_is_status_130_without_a_traceback(fork_server, tmp_path, code):
    run = fork_server.run(tmp_path, TINY, code)
    assert run.status == 130 and run.err == ""
    assert "stopped by Ctrl-C" in run.out


OUTPUT_TAKES_NO_MORE = 'os.dup2(os.open("/dev/full", os.O_WRONLY), 1)'


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_an_output_that_breaks_with_ctrl_c_or_by_itself_costs_no_file(fork_servers, tmp_path):
    """Ctrl-C ends the `tee` behind a run too."""
    both = f"{OUTPUT_TAKES_NO_MORE}; os.kill(os.getpid(), signal.SIGINT)"
    for server, name, act in zip(
        fork_servers, ("signal", "alone"), (both, OUTPUT_TAKES_NO_MORE), strict=True
    ):
        server.start(
            tmp_path / name, [*ONE_STEP, "--epochs", "4"], QUICK_END + IN_EPOCH.format(number=2, act=act)
        )
    interrupted, alone = (server.wait() for server in fork_servers)
    assert interrupted.status == 130 and alone.status == 2
    assert interrupted.err.startswith("error: stopped by Ctrl-C in epoch 2; --resume goes on")
    assert "standard output takes no more (No space left on device)" in alone.err
    for run in (interrupted, alone):
        assert run.err.count("\n") == 1 and len(run.history["epochs"]) in (1, 2)
        assert {"report.html", "accuracy_curve.png"} <= set(run.files)


BREAKS_IN_THE_REPORT = f"""
written = experiments.debug_run.write_report
def broken(*arguments):
    {OUTPUT_TAKES_NO_MORE}
    return written(*arguments)
experiments.debug_run.write_report = broken
"""
BREAKS_AT_THE_LAST_ROW = f"""
shown = experiments.debug_run.show_epoch
def broken(live, history, epoch, warned):
    if epoch == 2:
        {OUTPUT_TAKES_NO_MORE}
    shown(live, history, epoch, warned)
experiments.debug_run.show_epoch = broken
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_an_output_that_breaks_when_all_epochs_are_over_costs_nothing_but_lines(fork_servers, tmp_path):
    for server, name, code in zip(
        fork_servers, ("report", "row"), (BREAKS_IN_THE_REPORT, BREAKS_AT_THE_LAST_ROW), strict=True
    ):
        server.start(tmp_path / name, [*ONE_STEP, "--epochs", "2"], QUICK_END + code)
    for run in [server.wait() for server in fork_servers]:
        assert run.status == 2 and run.err.count("\n") == 1 and "standard output takes no more" in run.err
        assert run.history["stopped"] is None and len(run.history["verdict"]) > 20
        assert {"report.html", "slim.pt2", "compressed.codeq", "accuracy_curve.png"} <= set(run.files)


INTERRUPT_AT_IMPORT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # The parent may have had it ignored.
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "torch.nn":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
"""


def test_ctrl_c_while_packages_are_imported_ends_the_program_without_a_traceback(tmp_path):
    """There is nothing to tidy up yet, so the signal's default action may end the program."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments.debug_run", *ONE_STEP],
        cwd=tmp_path, env=environment_at_start(INTERRUPT_AT_IMPORT, tmp_path / "start"), capture_output=True,
        text=True, timeout=DEADLINE,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.returncode in (-signal.SIGINT, 130)


# Files of an earlier run


STOP_AT_ONCE = """
def stop(*_):
    os.kill(os.getpid(), signal.SIGTERM)
experiments.debug_run.train_epoch = stop
"""


def test_without_resume_an_earlier_runs_files_are_moved_aside_byte_for_byte_and_that_is_said(
    fork_server, undisturbed, tmp_path
):
    shutil.copytree(undisturbed.output, tmp_path / "debug_output")
    (tmp_path / "debug_output" / "notes.txt").write_text("mine")
    expected, now = {}, tree(tmp_path / "debug_output")
    for number in (1, 2):
        expected |= {f"earlier-{number}/{k}": v for k, v in now.items() if k != "notes.txt"}
        run = fork_server.run(tmp_path, ONE_STEP, STOP_AT_ONCE)
        assert run.status == 143 and run.err == ""
        said = "Earlier:   the files of an earlier run in debug_output were moved to"
        assert f"{said} debug_output/earlier-{number}" in run.out.splitlines()
        found = tree(run.output)
        assert {k: v for k, v in found.items() if "/" in k} == expected
        now = {k: v for k, v in found.items() if "/" not in k and v != "folder"}
        assert sorted(now) == ["history.json", "notes.txt"]


def test_a_finished_run_that_is_made_longer_keeps_what_it_ended_with(fork_server, undisturbed, tmp_path):
    shutil.copytree(undisturbed.output, tmp_path / "debug_output")
    ended = tree(tmp_path / "debug_output")
    run = fork_server.run(tmp_path, [*TINY, "--epochs", "4", "--resume"], STOP_AT_ONCE)
    assert run.status == 143
    said = "Earlier:   the files of the 3 epochs were moved to debug_output/earlier-1"
    assert said in run.out.splitlines()
    kept = {
        k.removeprefix("earlier-1/"): v for k, v in tree(run.output).items() if k.startswith("earlier-1/")
    }
    left_alone = {name for name in ended if name.startswith("checkpoint_")} | {"metrics.csv"}
    assert kept == {k: v for k, v in ended.items() if k not in left_alone}


def test_resume_where_there_is_no_checkpoint_is_a_new_run_and_says_so(fork_server, tmp_path):
    run = fork_server.run(tmp_path, [*ONE_STEP, "--resume"], STOP_AT_ONCE)
    assert "Resumed:   no, there is no checkpoint in debug_output: this is a new run" in run.out.splitlines()
    assert run.history["resumed"] == [] and run.status == 143


REFUSED = {
    "another setting": (["--seed", "5"], "--seed is 5, and the run to go on with has 0"),
    "fewer epochs": (["--epochs", "2"], "--epochs is 2, and the run to go on with has 3"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_resume_of_another_run_is_refused_in_one_sentence_and_changes_no_file(
    fork_server, undisturbed, tmp_path, kind
):
    arguments, words = REFUSED[kind]
    shutil.copytree(undisturbed.output, tmp_path / "debug_output")
    before = tree(tmp_path / "debug_output")
    run = fork_server.run(tmp_path, [*TINY, *arguments, "--resume"])
    assert run.status == 2 and run.err.count("\n") == 1 and words in run.err
    assert tree(tmp_path / "debug_output") == before


# Two at once


def test_a_second_run_into_the_same_folder_is_refused_and_the_first_undisturbed(fork_servers, tmp_path):
    wait_for_a_signal = "experiments.debug_run.train_epoch = lambda *_: signal.pause()"
    child = fork_servers[0].start(tmp_path, ONE_STEP, wait_for_a_signal)
    wait_until(lambda: "------+" in (tmp_path / "out.txt").read_text(), "the head of the table")
    before = tree(tmp_path / "debug_output")
    other = tmp_path / "other"
    for resume in ([], ["--resume"]):
        second = fork_servers[1].run(
            other, [*ONE_STEP, "--output-dir", str(tmp_path / "debug_output"), *resume]
        )
        assert second.status == 2 and second.out == ""
        assert second.err.count("\n") == 1 and "which another run is writing to" in second.err
    assert tree(tmp_path / "debug_output") == before
    os.kill(child, signal.SIGTERM)
    first = fork_servers[0].wait()
    assert first.status == 143 and first.err == ""


# A disk that fills up, a folder that vanishes


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """An output folder that is a file system of 7 MB, with room for two checkpoints but not for three."""
    folder = tmp_path / "debug_output"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=7m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a file system here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_said_and_costs_no_older_checkpoint(fork_server, small_disk, tmp_path):
    run = fork_server.run(tmp_path, ONE_STEP)
    assert "no checkpoint of epoch 3: cannot write debug_output/checkpoint_0003.pt: No space left" in run.out
    assert len(run.rows) == 3 and "--- Final Compression Metrics ---" in run.out
    assert run.status == 2 and run.err.startswith("error: cannot write debug_output/")
    assert run.err.count("\n") == 1 and "No space left on device" in run.err
    assert [n for n in run.files if n.startswith("checkpoint")] == [
        "checkpoint_0001.pt",
        "checkpoint_0002.pt",
    ]
    assert not [n for n in run.files if n.endswith(".part")]
    assert_nothing_half_written(run.output)


TOO_LARGE = QUICK_END + "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))"


# Root may write where permissions forbid it, but not on a file system that is mounted read-only.
REMOVED = 'shutil.rmtree("debug_output")'
READ_ONLY = 'subprocess.run(["mount", "-o", "remount,ro", "debug_output"], check=True)'


def test_files_that_may_not_be_so_large_or_have_no_folder_any_more_end_the_run_in_one_sentence(
    fork_servers, tmp_path
):
    fork_servers[0].start(tmp_path / "large", [*ONE_STEP, "--epochs", "1"], TOO_LARGE)
    fork_servers[1].start(
        tmp_path / "removed", [*ONE_STEP, "--epochs", "2"], QUICK_END + IN_EPOCH.format(number=2, act=REMOVED)
    )
    large, removed = (server.wait() for server in fork_servers)
    assert (
        "no checkpoint of epoch 1: cannot write debug_output/checkpoint_0001.pt: File too large" in large.out
    )
    assert not [n for n in large.files if n.endswith((".part", ".pt"))]
    assert "no checkpoint of epoch 2: cannot write debug_output/checkpoint_0002.pt: No such f" in removed.out
    assert len(removed.rows) == 2
    for run in (large, removed):
        assert "--- Final Compression Metrics ---" in run.out
        assert run.status == 2 and run.err.count("\n") == 1 and "cannot write debug_output/" in run.err


def test_a_folder_that_becomes_read_only_in_mid_run_keeps_what_it_has(fork_server, small_disk, tmp_path):
    code = QUICK_END + IN_EPOCH.format(number=2, act=READ_ONLY)
    run = fork_server.run(tmp_path, [*ONE_STEP, "--epochs", "2"], code)
    assert "no checkpoint of epoch 2: cannot write debug_output/checkpoint_0002.pt: Read-only" in run.out
    assert run.status == 2 and run.err.count("\n") == 1 and "Read-only file system" in run.err
    assert run.files == ["checkpoint_0001.pt", "metrics.csv"]
    assert load_checkpoint(checkpoint_path(run.output, 1)).epochs == 1


# Numbers that are not finite, or at the limits of their range


NAN_IN_AN_IMAGE = """
watched, normalise = batches.batches, batches.batches.normalise
        watched.normalise = lambda images: normalise(images) * float("nan")"""


def test_weights_that_overflow_in_bf16_and_a_bad_image_stop_the_run_with_what_and_where(
    fork_servers, tmp_path
):
    """Both runs keep the earlier epochs and their checkpoints."""
    fork_servers[0].start(tmp_path / "bf16", [*ONE_STEP, "--precision", "bf16", "--weights-lr", "1e30"])
    fork_servers[1].start(
        tmp_path / "nan", [*ONE_STEP, "--epochs", "2"], IN_EPOCH.format(number=2, act=NAN_IN_AN_IMAGE.strip())
    )
    overflow, bad_image = (server.wait() for server in fork_servers)
    for run in (overflow, bad_image):
        assert run.status == 1 and run.err == ""
        finished = len(run.rows)
        assert finished == len(run.history["epochs"]) < 3
        assert f"stopped in epoch {finished + 1}: " in run.out
        assert [n for n in run.files if n.endswith(".pt")] == [
            f"checkpoint_{e + 1:04d}.pt" for e in range(finished)
        ]
    where = r"the loss is not finite at step 1; .*(parameter|the output of) \w+"
    assert re.search(where, overflow.history["stopped"])
    assert bad_image.history["stopped"].endswith("the images themselves") and len(bad_image.rows) == 1


# One layer is all zeros, and logits are at both ends of tanh and at its zero.
AT_THEIR_LIMITS = """
import torch
real_step = experiments.debug_run.TrainingStep
def harmed(model, *rest):
    blocks = model.layer1
    with torch.no_grad():
        blocks[0].conv1.parametrizations.weight.original.zero_()
        for convolution, logit, number in (
            (blocks[1].conv1, "logit_bit", 1e30), (blocks[1].conv2, "logit_bit", 0),
            (blocks[2].conv1, "logit_dz", -1e30), (blocks[2].conv2, "logit_dz", 0),
        ):
            getattr(convolution.parametrizations.weight[0].quantizer, logit).fill_(number)
    return real_step(model, *rest)
experiments.debug_run.TrainingStep = harmed
"""


def test_layers_at_their_limits_are_trained_and_reported_like_any_other(fork_server, tmp_path):
    run = fork_server.run(tmp_path, [*ONE_STEP, "--epochs", "1"], AT_THEIR_LIMITS)
    assert run.status in (0, 1) and run.err == "" and len(run.rows) == 1
    assert run.history["stopped"] is None and (run.output / "compressed.codeq").exists()
    layers = run.history["epochs"][0]["layers"]
    dead = layers["layer1.0.conv1"]
    assert dead["zero_filters"] == dead["filters"] == 16 and dead["alive_channels"] == 0
    assert layers["layer1.1.conv1"]["learned_bits"] == 8 and layers["layer1.1.conv2"]["learned_bits"] < 2.2
    assert layers["layer1.2.conv1"]["zero_weights"] < layers["layer1.2.conv2"]["zero_weights"]


def test_killed_at_random_moments_and_resumed_it_ends_as_if_undisturbed(undisturbed, tmp_path):
    assert kill_and_resume(undisturbed, tmp_path) >= 1
