"""Output files are whole or absent, JSON is strict, and a run locks its folder before it works."""

import fcntl
import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from folders import names, silent, tree
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import DEADLINE, ROOT

from experiments import files
from experiments.files import OutputError, archive_files, lock_folder, refuse_folders, write_json, write_whole
from experiments.live import Stopped

quick = settings(max_examples=100, deadline=None, derandomize=True)


# Whole or not at all


def test_a_new_file_holds_what_was_written_and_nothing_lies_beside_it(tmp_path):
    write_whole(tmp_path / "a.bin", b"\x00\r\n\xff")
    assert (tmp_path / "a.bin").read_bytes() == b"\x00\r\n\xff"
    assert names(tmp_path) == ["a.bin"]


def test_an_old_file_is_replaced_and_shorter_content_leaves_no_tail(tmp_path):
    path = tmp_path / "a.bin"
    write_whole(path, b"long, long ago")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new" and names(tmp_path) == ["a.bin"]


def test_a_reader_with_the_old_file_open_goes_on_reading_the_old_one(tmp_path):
    path = tmp_path / "a.bin"
    write_whole(path, b"old content")
    with path.open("rb") as reader:
        first = reader.read(3)
        write_whole(path, b"NEW CONTENT")
        assert first + reader.read() == b"old content"


def break_off(monkeypatch, error: BaseException, at: str) -> None:
    """Make a write fail half-way through its bytes, when they are forced to the disk, or at the renaming."""
    original = Path.open

    class HalfFile(io.FileIO):
        def write(self, content: bytes) -> int:
            super().write(content[: len(content) // 2])
            raise error

    def open_half(self: Path, mode: str = "r", *rest: object, **named: object) -> object:
        return HalfFile(self, mode) if "w" in mode else original(self, mode, *rest, **named)

    def fail(*_: object) -> None:
        raise error

    if at == "bytes":
        monkeypatch.setattr(Path, "open", open_half)
        monkeypatch.setattr(Path, "write_bytes", fail)
        monkeypatch.setattr(os, "write", fail)
    elif at == "sync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
        monkeypatch.setattr(Path, "rename", fail)
        monkeypatch.setattr(os, "replace", fail)
        monkeypatch.setattr(os, "rename", fail)


@pytest.mark.parametrize("at", ["bytes", "sync", "rename"])
@pytest.mark.parametrize("there_before", [True, False])
def test_a_full_disk_leaves_the_old_content_and_no_litter_and_is_said_in_one_sentence(
    tmp_path, monkeypatch, at, there_before
):
    path = tmp_path / "history.json"
    if there_before:
        path.write_bytes(b"old")
    before = names(tmp_path)
    with monkeypatch.context() as patch:
        break_off(patch, OSError(28, "No space left on device"), at)
        with pytest.raises(OutputError) as error:
            write_whole(path, b"new content")
    assert names(tmp_path) == before
    assert not there_before or path.read_bytes() == b"old"
    assert str(path) in str(error.value) and "No space left on device" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("at", ["bytes", "sync", "rename"])
def test_ctrl_c_in_the_middle_leaves_the_old_content_and_no_litter_and_goes_on_up(tmp_path, monkeypatch, at):
    path = tmp_path / "history.json"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        break_off(patch, Stopped(signal.SIGINT), at)
        with pytest.raises(Stopped):
            write_whole(path, b"new content")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["history.json"]


KILLED = """
import os, sys
from pathlib import Path
from experiments.files import write_whole
Path.replace = Path.rename = os.replace = os.rename = lambda *_: os._exit(9)  # as a power cut would
write_whole(Path(sys.argv[1]), b"new content")
"""


def test_the_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    path, done = tmp_path / "a.bin", []
    replace = Path.replace

    def sync(descriptor: int) -> None:
        done.append(("sync", os.fstat(descriptor).st_size, path.exists()))

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", lambda a, b: (done.append(("rename",)), replace(a, b)))
    write_whole(path, b"new content")
    assert done == [("sync", 11, False), ("rename",)]


def test_a_process_that_dies_before_the_end_leaves_the_old_content(tmp_path):
    path = tmp_path / "history.json"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, timeout=DEADLINE)
    assert done.returncode == 9
    assert path.read_bytes() == b"old"


# No case depends on permissions, which do not hold back root.
PLACES = {
    "no such folder": "nowhere/a.json",
    "a file in place of the folder": "file/a.json",
    "a folder in place of the file": "folder",
    "a name that is too long": "a" * 300,
    "the kernel's own": "/proc/self/a.json",
}


@pytest.mark.parametrize("kind", PLACES)
def test_a_place_that_cannot_be_written_is_an_output_error_that_names_it(tmp_path, kind):
    (tmp_path / "file").write_text("a file, not a folder")
    (tmp_path / "folder").mkdir()
    path = tmp_path / PLACES[kind]
    if kind == "the kernel's own" and not path.parent.is_dir():
        pytest.skip("no /proc here")
    before = names(tmp_path)
    with pytest.raises(OutputError) as error:
        write_whole(path, b"content")
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert names(tmp_path) == before


# JSON


def read_strictly(path: Path) -> object:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(path.read_bytes().decode("ascii"), parse_constant=refuse)


def test_numbers_that_are_not_finite_become_words_wherever_they_stand(tmp_path):
    path = tmp_path / "a.json"
    nan = math.nan
    write_json(path, {"a": [1, math.inf, (-math.inf, {"b": nan})], "c": nan, "d": 0.1, "e": None, "f": True})
    assert read_strictly(path) == {
        "a": [1, "inf", ["-inf", {"b": "nan"}]], "c": "nan", "d": 0.1, "e": None, "f": True}  # fmt: skip


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def with_words(value: object) -> object:
    if isinstance(value, dict):
        return {k: with_words(v) for k, v in value.items()}
    if isinstance(value, list):
        return [with_words(v) for v in value]
    if isinstance(value, float):
        return "nan" if value != value else {math.inf: "inf", -math.inf: "-inf"}.get(value, value)
    return value


@quick
@given(value=values)
def test_what_is_read_back_is_what_was_written_to_the_last_digit(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "any.json"
    write_json(path, value)
    assert read_strictly(path) == with_words(value)


def test_json_ends_with_a_line_end(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    assert (tmp_path / "a.json").read_text().endswith("}\n")


def test_what_json_cannot_hold_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_strictly(path) == 1 and names(tmp_path) == ["a.json"]


# The folder


def test_the_folder_is_made_with_those_above_it_and_has_nothing_in_it_while_it_is_held(tmp_path):
    folder = tmp_path / "a" / "b"
    with lock_folder(folder, silent):
        assert names(folder) == []


def test_a_folder_that_was_made_and_stays_empty_is_gone_at_the_end_and_one_with_a_file_stays(tmp_path):
    with lock_folder(tmp_path / "a" / "b", silent):
        pass
    assert names(tmp_path) == []
    with lock_folder(tmp_path / "a" / "b", silent):
        write_whole(tmp_path / "a" / "b" / "file", b"kept")
    assert names(tmp_path / "a" / "b") == ["file"]


def test_an_empty_folder_that_was_there_before_stays(tmp_path):
    (tmp_path / "a").mkdir()
    with lock_folder(tmp_path / "a", silent):
        pass
    assert names(tmp_path) == ["a"]


def test_what_goes_wrong_while_it_is_held_goes_on_up_and_lets_go_of_it(tmp_path):
    with pytest.raises(Stopped), lock_folder(tmp_path / "a", silent):
        raise Stopped(signal.SIGTERM)
    assert names(tmp_path) == []
    with lock_folder(tmp_path / "a", silent):
        pass


def test_a_folder_in_use_keeps_its_files_and_loses_what_a_killed_run_left_half_written(tmp_path):
    kept = ["history.json", "a.part", ".hidden", ".a.b.part", "checkpoint_0001.pt.1.part", ".mine.123.part"]
    for name in (*kept, ".history.json.4711.part", ".checkpoint_0001.pt.1.part", ".probe.99.part"):
        (tmp_path / name).write_text("old")
    with lock_folder(tmp_path, silent):
        assert names(tmp_path) == sorted(kept)
    assert names(tmp_path) == sorted(kept) and (tmp_path / "history.json").read_text() == "old"


@pytest.mark.parametrize("kind", ["a file", "below a file", "the kernel's own"])
def test_a_folder_that_cannot_be_written_is_refused_with_the_flag_and_its_value(tmp_path, kind):
    file = tmp_path / "file"
    file.write_text("old")
    folder = {"a file": file, "below a file": file / "a" / "b", "the kernel's own": Path("/proc/self")}[kind]
    if kind == "the kernel's own" and not folder.is_dir():
        pytest.skip("no /proc here")
    with pytest.raises(OutputError) as error, lock_folder(folder, silent):
        raise AssertionError("held")
    assert "--output-dir" in str(error.value) and str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert file.read_text() == "old" and names(tmp_path) == ["file"]


def test_a_folder_that_is_full_is_refused_and_left_as_it_was(tmp_path, monkeypatch):
    def half(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(OutputError, match="No space left on device"), lock_folder(tmp_path, silent):
            raise AssertionError("held")
    assert names(tmp_path) == []


# One run at a time

HOLDING = """
import os, sys
from pathlib import Path
from experiments.files import lock_folder
with lock_folder(Path(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_held_folder_is_refused_to_a_second_process_until_the_first_ends_however_it_ends(tmp_path):
    command = [sys.executable, "-c", HOLDING, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as first:
        assert first.stdout.readline() == "held\n"
        for _ in range(2):
            with pytest.raises(OutputError) as error, lock_folder(tmp_path, silent):
                raise AssertionError("held twice")
        assert f"--output-dir is {tmp_path}, which another run is writing to" in str(error.value)
        first.kill()
    with lock_folder(tmp_path, silent):
        assert names(tmp_path) == []


def test_a_refused_second_run_removes_nothing_of_what_the_first_is_writing(tmp_path):
    with lock_folder(tmp_path / "a", silent):
        half = tmp_path / "a" / ".history.json.1.part"
        half.write_text("half")
        with pytest.raises(OutputError), lock_folder(tmp_path / "a", silent):
            raise AssertionError("held twice")
        assert half.read_text() == "half" and names(tmp_path / "a") == [half.name]


def test_one_folder_may_be_held_again_and_again_and_keeps_no_descriptor_open(tmp_path):
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else 0

    before = descriptors()
    for _ in range(3):
        with lock_folder(tmp_path, silent):
            pass
    assert descriptors() == before


@pytest.mark.parametrize("lacking", ["the module", "the file system's support"])
def test_where_nothing_can_be_locked_that_is_said_and_the_run_goes_on(tmp_path, monkeypatch, lacking):
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    if lacking == "the module":
        monkeypatch.setattr(files, "fcntl", None)
    else:
        monkeypatch.setattr(fcntl, "flock", refuse)
    said: list[str] = []
    writing = tmp_path / ".history.json.4711.part"  # perhaps another run is
    writing.write_text("half")
    with lock_folder(tmp_path, said.append):
        assert writing.read_text() == "half"
    assert len(said) == 1 and str(tmp_path) in said[0] and "second run" in said[0] and "\n" not in said[0]


# An earlier run's files


def test_only_files_and_free_places_are_not_refused(tmp_path):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "lost").symlink_to("nobody@host.123")
    refuse_folders(tmp_path / name for name in ("file", "link", "free"))
    for name in ("folder", "lost"):
        with pytest.raises(OutputError, match=f"{tmp_path / name} is no file"):
            refuse_folders([tmp_path / "file", tmp_path / name])


def test_what_is_there_is_moved_into_the_next_free_folder_byte_for_byte_and_the_rest_stays(tmp_path):
    for name in ("a.png", "c_1.pt", "c_2.pt", "mine.txt"):
        (tmp_path / name).write_bytes(name.encode() * 1000)
    (tmp_path / "earlier-1").mkdir()
    (tmp_path / "earlier-2").write_text("a file of that name")
    before = tree(tmp_path)
    files = [tmp_path / name for name in ("a.png", "c_1.pt", "absent", "c_2.pt", "earlier-1")]
    assert archive_files(tmp_path, files) == tmp_path / "earlier-3"
    moved = {f"earlier-3/{name}": before[name] for name in ("a.png", "c_1.pt", "c_2.pt")}
    stayed = {name: before[name] for name in ("mine.txt", "earlier-1", "earlier-2")}
    assert tree(tmp_path) == moved | stayed | {"earlier-3": "folder"}


def test_where_nothing_is_there_nothing_is_made(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    assert archive_files(tmp_path, [tmp_path / "a.png"]) is None
    assert names(tmp_path) == ["mine.txt"]


def test_a_link_that_leads_nowhere_takes_a_number_too(tmp_path):
    (tmp_path / "earlier-1").symlink_to(tmp_path / "gone")
    (tmp_path / "a.png").write_text("a")
    assert archive_files(tmp_path, [tmp_path / "a.png"]) == tmp_path / "earlier-2"


def test_files_that_cannot_be_moved_are_one_sentence_and_still_there(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_text("a")
    with monkeypatch.context() as patch:
        break_off(patch, OSError(28, "No space left on device"), "rename")
        with pytest.raises(OutputError) as error:
            archive_files(tmp_path, [tmp_path / "a.png"])
    assert str(tmp_path) in str(error.value) and "No space left" in str(error.value)
    assert "\n" not in str(error.value) and (tmp_path / "a.png").read_text() == "a"
    assert names(tmp_path) == ["a.png"]
