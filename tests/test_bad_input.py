"""Bad input gets status 2 and one sentence with the value, what was expected and what to do; no file is lost.

A row of the table below is a command line, what the sentence must say, and how the folder is prepared. Then
come runs in strange surroundings (no home, no terminal, standard output on a full disk ...), and at the end
any combination of settings.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import pickle
import pty
import random
import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from folders import PICTURES, tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import DEADLINE, environment
from random_images import random_dataset
from torch import nn

from experiments import data, debug_run, device, verify
from experiments.checkpoint import VERSION, Checkpoint, checkpoint_path, save_checkpoint
from experiments.cifar import CIFARS
from experiments.files import lock_folder
from experiments.history import DataRecord
from experiments.settings import Settings, flag, parse_settings
from resnet import resnet20
from src.packing import pack_network

PROGRAMS = {"debug_run": debug_run.main, "verify": verify.main}
TRAIN_IMAGES, TEST_IMAGES = 16, 8
CIFAR10 = CIFARS["cifar10"]
REFUSING = "http://127.0.0.1:9/cifar-10-python.tar.gz"  # nobody listens on port 9
EARLIER = "of an earlier run"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A working folder for runs whose stand-in is 24 images, without a network and a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(device, "keep_freed_memory", lambda keep=True: True)
    monkeypatch.setattr(
        data,
        "synthetic_dataset",
        lambda source: random_dataset(TRAIN_IMAGES, TEST_IMAGES, "synthetic stand-in", source),
    )
    for name, files in CIFARS.items():
        tables = {
            table: {file: hashlib.md5(file.encode()).hexdigest() for file in getattr(files, table)}
            for table in ("train_files", "test_files")
        }
        monkeypatch.setitem(CIFARS, name, replace(files, sources=(REFUSING,), **tables))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def run_command(command: str | list[str]) -> tuple[int | str | None, str, str]:
    """Run a command line in this process; return its exit status, standard output and standard error."""
    program, *arguments = shlex.split(command) if isinstance(command, str) else command
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            status: int | str | None = PROGRAMS[program](arguments)
        except SystemExit as stopped:
            status = stopped.code
    return status, out.getvalue(), err.getvalue()


def assert_one_sentence(err: str) -> None:
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err


# Functions that prepare a folder. What one returns, such as a lock, is kept until the end of the test.

Prepare = Callable[[Path], object]


def nothing(folder: Path) -> None:
    """The folder stays empty."""


def a_file(folder: Path) -> None:
    (folder / "taken").write_text("the user's")


def an_earlier_run(folder: Path) -> None:
    (folder / "debug_output").mkdir()
    for name in (*PICTURES, "history.json", "compressed.codeq", "slim.pt2", "mine.txt"):
        (folder / "debug_output" / name).write_text(EARLIER)


def held_by_another_run(folder: Path) -> object:
    an_earlier_run(folder)
    hold = lock_folder(folder / "debug_output", print)
    hold.__enter__()
    return hold


def a_folder_in_the_place_of(name: str) -> Prepare:
    return lambda folder: (folder / "debug_output" / name / "mine").mkdir(parents=True)


def a_dangling_link_as_history(folder: Path) -> None:
    (folder / "debug_output").mkdir()
    (folder / "debug_output" / "history.json").symlink_to(folder / "nowhere")


def a_dangling_link(folder: Path) -> None:
    (folder / "debug_output").symlink_to(folder / "nowhere")


def unpacked_cifar10(folder: Path) -> Path:
    batches = folder / "data" / CIFAR10.folder
    batches.mkdir(parents=True)
    for name in (*CIFAR10.train_files, *CIFAR10.test_files):
        (batches / name).write_text(name)
    return batches


def other_batch_file(content: bytes) -> Prepare:
    return lambda folder: (unpacked_cifar10(folder) / "data_batch_3").write_bytes(content)


OTHER_DATA = pickle.dumps({b"data": [[0] * 3072], b"fine_labels": [7], b"coarse_labels": [1]})
MNIST = struct.pack(">IIII", 0x803, 1, 28, 28) + bytes(28 * 28)


def a_missing_batch_file(folder: Path) -> None:
    (unpacked_cifar10(folder) / "test_batch").unlink()


def a_folder_as_batch_file(folder: Path) -> None:
    (unpacked_cifar10(folder) / "data_batch_1").unlink()
    (folder / "data" / CIFAR10.folder / "data_batch_1").mkdir()


def a_file_as_data_folder(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data" / CIFAR10.folder).write_text("the user's")


def another_data_set(folder: Path) -> None:
    (folder / "data" / "cifar-100-python").mkdir(parents=True)
    (folder / "data" / "cifar-100-python" / "train").write_bytes(OTHER_DATA)


def archive(content: bytes) -> Prepare:
    def prepare(folder: Path) -> None:
        (folder / "data").mkdir()
        (folder / "data" / CIFAR10.archive).write_bytes(content)

    return prepare


def a_folder_as_archive(folder: Path) -> None:
    (folder / "data" / CIFAR10.archive).mkdir(parents=True)


def both_altered(folder: Path) -> None:
    other_batch_file(b"half of it")(folder)
    (folder / "data" / CIFAR10.archive).write_bytes(b"half of it")


RESUMED = replace(Settings(), data="synthetic", epochs=3, threads=1, device="cpu")
DATA_HERE = {
    "name": "synthetic stand-in",
    "source": "built in",
    "synthetic": True,
    "classes": 10,
    "train_images": TRAIN_IMAGES,
    "test_images": TEST_IMAGES,
}
FIRST = "debug_output/checkpoint_0001.pt"


def checkpoint(**changes: Any) -> Prepare:
    """The checkpoint after the first epoch of RESUMED, with only what is read before a refusal."""
    history = runs.good_run(1)
    history.settings, history.device = RESUMED.to_json(), "cpu, 1 threads"
    history.versions["torch"] = str(torch.__version__)
    history.data = DataRecord(**DATA_HERE)
    for name in changes.keys() & vars(history).keys():
        setattr(history, name, changes[name])
    state: dict[str, Any] = {
        "history": history,
        "model": {},
        "optimizer": {},
        "random": {"cpu": torch.get_rng_state(), "cuda": None},
    }
    state |= {name: value for name, value in changes.items() if name in state}

    def prepare(folder: Path) -> None:
        an_earlier_run(folder)
        save_checkpoint(folder / "debug_output", Checkpoint(**state))

    return prepare


def of_other(**changes: Any) -> Prepare:
    return checkpoint(settings=replace(RESUMED, **changes).to_json())


def spoilt(spoil: Callable[[bytes], bytes]) -> Prepare:
    def prepare(folder: Path) -> None:
        checkpoint()(folder)
        (folder / FIRST).write_bytes(spoil((folder / FIRST).read_bytes()))

    return prepare


def with_checksum(content: bytes) -> Prepare:
    """A file with any content and, as a checkpoint has it, the right SHA-256 at its end."""
    return spoilt(lambda _: content + hashlib.sha256(content).digest())


def serialized(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def flipped(content: bytes) -> bytes:
    """The content with every bit of its middle third flipped."""
    third = len(content) // 3
    return content[:third] + bytes(b ^ 0xFF for b in content[third : 2 * third]) + content[2 * third :]


def a_folder_as_checkpoint(folder: Path) -> None:
    an_earlier_run(folder)
    (folder / FIRST).mkdir()


def two_bad_checkpoints(folder: Path) -> None:
    spoilt(flipped)(folder)
    checkpoint_path(folder / "debug_output", 2).write_bytes(b"")


@functools.cache
def packed_network(claim: str = "null") -> bytes:
    torch.manual_seed(0)
    return pack_network(resnet20(), {"preset": "debug"}, {"structured_macs": json.loads(claim)})


@functools.cache
def exported() -> bytes:
    """A valid .pt2 file whose network takes no images."""
    content = io.BytesIO()
    torch.export.save(torch.export.export(nn.Linear(3, 2), (torch.zeros(2, 3),)), content)
    return content.getvalue()


def received(name: str, content: Callable[[], bytes]) -> Prepare:
    return lambda folder: (folder / name).write_bytes(content())


def a_received_folder(folder: Path) -> None:
    (folder / "a.codeq").mkdir()
    (folder / "a.pt2").mkdir()


# The table.


@dataclass(frozen=True)
class Case:
    """A command line that is refused with a sentence that holds `words`."""

    command: str
    words: tuple[str, ...]
    prepare: Prepare = nothing


BITS = ("max_bits", "fixed_bits")  # whole numbers of a small range
WHOLE = [item.name for item in fields(Settings) if item.type in (int, int | None) and item.name not in BITS]
NUMBERS = [item.name for item in fields(Settings) if item.type is float and item.name != "beta2"]
CHOSEN = {item.name: item.metadata["choices"] for item in fields(Settings) if item.metadata["choices"]}
LEAST = {"seed": 0, "crop_padding": 0, "batch_norm_batches": 0, "pace_steps": 0}  # of any other 1
MOST = {"epochs": 10**6, "seed": 2**63 - 1, "threads": 4096, "crop_padding": 8}
LARGEST_FLOAT, LARGEST_FLOAT32 = "1.7976931348623157e308", "3.4028234663852886e38"
LONG = "x" * 300


def refused_values() -> Iterator[tuple[str, Case]]:
    for name in WHOLE:
        option = flag(name)
        bounds = [LEAST.get(name, 1) - 1, -(10**30)] + ([MOST[name] + 1, 10**30] if name in MOST else [])
        for value in bounds:
            yield (
                f"{option} {value}",
                Case(f"debug_run {option} {value}", (option, str(value), "expected a whole number")),
            )
        for text in ("1.5", "x", "", "1e400", "nan", "inf", "0x10", "1 2"):
            yield (
                f"{option} {text!r}",
                Case(f"debug_run {option} {shlex.quote(text)}", (option, f"{text!r} is not a whole number")),
            )
    for text in ("-1.0", "1.0", "nan", "inf"):
        expected = ("--beta2", f"is {text}", "expected a number from 0 to less than 1")
        yield f"--beta2 {text}", Case(f"debug_run --beta2={text}", expected)
    for name in NUMBERS:
        option = flag(name)
        for text, shown in {
            "-1": "-1.0",
            "-1e-300": "-1e-300",
            "1e400": "inf",
            "-1e400": "-inf",
            "nan": "nan",
            "inf": "inf",
            "-Infinity": "-inf",
        }.items():
            yield (
                f"{option} {text}",
                Case(f"debug_run {option}={text}", (option, shown, "expected a finite number, 0 or more")),
            )
        for text in ("x", "", "1,5", "1 2"):
            yield (
                f"{option} {text!r}",
                Case(f"debug_run {option} {shlex.quote(text)}", (option, f"{text!r} is not a number")),
            )
    for name, choices in CHOSEN.items():
        for text in ("nonsense", choices[0].upper(), "", "0"):
            yield (
                f"{flag(name)} {text!r}",
                Case(f"debug_run {flag(name)} {shlex.quote(text)}", (flag(name), repr(text), *choices)),
            )
    for item in fields(Settings):
        if item.type is not bool and item.name != "exclude_layers":
            yield (
                f"{flag(item.name)} without its value",
                Case(f"debug_run {flag(item.name)}", (flag(item.name), "expected one argument", "--help")),
            )


WRITTEN = (*PICTURES, "history.json", "metrics.csv", "report.html", "compressed.codeq", "slim.pt2")
NOT_HAD = ("CIFAR-10 could not be had", "by hand", CIFAR10.archive, "170,498,071", CIFAR10.archive_md5)
SYNTHETIC = "debug_run --data synthetic"
RESUME = f"{SYNTHETIC} --device cpu --threads 1 --epochs 3 --resume"
NO_CHECKPOINT = ("--resume", "no checkpoint in debug_output can be used", "leave --resume out")
FEW = "--data synthetic --limit-test 4"

CASES = dict(refused_values()) | {
    # The flags themselves.
    "a coefficient just beyond float32": Case(
        "debug_run --sparsity-weight 3.4028235e38", ("--sparsity-weight", "3.4028235e+38", "expected")
    ),
    "a flag that is none": Case("debug_run --epoch 3", ("--epoch", "--help")),
    "a stray word": Case("debug_run fast", ("fast", "--help")),
    "a stray word with a line break": Case("debug_run 'fast\nerror: all is well'", ("fast", "--help")),
    "a stray negative number": Case("debug_run -1", ("-1", "--help")),
    "a switch with a value": Case("debug_run --resume=yes", ("--resume", "'yes'", "--help")),
    "a switch and then a word": Case("debug_run --resume yes", ("yes", "--help")),
    "two dashes for a number": Case("debug_run --epochs=--", ("--epochs",)),
    "two dashes for a choice": Case("debug_run --preset=--", ("--preset",)),
    "two dashes for a folder": Case(f"{SYNTHETIC} --output-dir=--", ("--output-dir",)),
    "a single dash": Case("debug_run -epochs 3", ("-epochs", "--help")),
    "more epochs than a float can count": Case(f"{SYNTHETIC} --epochs 1{'0' * 400}", ("--epochs",)),
    "a pattern that is no regular expression": Case(
        f"{SYNTHETIC} --exclude-layers '('", ("exclude", "'('", "regular expression"), an_earlier_run
    ),
    "a pattern with too large a repetition": Case(
        f"{SYNTHETIC} --exclude-layers 'a{{99999999999999}}'", ("exclude", "regular expression")
    ),
    "a pattern that is no UTF-8": Case(
        f"{SYNTHETIC} --exclude-layers 'linear|\udcff'", ("--exclude-layers is 'linear|", "udcff", "UTF-8")
    ),
    "a pattern with a line break": Case(
        f"{SYNTHETIC} --exclude-layers conv1 'linear|\n'", ("--exclude-layers is", "control characters")
    ),
    "a pattern that speaks to the terminal": Case(
        f"{SYNTHETIC} --exclude-layers 'linear|\x1b[2J'", ("--exclude-layers is", "control characters")
    ),
    "a pattern nested too deep": Case(
        f"{SYNTHETIC} --exclude-layers '{'(' * 2000 + ')' * 2000}'", ("exclude", "regular expression")
    ),
    "a pattern without a match": Case(
        f"{SYNTHETIC} --exclude-layers conv1 conv9",
        ("exclude", "'conv9'", "matches no module", "conv1"),
        an_earlier_run,
    ),
    "patterns with a comma between them": Case(
        f"{SYNTHETIC} --exclude-layers conv1,linear", ("exclude", "'conv1,linear'", "matches no module")
    ),
    "a GPU where there is none": Case("debug_run --device cuda", ("--device", "'cuda'", "it has", "cpu")),
    "TF32 without a GPU": Case(
        "debug_run --device cpu --precision tf32", ("--precision", "'tf32'", "CUDA", "cpu")
    ),
    # The data.
    "no CIFAR-10 and no network": Case(
        "debug_run --data cifar10", (*NOT_HAD, REFUSING, "Connection refused")
    ),
    "no CIFAR-10 in a folder that has another data set": Case(
        "debug_run --data cifar10", (*NOT_HAD, "Connection refused"), another_data_set
    ),
    "a data folder that is a file": Case(
        "debug_run --data-dir taken", ("taken cannot be read", "no folder", "--data-dir"), a_file
    ),
    "a data folder below a file": Case(
        "debug_run --data-dir taken/data", ("taken/data cannot be read", "Not a directory"), a_file
    ),
    "a data folder of too long a name": Case(
        f"debug_run --data-dir {LONG}", ("cannot be read", "name too long", "--data-dir")
    ),
    "a data folder that cannot be made": Case("debug_run --data cifar10 --data-dir /proc/here", NOT_HAD),
    "a batch file missing": Case(
        "debug_run --data cifar10", ("test_batch is missing", "good copy"), a_missing_batch_file
    ),
    "a batch file missing where the data is not insisted on": Case(
        "debug_run --data auto", ("test_batch is missing", "good copy"), a_missing_batch_file
    ),
    "a batch file cut short": Case(
        "debug_run",
        ("data_batch_3 is truncated or altered", "11 bytes", "good copy"),
        other_batch_file(b"data_batch_"),
    ),
    "a batch file altered": Case(
        "debug_run", ("data_batch_3 is truncated or altered", "good copy"), other_batch_file(b"data_batch_4")
    ),
    "an empty batch file": Case("debug_run", ("data_batch_3", "(0 bytes"), other_batch_file(b"")),
    "CIFAR-100 in a batch file's place": Case(
        "debug_run", ("data_batch_3 is truncated or altered", "good copy"), other_batch_file(OTHER_DATA)
    ),
    "MNIST in a batch file's place": Case(
        "debug_run", ("data_batch_3 is truncated or altered", "good copy"), other_batch_file(MNIST)
    ),
    "a folder in a batch file's place": Case(
        "debug_run", ("data_batch_1 cannot be read", "Is a directory"), a_folder_as_batch_file
    ),
    "a file in the place of the batches' folder": Case(
        "debug_run", ("cannot be read", "Not a directory", "good copy"), a_file_as_data_folder
    ),
    "an archive cut short": Case(
        "debug_run", (CIFAR10.archive, "truncated or altered", "replace it"), archive(b"\x1f\x8b\x08")
    ),
    "an empty archive": Case("debug_run", (CIFAR10.archive, "(0 bytes", "replace it"), archive(b"")),
    "a folder in the archive's place": Case(
        "debug_run", (CIFAR10.archive, "Is a directory", "remove it"), a_folder_as_archive
    ),
    "both the folder and the archive altered": Case(
        "debug_run", ("data_batch_3 is truncated", CIFAR10.archive, "replace it"), both_altered
    ),
    "more training images than there are": Case(
        f"{SYNTHETIC} --limit-train 17", ("--limit-train is 17", "16 images", "1 to 16"), an_earlier_run
    ),
    "more test images than there are": Case(
        f"{SYNTHETIC} --limit-test 9", ("--limit-test is 9", "8 images", "1 to 8"), an_earlier_run
    ),
    "more training images than can be counted": Case(
        f"{SYNTHETIC} --limit-train {10**30}", (f"--limit-train is {10**30}", "1 to 16")
    ),
    "more test images than can be counted": Case(
        f"{SYNTHETIC} --limit-test {10**30}", (f"--limit-test is {10**30}", "1 to 8")
    ),
    # The output.
    "an output folder that is a file": Case(
        f"{SYNTHETIC} --output-dir taken", ("--output-dir is taken", "File exists", "name a folder"), a_file
    ),
    "an output folder below a file": Case(
        f"{SYNTHETIC} --output-dir taken/a/b", ("--output-dir is taken/a/b", "name a folder"), a_file
    ),
    "an output folder below a file, with a line break in its name": Case(
        f"{SYNTHETIC} --output-dir 'taken/a\nb'", ("--output-dir is taken/a", "name a folder"), a_file
    ),
    "an output folder that cannot be made": Case(
        f"{SYNTHETIC} --output-dir /proc/here", ("--output-dir is /proc/here", "name a folder")
    ),
    "an output folder that cannot be written": Case(
        f"{SYNTHETIC} --output-dir /proc", ("--output-dir is /proc", "name a folder")
    ),
    "an output folder of too long a name": Case(
        f"{SYNTHETIC} --output-dir {LONG}", (f"--output-dir is {LONG}", "File name too long", "name a folder")
    ),
    "an output folder of too long a name in a new one": Case(
        f"{SYNTHETIC} --output-dir new/{LONG}", (f"--output-dir is new/{LONG}", "name a folder")
    ),
    "an output folder of too long a path": Case(
        f"{SYNTHETIC} --output-dir {'/'.join(['a' * 200] * 25)}", ("--output-dir is aaa", "name a folder")
    ),
    "an output folder without a name": Case(f"{SYNTHETIC} --output-dir ''", ("--output-dir",)),
    "an output folder that is a dangling link": Case(
        SYNTHETIC, ("--output-dir is debug_output", "name a folder"), a_dangling_link
    ),
    "an output folder that another run holds": Case(
        SYNTHETIC, ("--output-dir is debug_output", "another run", "wait for its end"), held_by_another_run
    ),
    "a held output folder to resume in": Case(
        RESUME, ("--output-dir is debug_output", "another run"), held_by_another_run
    ),
    **{
        f"a folder in the place of {name}": Case(
            SYNTHETIC, (f"debug_output/{name} is no file", "move it away"), a_folder_in_the_place_of(name)
        )
        for name in (*WRITTEN, "checkpoint_0001.pt", "checkpoint_0020.pt")
    },
    "a dangling link in the place of history.json": Case(
        SYNTHETIC, ("debug_output/history.json is no file",), a_dangling_link_as_history
    ),
    # Checkpoints.
    "a checkpoint cut short": Case(RESUME, NO_CHECKPOINT, spoilt(lambda content: content[:-1])),
    "half a checkpoint": Case(RESUME, NO_CHECKPOINT, spoilt(lambda content: content[: len(content) // 2])),
    "a checkpoint altered": Case(RESUME, NO_CHECKPOINT, spoilt(flipped)),
    "a checkpoint with more behind it": Case(RESUME, NO_CHECKPOINT, spoilt(lambda content: content + b"\n")),
    "an empty checkpoint": Case(RESUME, NO_CHECKPOINT, spoilt(lambda _: b"")),
    "a folder in a checkpoint's place": Case(RESUME, (f"{FIRST} is no file", "move"), a_folder_as_checkpoint),
    "two checkpoints, none good": Case(RESUME, NO_CHECKPOINT, two_bad_checkpoints),
    "a checkpoint of a later version": Case(
        RESUME, NO_CHECKPOINT, with_checksum(serialized({"version": VERSION + 1}))
    ),
    "a checkpoint without a version": Case(RESUME, NO_CHECKPOINT, with_checksum(serialized({"model": {}}))),
    "a checkpoint that lacks a part": Case(
        RESUME, NO_CHECKPOINT, with_checksum(serialized({"version": VERSION}))
    ),
    "a checkpoint with a list in it": Case(RESUME, NO_CHECKPOINT, with_checksum(serialized([1, 2]))),
    "a checkpoint that is text": Case(RESUME, NO_CHECKPOINT, with_checksum(b"hello")),
    "a checkpoint that is random bytes": Case(
        RESUME, NO_CHECKPOINT, with_checksum(random.Random(0).randbytes(999))
    ),
    "a checkpoint that is nothing but its checksum": Case(RESUME, NO_CHECKPOINT, with_checksum(b"")),
    "a checkpoint that is a picture": Case(RESUME, NO_CHECKPOINT, with_checksum(b"\x89PNG\r\n\x1a\n")),
    "a checkpoint that is an object of another class": Case(
        RESUME, NO_CHECKPOINT, with_checksum(serialized(Path("harmless")))
    ),
    "a checkpoint that is a plain pickle": Case(
        RESUME, NO_CHECKPOINT, with_checksum(pickle.dumps({"version": 1}))
    ),
    "a checkpoint whose settings are a list": Case(RESUME, ("--resume",), checkpoint(settings=[])),
    "a checkpoint of another network": Case(
        RESUME, ("--resume",), checkpoint(model={"weight": torch.zeros(3)})
    ),
    "a checkpoint of another batch size": Case(
        RESUME,
        ("--resume", "--batch-size is 512", "has 64", "or leave --resume out"),
        of_other(batch_size=64),
    ),
    "a checkpoint of another seed": Case(
        RESUME, ("--resume", "--seed is 0", "has 1", "another --output-dir"), of_other(seed=1)
    ),
    "a checkpoint of other patterns": Case(
        RESUME, ("--resume", "--exclude-layers", "has linear"), of_other(exclude_layers=("linear",))
    ),
    "a checkpoint of another preset": Case(
        RESUME, ("--resume", "--preset is debug"), of_other(preset="plan")
    ),
    "a checkpoint of fewer images": Case(
        RESUME, ("--resume", "--limit-train is not given", "has 5"), of_other(limit_train=5)
    ),
    "a checkpoint of more epochs": Case(
        RESUME, ("--resume", "--epochs is 3", "has 4", "that or more"), of_other(epochs=4)
    ),
    "a checkpoint on other data": Case(
        RESUME,
        ("--resume", "synthetic stand-in (16", "CIFAR-10 (50,000", "the same data"),
        checkpoint(data=DataRecord("CIFAR-10", "elsewhere", False, 10, 50_000, TEST_IMAGES)),
    ),
    # What someone sends.
    "no file to verify": Case("verify", ("FILE",)),
    "two files to verify": Case("verify a.codeq b.codeq", ("b.codeq",)),
    "a choice that is none, for verify": Case(
        "verify a.codeq --data mnist", ("--data", "'mnist'", "cifar10")
    ),
    "two dashes for a limit, for verify": Case(
        "verify a.codeq --limit-test=--", ("--limit-test", "expected one argument")
    ),
    "a limit that is no number, for verify": Case("verify a.codeq --limit-test x", ("--limit-test", "'x'")),
    "a limit that is no whole number, for verify": Case(
        "verify a.codeq --limit-test 1e400", ("--limit-test", "'1e400' is not a whole number")
    ),
    "a limit of nothing, for verify": Case(
        "verify a.codeq --data synthetic --limit-test 0",
        ("--limit-test is 0", "1 to 8"),
        received("a.codeq", packed_network),
    ),
    "a limit too large, for verify": Case(
        "verify a.codeq --data synthetic --limit-test 9",
        ("--limit-test is 9", "1 to 8"),
        received("a.codeq", packed_network),
    ),
    "no data to verify on": Case(
        "verify a.codeq --data cifar10", (*NOT_HAD, "Connection refused"), received("a.codeq", packed_network)
    ),
    "a received file that is not there": Case(f"verify a.codeq {FEW}", ("a.codeq", "No such file")),
    "a received file below a file": Case(
        f"verify taken/a.codeq {FEW}", ("taken/a.codeq", "Not a dir"), a_file
    ),
    "a received file of too long a name": Case(f"verify {LONG}.pt2 {FEW}", (LONG, "File name too long")),
    "a received file without a name": Case(f"verify '' {FEW}", ("expected", ".codeq or .pt2")),
    "a received folder": Case(f"verify a.codeq {FEW}", ("a.codeq", "Is a directory"), a_received_folder),
    "a received folder of torch's name": Case(
        f"verify a.pt2 {FEW}", ("a.pt2", "Is a directory"), a_received_folder
    ),
    "a received file of another ending": Case(
        f"verify a.pt {FEW}", ("a.pt", "expected", ".codeq or .pt2"), received("a.pt", packed_network)
    ),
    "an empty packed file": Case(
        f"verify a.codeq {FEW}", ("a.codeq", "truncated"), received("a.codeq", bytes)
    ),
    "a packed file cut short": Case(
        f"verify a.codeq {FEW}", ("a.codeq", "truncated"), received("a.codeq", lambda: packed_network()[:-1])
    ),
    "a packed file altered": Case(
        f"verify a.codeq {FEW}",
        ("a.codeq", "altered"),
        received("a.codeq", lambda: flipped(packed_network())),
    ),
    "a packed file with more behind it": Case(
        f"verify a.codeq {FEW}",
        ("a.codeq", "followed"),
        received("a.codeq", lambda: packed_network() + b"\n"),
    ),
    "random bytes for a packed file": Case(
        f"verify a.codeq {FEW}", ("a.codeq", "no packed network"), received("a.codeq", lambda: b"\x00" * 9999)
    ),
    "an exported network for a packed file": Case(
        f"verify a.codeq {FEW}", ("a.codeq", "no packed network"), received("a.codeq", exported)
    ),
    "a packed file that claims a word": Case(
        f"verify a.codeq {FEW}", ("a.codeq", "many"), received("a.codeq", lambda: packed_network('"many"'))
    ),
    "a packed file that claims a list": Case(
        f"verify a.codeq {FEW}", ("a.codeq", "[1]"), received("a.codeq", lambda: packed_network("[1]"))
    ),
    "an empty exported file": Case(f"verify a.pt2 {FEW}", ("a.pt2", "again"), received("a.pt2", bytes)),
    "an exported file cut short": Case(
        f"verify a.pt2 {FEW}", ("a.pt2", "again"), received("a.pt2", lambda: exported()[:-100])
    ),
    "an exported file altered": Case(
        f"verify a.pt2 {FEW}", ("a.pt2", "again"), received("a.pt2", lambda: flipped(exported()))
    ),
    "random bytes for an exported file": Case(
        f"verify a.pt2 {FEW}", ("a.pt2", "again"), received("a.pt2", lambda: random.Random(0).randbytes(999))
    ),
    "a state_dict for an exported file": Case(
        f"verify a.pt2 {FEW}", ("a.pt2", "again"), received("a.pt2", lambda: serialized({"weight": 1}))
    ),
    "a packed file for an exported file": Case(
        f"verify a.pt2 {FEW}", ("a.pt2", "again"), received("a.pt2", packed_network)
    ),
    "an exported network that takes no images": Case(
        f"verify a.pt2 {FEW}", ("a.pt2",), received("a.pt2", exported)
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_bad_input_gets_one_sentence_and_status_2_and_leaves_every_file_as_it_was(
    here: Path, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(debug_run, "train_epoch", refuse)
    kept = case.prepare(here)
    before = tree(here)
    status, out, err = run_command(case.command)
    assert tree(here) == before
    assert_one_sentence(err)
    assert [word for word in case.words if word not in err] == []
    assert status == 2
    assert "Epoch |" not in out and "Accuracy" not in out
    del kept


AT_ITS_RANGE = (
    [(name, value) for name in WHOLE for value in (LEAST.get(name, 1), MOST.get(name, 10**18))]
    + [(name, float(text)) for name in NUMBERS for text in ("0", "-0.0", "5e-324", LARGEST_FLOAT32)]
    + [(name, float(LARGEST_FLOAT)) for name in NUMBERS if name != "sparsity_weight"]
    + [("beta2", value) for value in (0.0, -0.0, 5e-324, 1 - 2.0**-53)]
    + [(name, choice) for name, choices in CHOSEN.items() for choice in choices]
)


@pytest.mark.parametrize(("name", "value"), AT_ITS_RANGE)
def test_a_value_at_the_end_of_its_range_is_taken_as_it_is(name: str, value: Any) -> None:
    for arguments in ([f"{flag(name)}={value}"], [flag(name), str(value)]):
        assert getattr(parse_settings(arguments), name) == value


# Mistakes that show only in a run follow the same rule, on runs of one step or two.


@pytest.fixture
def quick(here: Path, quick_end: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs in `here` take a second."""
    monkeypatch.setattr("experiments.plots.figures", lambda *_: dict.fromkeys(PICTURES))
    return here


QUICK = f"{SYNTHETIC} --device cpu --threads 1 --epochs 1 --preflight off --model own_networks:Small"


def assert_ended_well_or_was_refused_before_the_work(
    folder: Path, status: int | str | None, out: str, err: str
) -> None:
    """Status 0 or 1 with the whole report, or 2 with a sentence and before any training."""
    assert status in (0, 1, 2)
    if status == 2:
        assert_one_sentence(err)
        assert "Epoch |" not in out, f"refused after the training: {err}"
        return
    assert err == ""
    history = json.loads((folder / "debug_output" / "history.json").read_text())
    assert history["stopped"] or "--- Verdict ---" in out


@pytest.mark.parametrize(
    "arguments",
    [
        "--weights-lr 1e10",
        f"--weights-lr {2.0**-200!r} --weights-decay {2.0**200!r}",
        "--sparsity-delay 1e308 --sparsity-ramp 1e308",
        "--sparsity-delay 0 --sparsity-ramp 5e-324 --sparsity-weight 3.4028234663852886e38",
        f"--batch-size {10**30}",
        f"--batch-norm-batches {10**19} --pace-steps {10**30}",
        "--bit-lr 1e300 --bit-decay 1e300",
        "--exclude-layers",
    ],
)
def test_a_run_with_extreme_settings_ends_with_its_report_or_is_refused_before_it_trains(
    quick: Path, arguments: str
) -> None:
    assert_ended_well_or_was_refused_before_the_work(quick, *run_command(f"{QUICK} {arguments}"))


def test_a_batch_size_larger_than_a_machine_word_can_be_resumed(quick: Path) -> None:
    command = f"{QUICK} --batch-size {10**30}"
    run_command(command)
    status, out, err = run_command(f"{command} --epochs 2 --resume")
    assert status in (0, 1) and err == "" and "Resumed:   after epoch 1" in out


def test_a_folder_with_the_name_of_a_later_checkpoint_stops_no_run_that_goes_on(quick: Path) -> None:
    run_command(QUICK)
    (quick / "debug_output" / "checkpoint_0009.pt").mkdir()
    status, out, err = run_command(f"{QUICK} --epochs 2 --resume")
    assert "checkpoint_0009.pt cannot be read (Is a directory)" in out and "Resumed:   after epoch 1" in out
    assert status in (0, 1) and err == ""


@pytest.mark.parametrize("name", ["checkpoint_best.pt", "checkpoint_0001_copy.pt"])
def test_a_checkpoint_that_the_user_has_put_by_is_still_there_after_a_run_that_goes_on(
    quick: Path, name: str
) -> None:
    run_command(QUICK)
    (quick / "debug_output" / name).write_bytes((quick / FIRST).read_bytes())
    before = tree(quick)
    status, out, err = run_command(f"{QUICK} --epochs 2 --resume")
    assert status in (0, 1) and err == "" and "Resumed:   after epoch 1" in out
    assert tree(quick).get(f"debug_output/{name}") == before[f"debug_output/{name}"]


def test_a_folder_with_the_name_of_litter_stops_no_run(quick: Path) -> None:
    (quick / "debug_output" / ".mine.1.part").mkdir(parents=True)
    assert_ended_well_or_was_refused_before_the_work(quick, *run_command(QUICK))
    assert (quick / "debug_output" / ".mine.1.part").is_dir()


def test_what_a_received_file_says_of_itself_stays_on_its_line(here: Path) -> None:
    forged = "debug\x1b[2K\nAccuracy: 99.99 %"
    (here / "a.codeq").write_bytes(pack_network(resnet20(), {"preset": forged}, {}))
    status, out, _ = run_command(f"verify a.codeq {FEW}")
    assert status == 3
    assert "\x1b" not in out and "\nAccuracy: 99.99 %" not in out


def test_verify_shows_a_name_whose_letters_standard_output_does_not_have(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "größe.codeq").write_bytes(packed_network())
    shown = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    assert verify.main(["größe.codeq", *shlex.split(FEW)]) == 3
    shown.seek(0)
    assert "gr\\xf6\\xdfe.codeq" in shown.read()


# Strange surroundings. Each run is a process of its own, and two run at a time.

VERIFY = [sys.executable, "-m", "experiments.verify"]
SMALL_STAND_IN = """
import sys
from experiments import compressed, data, debug_run
data.SYNTHETIC_TRAIN, data.SYNTHETIC_TEST = 64, 32
"""
QUICK_END = """
compressed.exported = lambda network, claims: b"an exported network"
compressed.read_back = lambda content, network, *_: (sum(p.numel() for p in network.parameters()), 0.0)
compressed.measure_latency = lambda networks, images: {}
"""
NO_PICTURES = """
from experiments import plots
plots.rendered = lambda figure, kind="png": b"a picture"
"""
WHOLE_RUN = [sys.executable, "-c", SMALL_STAND_IN + "sys.exit(debug_run.main())"]
DRAWING_RUN = [sys.executable, "-c", SMALL_STAND_IN + QUICK_END + "sys.exit(debug_run.main())"]
SHORT_RUN = [sys.executable, "-c", SMALL_STAND_IN + QUICK_END + NO_PICTURES + "sys.exit(debug_run.main())"]
TINY = shlex.split(
    "--preflight off --data synthetic --limit-train 64 --limit-test 32 --batch-size 32 --threads 1 "
    "--epochs 1 --device cpu"
)


@dataclass(frozen=True)
class Place:
    """A shell script that runs `"$@"`, the program with its arguments, in some surroundings."""

    script: str
    command: tuple[str, ...] = (*SHORT_RUN, *TINY)
    environment: dict[str, str] = field(default_factory=dict)
    output_dir: str = "debug_output"
    terminal: bool = False


RUNS = {
    "no HOME, no temporary folder, no terminal, Ctrl-C ignored": Place(
        """unset HOME; trap '' INT; "$@" < /dev/null > out.txt &
        until grep -q 'Epoch |' out.txt || ! kill -0 $!; do sleep 0.1; done; kill -INT $!; wait $!""",
        (*WHOLE_RUN, *TINY),
        {"TMPDIR": "/dev/null/none", "TERM": ""},
    ),
    "no letters but ASCII, and a matplotlib backend that is none": Place(
        '"$@"',
        (*DRAWING_RUN, *TINY),
        {
            "MPLBACKEND": "nonsense",
            "LC_ALL": "C",
            "PYTHONUTF8": "0",
            "PYTHONCOERCECLOCALE": "0",
            "PYTHONIOENCODING": "ascii:strict",
        },
        output_dir="ausgabe-äöü-漢字",
    ),
    "a terminal of 20 columns, and a home that is a file": Place(
        'stty cols 20; "$@"', environment={"HOME": "/dev/null"}, terminal=True
    ),
    "standard output closed": Place('"$@" >&-'),
}
VERIFY_HERE = (*VERIFY, "a.codeq", *shlex.split(FEW))
REFUSED = {
    "a full disk": Place('"$@" > /dev/full'),
    "a reader that leaves after a line": Place('"$@" | head -1 > /dev/null; exit ${PIPESTATUS[0]}'),
    "a full disk for verify": Place('"$@" > /dev/full', VERIFY_HERE),
}
UNHEARD = {
    "a bad value with all output closed": Place('"$@" --epochs 0 >&- 2>&-'),
    "a bad value with both on a full disk": Place('"$@" --epochs 0 > /dev/full 2>&1'),
}


@dataclass(frozen=True)
class Ended:
    status: int
    out: bytes
    err: str
    output_dir: Path


def run_in(place: Place, folder: Path) -> Ended:
    if place.command == VERIFY_HERE:
        (folder / "a.codeq").write_bytes(packed_network())
    output_dir = folder / place.output_dir
    command = [*place.command, *(["--output-dir", str(output_dir)] if "--epochs" in place.command else [])]
    master, inside = pty.openpty() if place.terminal else (None, None)
    with subprocess.Popen(
        ["timeout", str(DEADLINE), "bash", "-c", place.script, "bash", *command],
        cwd=folder,
        env=environment() | place.environment,
        stdin=inside,
        stdout=inside or subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        out = b""
        if master is not None:
            os.close(inside)
            with contextlib.suppress(OSError):  # Linux reports a closed other end as an error.
                while block := os.read(master, 1 << 16):
                    out += block
            os.close(master)
        rest, err = process.communicate()
    return Ended(process.returncode, out + (rest or b""), err.decode(), output_dir)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ended]:
    """Runs a program in one of the places, once."""

    @functools.cache
    def run(name: str) -> Ended:
        return run_in((RUNS | REFUSED | UNHEARD)[name], tmp_path_factory.mktemp("place"))

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_in_strange_surroundings_a_run_still_ends_with_its_report(
    ended: Callable[[str], Ended], name: str
) -> None:
    done = ended(name)
    assert "Traceback" not in done.err, done.err
    assert done.status in (0, 1), done
    history = json.loads((done.output_dir / "history.json").read_text())
    assert len(history["epochs"]) == 1 and history["stopped"] is None
    assert done.status == any(check["status"] == "FAIL" for check in history["verdict"])


@pytest.mark.slow
def test_on_a_narrow_terminal_the_live_line_stays_one_line(ended: Callable[[str], Ended]) -> None:
    out = ended("a terminal of 20 columns, and a home that is a file").out.decode()
    live = [piece.partition("\r")[0].rstrip("\n") for piece in out.split("\r\x1b[K")[1:]]
    steps = [text for text in live if text.startswith("epoch 1")]
    assert steps and max(map(len, steps)) < 20


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n if n == "a full disk" else pytest.param(n, marks=pytest.mark.slow) for n in REFUSED]
)
def test_where_nothing_can_be_said_or_written_the_program_ends_with_one_sentence(
    ended: Callable[[str], Ended], name: str
) -> None:
    done = ended(name)
    assert_one_sentence(done.err)
    assert done.status == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", UNHEARD)
def test_a_refusal_that_nobody_can_hear_still_gives_status_2(
    ended: Callable[[str], Ended], name: str
) -> None:
    assert ended(name).status == 2


# Any combination of settings.

WORDS = ["0", "1", "-1", "1.5", "1e400", "nan", "", " ", "x", "--", "-x", "(", str(10**30), "٣", "\x00"]
VALUES = st.sampled_from(
    [*WORDS, *(choice for choices in CHOSEN.values() for choice in choices), "5e-324", "-0.0", "1_000"]
) | st.text(max_size=5).map(lambda text: text.replace("-h", ""))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([item.name for item in fields(Settings)]),
            st.lists(VALUES, max_size=2),
            st.booleans(),
        ),
        max_size=6,
    ),
    st.lists(VALUES, max_size=1),
)
def test_any_command_line_is_taken_or_refused_in_one_sentence(
    flags: list[tuple[str, list[str], bool]], words: list[str]
) -> None:
    arguments = list(words)
    for name, values, joined in flags:
        arguments += [f"{flag(name)}={values[0]}"] if joined and values else [flag(name), *values]
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            assert isinstance(parse_settings(arguments), Settings)
        except SystemExit as stopped:
            assert stopped.code == 2
            assert_one_sentence(err.getvalue())
        else:
            assert err.getvalue() == ""


def extremes(*numbers: float) -> st.SearchStrategy[float]:
    return st.sampled_from([0.0, 5e-324, 1e-3, 1.0, *numbers])


TRAINED = st.fixed_dictionaries(
    {},
    optional={
        "preset": st.sampled_from(CHOSEN["preset"]),
        "precision": st.sampled_from(("float32", "bf16")),
        "seed": st.sampled_from((1, 2**63 - 1)),
        "batch_size": st.sampled_from((8, 15, 16, 10**30)),
        "limit_train": st.integers(1, 2),
        "limit_test": st.integers(1, 2),
        "batch_norm_batches": st.sampled_from((0, 1, sys.maxsize)),
        "pace_steps": st.sampled_from((0, 1, 10**30)),
        "beta2": st.sampled_from((0.0, 5e-324, 0.5, 1 - 2.0**-53)),
        "exclude_layers": st.sampled_from(("", ".", "conv", "^linear$")),
        **{name: extremes(1e10, float(LARGEST_FLOAT32)) for name in ("sparsity_weight", "sparsity_delay")},
        **{name: extremes(1e3, 1e30, float(LARGEST_FLOAT)) for name in NUMBERS if name != "sparsity_weight"},
    },
)


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(TRAINED)
def test_any_settings_that_are_taken_run_to_their_end_or_are_refused_in_one_sentence(
    quick: Path, chosen: dict[str, Any]
) -> None:
    shutil.rmtree(quick / "debug_output", ignore_errors=True)
    command = [*shlex.split(QUICK), *(f"{flag(name)}={value}" for name, value in chosen.items())]
    assert_ended_well_or_was_refused_before_the_work(quick, *run_command(command))
