"""Output files: whole or not at all, no litter, strict JSON, and a folder that is tried before the work."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.files import OutputError, prepare_folder, write_json, write_whole

quick = settings(max_examples=100, deadline=None, derandomize=True)
ROOT = Path(__file__).parent.parent


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


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
    """Make the writing fail half-way through its bytes, or at the renaming."""
    original = Path.write_bytes

    def half(self: Path, content: bytes) -> int:
        original(self, content[: len(content) // 2])
        raise error

    def fail(*_: object) -> None:
        raise error

    if at == "bytes":
        monkeypatch.setattr(Path, "write_bytes", half)
        monkeypatch.setattr(os, "write", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
        monkeypatch.setattr(Path, "rename", fail)
        monkeypatch.setattr(os, "replace", fail)
        monkeypatch.setattr(os, "rename", fail)


@pytest.mark.parametrize("at", ["bytes", "rename"])
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


@pytest.mark.parametrize("at", ["bytes", "rename"])
def test_ctrl_c_in_the_middle_leaves_the_old_content_and_no_litter_and_goes_on_up(tmp_path, monkeypatch, at):
    path = tmp_path / "history.json"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        break_off(patch, KeyboardInterrupt(), at)
        with pytest.raises(KeyboardInterrupt):
            write_whole(path, b"new content")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["history.json"]


KILLED = """
import os, sys
from pathlib import Path
from experiments.files import write_whole
Path.replace = Path.rename = os.replace = os.rename = lambda *_: os._exit(9)  # as a power cut would
write_whole(Path(sys.argv[1]), b"new content")
"""


def test_a_process_that_dies_before_the_end_leaves_the_old_content(tmp_path):
    path = tmp_path / "history.json"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, timeout=60)
    assert done.returncode == 9
    assert path.read_bytes() == b"old"


# None of them a matter of permissions: root may be running this.
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


def test_the_folder_is_made_with_those_above_it_and_left_empty(tmp_path):
    folder = tmp_path / "a" / "b"
    prepare_folder(folder)
    assert names(folder) == []


def test_a_folder_in_use_keeps_its_files(tmp_path):
    (tmp_path / "history.json").write_text("old")
    prepare_folder(tmp_path)
    assert names(tmp_path) == ["history.json"] and (tmp_path / "history.json").read_text() == "old"


@pytest.mark.parametrize("kind", ["a file", "below a file", "the kernel's own"])
def test_a_folder_that_cannot_be_written_is_refused_with_the_flag_and_its_value(tmp_path, kind):
    file = tmp_path / "file"
    file.write_text("old")
    folder = {"a file": file, "below a file": file / "a" / "b", "the kernel's own": Path("/proc/self")}[kind]
    if kind == "the kernel's own" and not folder.is_dir():
        pytest.skip("no /proc here")
    with pytest.raises(OutputError) as error:
        prepare_folder(folder)
    assert "--output-dir" in str(error.value) and str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert file.read_text() == "old" and names(tmp_path) == ["file"]


def test_a_folder_that_is_full_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        break_off(patch, OSError(28, "No space left on device"), "bytes")
        with pytest.raises(OutputError, match="No space left on device"):
            prepare_folder(tmp_path)
