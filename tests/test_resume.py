"""Runs that are stopped, killed or run out of disk, and go on: the end is that of a run left in peace.

KILLS=50 python -m pytest tests/test_resume.py     kills a run that often, not 5 times
"""

import contextlib
import copy
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from same import assert_same

from experiments.checkpoint import checkpoint_path, load_checkpoint

ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("KILLS", "5"))
TINY = ["--data", "synthetic", "--limit-train", "256", "--limit-test", "128", "--threads", "1",
        "--epochs", "3", "--batch-size", "64", "--sparsity-delay", "1", "--sparsity-ramp", "1"]  # fmt: skip
ONE_STEP = [*TINY, "--limit-train", "64", "--limit-test", "16"]
ROW = re.compile(r"^ *\d+ \|")
RESULTS = ["accuracy_curve.png", "channel_liveness.png", "channels_over_time.png", "checkpoint_0002.pt",
           "checkpoint_0003.pt", "compressed.codeq", "history.json", "per_layer_channels.png", "slim.pt2",
           "sparsity_curves.png"]  # fmt: skip

# Loading torch takes longer than a tiny run: one process loads it, and every run is a fork of that.
SERVER = """
import json, os, signal, sys, traceback
import experiments.debug_run, experiments.plots
from pathlib import Path
for line in sys.stdin:
    folder, arguments, code = json.loads(line)
    child = os.fork()
    if child:
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
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


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@dataclass
class Run:
    folder: Path
    status: int
    seconds: float

    @property
    def out(self) -> str:
        return (self.folder / "out.txt").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err.txt").read_text()

    @property
    def output(self) -> Path:
        return self.folder / "debug_output"

    @property
    def files(self) -> list[str]:
        return sorted(p.name for p in self.output.iterdir())

    @property
    def history(self) -> dict[str, Any]:
        return json.loads((self.output / "history.json").read_text())

    @property
    def rows(self) -> list[str]:
        """The table's rows but for the seconds."""
        return [line.rpartition("|")[0] for line in self.out.splitlines() if ROW.match(line)]


class Server:
    """A process that has all packages loaded and runs one run at a time."""

    def __init__(self) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, env=environment(), **pipes)

    def start(self, folder: Path, arguments: list[str], code: str = "") -> int:
        """Begin a run in `folder`, `code` before it; its process's id."""
        folder.mkdir(exist_ok=True)
        for name in ("out.txt", "err.txt"):
            (folder / name).write_text("")
        self.began, self.folder = time.monotonic(), folder
        self.process.stdin.write(json.dumps([str(folder), arguments, code]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> Run:
        status = int(self.process.stdout.readline())
        return Run(self.folder, status, time.monotonic() - self.began)

    def run(self, folder: Path, arguments: list[str], code: str = "") -> Run:
        self.start(folder, arguments, code)
        return self.wait()


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    yield server
    server.process.stdin.close()
    server.process.wait(60)
    server.process.stdout.close()


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Server]]:
    with serving() as first, serving() as second:
        yield [first, second]


@pytest.fixture(scope="module")
def server(servers) -> Server:
    return servers[0]


@pytest.fixture(scope="module")
def undisturbed(servers, tmp_path_factory) -> Run:
    return servers[0].run(tmp_path_factory.mktemp("undisturbed"), TINY)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def without_time(history: dict[str, Any]) -> dict[str, Any]:
    kept = copy.deepcopy(history)
    del kept["resumed"]
    for record in kept["epochs"]:
        assert record.pop("seconds") > 0
    assert kept["proof"].pop("latency_seconds")
    return kept


def assert_same_end(run: Run, undisturbed: Run) -> None:
    assert run.err == "" and run.status == undisturbed.status
    assert run.files == undisturbed.files == RESULTS
    assert run.rows == undisturbed.rows and len(run.rows) == 3
    assert without_time(run.history) == without_time(undisturbed.history)
    ours, theirs = (load_checkpoint(checkpoint_path(r.output, 3)) for r in (run, undisturbed))
    for part in ("settings", "surroundings", "model", "optimizer", "random", "start"):
        assert_same(getattr(ours, part), getattr(theirs, part))
    for name in (*(n for n in RESULTS if n.endswith(".png")), "compressed.codeq"):
        assert (run.output / name).read_bytes() == (undisturbed.output / name).read_bytes(), name


def assert_nothing_half_written(folder: Path) -> None:
    """Whatever has its final name is whole, at whichever moment one looks."""
    for path in folder.glob("*.json"):
        json.loads(path.read_text())
    for path in folder.glob("checkpoint_*.pt"):
        load_checkpoint(path)
    for path in folder.glob("*.png"):
        assert path.read_bytes().endswith(b"IEND\xaeB`\x82")


# Killed


def kill_and_resume(undisturbed: Run, folder: Path) -> int:
    """Kill runs until `KILLS` were, at moments drawn from all that a run takes. One that has its last
    checkpoint, or that the kill comes too late for, is left to its end, and another begins: else most kills
    would find the training done. Returns the number of ends, each looked at."""
    drawn, killed, ends, arguments = random.Random(0), 0, 0, TINY
    longest = undisturbed.seconds
    with serving() as server:
        while True:
            child = server.start(folder / str(ends), arguments)
            trained = checkpoint_path(folder / str(ends) / "debug_output", 3).exists()
            if killed < KILLS and not trained:
                time.sleep(drawn.uniform(0, longest))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            run = server.wait()
            if run.status == -signal.SIGKILL:
                killed, arguments = killed + 1, [*TINY, "--resume"]
                if run.output.exists():
                    assert_nothing_half_written(run.output)
                continue
            assert_same_end(run, undisturbed)
            longest = min(longest, run.seconds)  # the first run of all is slower
            ends, arguments = ends + 1, TINY
            if killed == KILLS:
                return ends


@pytest.fixture(scope="module", autouse=True)
def killing(undisturbed, tmp_path_factory) -> Iterator[Future[int]]:
    """It goes on beside the other tests."""
    with ThreadPoolExecutor(1) as thread:
        yield thread.submit(kill_and_resume, undisturbed, tmp_path_factory.mktemp("killed"))


# The process kills itself as a write's file is about to be forced to the disk, or named. A write for
# each of three checkpoints, five pictures, history.json and the two networks.
AT_CALL = """
import itertools, pathlib
calls, real = itertools.count(1), {owner}.{name}
def dying(*arguments):
    if next(calls) == {at}:
        {half}
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
{owner}.{name} = dying
"""


def dying_at(name: str, at: int) -> str:
    if name == "fsync":
        half = "os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)"
        return AT_CALL.format(owner="os", name="fsync", at=at, half=half)
    return AT_CALL.format(owner="pathlib.Path", name="replace", at=at, half="pass")


def test_killed_inside_write_after_write_it_ends_as_if_left_in_peace(servers, undisturbed, tmp_path):
    """In the first checkpoint, the second, the third, and then in what is written last."""
    folder, arguments = tmp_path / "run", TINY
    for name, at in (("fsync", 1), ("replace", 2), ("fsync", 2), ("replace", 2)):
        run = servers[0].run(folder, arguments, dying_at(name, at))
        assert run.status == -signal.SIGKILL and run.err == ""
        assert_nothing_half_written(run.output)
        litter = [n for n in run.files if n.endswith(".part")]
        assert len(litter) == 1
        arguments = [*TINY, "--resume"]
    assert_same_end(servers[0].run(folder, arguments), undisturbed)


# Asked to stop


@pytest.fixture(scope="module")
def stopped(servers, undisturbed, tmp_path_factory) -> tuple[Run, Run]:
    """SIGTERM after the first row: how the run ended, and the run that went on from a copy of its files."""
    folder = tmp_path_factory.mktemp("stopped")
    child = servers[1].start(folder, TINY)
    wait_for(lambda: "\n    1 |" in (folder / "out.txt").read_text())
    os.kill(child, signal.SIGTERM)
    run = servers[1].wait()
    again = tmp_path_factory.mktemp("again")
    subprocess.run(["cp", "-r", str(run.output), str(again)], check=True)
    return run, servers[1].run(again, [*TINY, "--resume"])


def test_sigterm_is_status_143_with_the_files_of_the_finished_epochs(stopped):
    run, _ = stopped
    assert run.status == 143 and run.err == ""
    finished = len(run.history["epochs"])
    assert 1 <= finished < 3 and run.history["stopped"] == f"stopped by SIGTERM in epoch {finished + 1}"
    # The network of a run that was stopped is not packed; stopped within a write, it leaves none of that.
    made = {n for n in RESULTS if n.endswith((".png", ".json"))}
    assert (
        made | {"checkpoint_0001.pt"} <= set(run.files) <= made | {"checkpoint_0001.pt", "checkpoint_0002.pt"}
    )


def test_after_sigterm_a_resume_says_where_it_goes_on_and_ends_as_if_left_in_peace(stopped, undisturbed):
    _, resumed = stopped
    assert_same_end(resumed, undisturbed)
    (again,) = resumed.history["resumed"]
    assert again == {"after_epoch": again["after_epoch"], "said": []} and again["after_epoch"] in (1, 2)
    assert f"Resumed:   after epoch {again['after_epoch']}\n" in resumed.out
    assert undisturbed.history["resumed"] == []


def torch_is_loading(process: subprocess.Popen[str]) -> bool:
    return "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()


MOMENTS: dict[str, Callable[[subprocess.Popen[str], str], bool]] = {
    "while packages are loading": lambda process, out: torch_is_loading(process),
    "in the first epoch": lambda process, out: "------+" in out,
    "while the files are made": lambda process, out: "--- Final" in out,
}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc here")
def test_ctrl_c_at_any_moment_is_status_130_without_a_traceback(tmp_path):
    """Or, before there is anything to tidy up, the signal's own end. Two at a time."""

    def interrupted(moment: str) -> Iterator[None]:
        folder = tmp_path / moment
        folder.mkdir()
        out, err = folder / "out.txt", folder / "err.txt"
        with out.open("w") as to_out, err.open("w") as to_err:
            process = subprocess.Popen(
                [sys.executable, "-m", "experiments.debug_run", *ONE_STEP],
                cwd=folder, env=environment(), stdout=to_out, stderr=to_err, text=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )  # fmt: skip
        yield
        wait_for(lambda: MOMENTS[moment](process, out.read_text()))
        process.send_signal(signal.SIGINT)
        status = process.wait(60)
        assert err.read_text() == "", moment
        assert status == (-signal.SIGINT if moment == "while packages are loading" else 130), moment
        if status == 130:
            assert "stopped by Ctrl-C" in out.read_text(), moment

    first, second, third = map(interrupted, MOMENTS)
    next(first)
    next(second)
    for waiting in (first, second):
        assert next(waiting, "done") == "done"
        if waiting is first:
            next(third)
    assert next(third, "done") == "done"


# What was there before


def contents(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


STOP_AT_ONCE = """
def stop(*_):
    os.kill(os.getpid(), signal.SIGTERM)
experiments.debug_run.train_epoch = stop
"""


def test_without_resume_an_earlier_runs_files_are_moved_aside_byte_for_byte_and_that_is_said(
    server, undisturbed, tmp_path
):
    subprocess.run(["cp", "-r", str(undisturbed.output), str(tmp_path / "debug_output")], check=True)
    (tmp_path / "debug_output" / "notes.txt").write_text("mine")
    expected, now = {}, contents(tmp_path / "debug_output")
    for number in (1, 2):
        expected |= {f"earlier-{number}/{k}": v for k, v in now.items() if k != "notes.txt"}
        run = server.run(tmp_path, ONE_STEP, STOP_AT_ONCE)
        assert run.status == 143 and run.err == ""
        said = "Earlier:   the files of an earlier run in debug_output were moved to"
        assert f"{said} debug_output/earlier-{number}" in run.out.splitlines()
        found = contents(run.output)
        now = {k: v for k, v in found.items() if "/" not in k}
        assert sorted(now) == ["history.json", "notes.txt"]
        assert {k: v for k, v in found.items() if "/" in k} == expected


def test_resume_where_there_is_no_checkpoint_is_a_new_run_and_says_so(server, tmp_path):
    run = server.run(tmp_path, [*ONE_STEP, "--resume"], STOP_AT_ONCE)
    assert "Resumed:   no, there is no checkpoint in debug_output: this is a new run" in run.out.splitlines()
    assert run.history["resumed"] == [] and run.status == 143


REFUSED = {
    "another setting": (["--seed", "5"], "--seed is 5, and the run to go on with has 0"),
    "fewer epochs": (["--epochs", "2"], "--epochs is 2, and the run to go on with has 3"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_resume_of_another_run_is_refused_in_one_sentence_and_changes_no_file(
    server, undisturbed, tmp_path, kind
):
    arguments, words = REFUSED[kind]
    subprocess.run(["cp", "-r", str(undisturbed.output), str(tmp_path / "debug_output")], check=True)
    before = contents(tmp_path / "debug_output")
    run = server.run(tmp_path, [*TINY, *arguments, "--resume"])
    assert run.status == 2 and run.err.count("\n") == 1 and words in run.err
    assert contents(tmp_path / "debug_output") == before


# Two at once


def test_a_second_run_into_the_same_folder_is_refused_and_the_first_undisturbed(servers, tmp_path):
    child = servers[0].start(tmp_path, ONE_STEP, "import time; experiments.debug_run.train_epoch = "
                             "lambda *_: time.sleep(120)")  # fmt: skip
    wait_for(lambda: "------+" in (tmp_path / "out.txt").read_text())
    before = contents(tmp_path / "debug_output")
    other = tmp_path / "other"
    for resume in ([], ["--resume"]):
        second = servers[1].run(other, [*ONE_STEP, "--output-dir", str(tmp_path / "debug_output"), *resume])
        assert second.status == 2 and second.out == ""
        assert second.err.count("\n") == 1 and "which another run is writing to" in second.err
    assert contents(tmp_path / "debug_output") == before
    os.kill(child, signal.SIGTERM)
    first = servers[0].wait()
    assert first.status == 143 and first.err == ""


# A disk that fills up, a folder that goes


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A folder on a file system of its own of 7 MB: room for two checkpoints, not for three."""
    folder = tmp_path / "debug_output"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=7m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a file system here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_said_and_costs_no_older_checkpoint(server, small_disk, tmp_path):
    run = server.run(tmp_path, ONE_STEP)
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


TOO_LARGE = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))"


# Before the second epoch. Root ignores permissions, but not a file system that is mounted for reading.
IN_SECOND = """
import shutil, subprocess
real = experiments.debug_run.train_epoch
def train_epoch(step, batches, epoch, *rest):
    if epoch == 1:
        {act}
    return real(step, batches, epoch, *rest)
experiments.debug_run.train_epoch = train_epoch
"""
REMOVED = 'shutil.rmtree("debug_output")'
READ_ONLY = 'subprocess.run(["mount", "-o", "remount,ro", "debug_output"], check=True)'


def test_files_that_may_not_be_so_large_or_have_no_folder_any_more_end_the_run_in_one_sentence(
    servers, tmp_path
):
    servers[0].start(tmp_path / "large", [*ONE_STEP, "--epochs", "1"], TOO_LARGE)
    servers[1].start(tmp_path / "removed", [*ONE_STEP, "--epochs", "2"], IN_SECOND.format(act=REMOVED))
    large, removed = (server.wait() for server in servers)
    assert (
        "no checkpoint of epoch 1: cannot write debug_output/checkpoint_0001.pt: File too large" in large.out
    )
    assert not [n for n in large.files if n.endswith((".part", ".pt"))]
    assert "no checkpoint of epoch 2: cannot write debug_output/checkpoint_0002.pt: No such f" in removed.out
    assert len(removed.rows) == 2
    for run in (large, removed):
        assert "--- Final Compression Metrics ---" in run.out
        assert run.status == 2 and run.err.count("\n") == 1 and "cannot write debug_output/" in run.err


def test_a_folder_that_becomes_read_only_in_mid_run_keeps_what_it_has(server, small_disk, tmp_path):
    run = server.run(tmp_path, [*ONE_STEP, "--epochs", "2"], IN_SECOND.format(act=READ_ONLY))
    assert "no checkpoint of epoch 2: cannot write debug_output/checkpoint_0002.pt: Read-only" in run.out
    assert run.status == 2 and run.err.count("\n") == 1 and "Read-only file system" in run.err
    assert run.files == ["checkpoint_0001.pt"]
    assert load_checkpoint(checkpoint_path(run.output, 1)).epochs == 1


# Numbers that are not finite, or at their limits


NAN_IN_AN_IMAGE = """
normalise = batches.normalise
        batches.normalise = lambda images: normalise(images) * float("nan")"""


def test_weights_that_burst_in_bf16_and_a_bad_image_stop_the_run_with_what_and_where(servers, tmp_path):
    """Both keep the epochs before, and the checkpoints of these."""
    servers[0].start(tmp_path / "bf16", [*ONE_STEP, "--precision", "bf16", "--weights-lr", "1e30"])
    servers[1].start(
        tmp_path / "nan", [*ONE_STEP, "--epochs", "2"], IN_SECOND.format(act=NAN_IN_AN_IMAGE.strip())
    )
    burst, bad_image = (server.wait() for server in servers)
    for run in (burst, bad_image):
        assert run.status == 1 and run.err == ""
        finished = len(run.rows)
        assert finished == len(run.history["epochs"]) < 3
        assert f"stopped in epoch {finished + 1}: " in run.out
        assert [n for n in run.files if n.endswith(".pt")] == [
            f"checkpoint_{e + 1:04d}.pt" for e in range(finished)
        ]
    where = r"the loss is not finite at step 1; .*(parameter|the output of) \w+"
    assert re.search(where, burst.history["stopped"])
    assert bad_image.history["stopped"].endswith("the images themselves") and len(bad_image.rows) == 1


# A layer that is dead wholly, and logits at both ends of tanh and at its zero.
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


def test_layers_at_their_limits_are_trained_and_reported_like_any_other(server, tmp_path):
    run = server.run(tmp_path, [*ONE_STEP, "--epochs", "1"], AT_THEIR_LIMITS)
    assert run.status in (0, 1) and run.err == "" and len(run.rows) == 1
    assert run.history["stopped"] is None and (run.output / "compressed.codeq").exists()
    layers = run.history["epochs"][0]["layers"]
    dead = layers["layer1.0.conv1"]
    assert dead["zero_filters"] == dead["filters"] == 16 and dead["alive_channels"] == 0
    assert layers["layer1.1.conv1"]["learned_bits"] == 8 and layers["layer1.1.conv2"]["learned_bits"] < 2.2
    assert layers["layer1.2.conv1"]["zero_weights"] < layers["layer1.2.conv2"]["zero_weights"]


# Killed, the end of it


def test_killed_at_random_moments_and_resumed_it_ends_as_if_left_in_peace(killing):
    assert killing.result() >= 1
