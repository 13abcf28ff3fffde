"""CIFAR-10 and CIFAR-100 on disk and from a server: what is read or fetched, and each fault's name."""

import errno
import hashlib
import http.server
import io
import itertools
import os
import pickle
import re
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from programs import DEADLINE
from torchvision.datasets import CIFAR10, CIFAR100

from experiments import cifar
from experiments.cifar import CIFARS, CifarImages, DataError, NoCifarError, how_to_bring_it, load_cifar
from experiments.data import load_dataset

PER_FILE = 6  # images in each batch file of the tiny CIFAR-10
REAL_SOURCES = {data: files.sources for data, files in CIFARS.items()}
FOLDER, ARCHIVE = CIFARS["cifar10"].folder, CIFARS["cifar10"].archive


def loaded(data_dir: Path, said: list[str] | None = None) -> CifarImages:
    return load_cifar(CIFARS["cifar10"], data_dir, (said if said is not None else []).append)


# On disk.


@dataclass
class TinyCifar:
    """CIFAR-10's files with a few images each, with a table of their MD5 sums in `CIFARS`."""

    files: dict[str, bytes]
    archive: bytes

    def put_folder(self, data_dir: Path) -> Path:
        folder = data_dir / FOLDER
        folder.mkdir(parents=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return folder

    def put_archive(self, data_dir: Path) -> Path:
        data_dir.mkdir(parents=True, exist_ok=True)
        path = data_dir / ARCHIVE
        path.write_bytes(self.archive)
        return path


def batch_file(number: int) -> bytes:
    images = np.random.default_rng(number).integers(256, size=(PER_FILE, 3072), dtype=np.uint8)
    return pickle.dumps({b"data": images, b"labels": [(number + i) % 10 for i in range(PER_FILE)]})


def python2_pickle(content: dict[str, Any]) -> bytes:
    """A pickle whose keys are strings of Python 2, as in the real files: bytes to us, text to torchvision."""
    written = pickle.dumps(content, protocol=2)
    for key in content:
        text = key.encode()
        written = written.replace(
            b"X" + len(text).to_bytes(4, "little") + text, b"U" + bytes([len(text)]) + text
        )
    return written


def packed(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def change_files(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    monkeypatch.setitem(CIFARS, "cifar10", replace(CIFARS["cifar10"], **changes))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    change_files(monkeypatch, sources=())
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> TinyCifar:
    due = CIFARS["cifar10"]
    names = [*due.train_files, *due.test_files]
    files = {name: batch_file(number) for number, name in enumerate(names)} | {"batches.meta": b"names"}
    archive = packed({f"{FOLDER}/{name}": content for name, content in files.items()})
    tables = {
        table: {name: md5(files[name]) for name in getattr(due, table)}
        for table in ("train_files", "test_files", "meta_files")
    }
    change_files(monkeypatch, **tables)
    use_archive(monkeypatch, archive)
    return TinyCifar(files, archive)


def use_archive(monkeypatch: pytest.MonkeyPatch, archive: bytes) -> None:
    change_files(monkeypatch, archive_md5=md5(archive), archive_bytes=len(archive))


@pytest.mark.parametrize(("data", "theirs"), [("cifar10", CIFAR10), ("cifar100", CIFAR100)])
def test_names_and_sums_are_those_of_torchvision(data: str, theirs: Any) -> None:
    ours = CIFARS[data]
    assert (ours.folder, ours.archive, ours.archive_md5) == (
        theirs.base_folder,
        theirs.filename,
        theirs.tgz_md5,
    )
    assert list(map(list, ours.train_files.items())) == theirs.train_list
    assert list(map(list, ours.test_files.items())) == theirs.test_list
    assert ours.meta_files == {theirs.meta["filename"]: theirs.meta["md5"]}


@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
def test_the_first_source_is_that_of_torchvision(data: str) -> None:
    assert REAL_SOURCES[data][0] == {"cifar10": CIFAR10, "cifar100": CIFAR100}[data].url


def test_cifar100_is_read_with_its_fine_labels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real files hold both kinds of labels, and torchvision takes the fine ones too."""
    numbers = np.random.default_rng(0)
    files, expected = {}, {}
    for name, count in (("train", 7), ("test", 3)):
        images = numbers.integers(256, size=(count, 3072), dtype=np.uint8)
        fine = numbers.integers(100, size=count).tolist()
        coarse = numbers.integers(20, size=count).tolist()
        files[name] = python2_pickle({"data": images, "fine_labels": fine, "coarse_labels": coarse})
        expected[name] = (images, fine)
    files["meta"] = python2_pickle({"fine_label_names": [str(i) for i in range(100)]})
    sums = {name: md5(content) for name, content in files.items()}
    archive = packed({f"cifar-100-python/{name}": content for name, content in files.items()})
    monkeypatch.setitem(
        CIFARS,
        "cifar100",
        replace(
            CIFARS["cifar100"],
            train_files={"train": sums["train"]},
            test_files={"test": sums["test"]},
            meta_files={"meta": sums["meta"]},
            archive_md5=md5(archive),
        ),
    )
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(archive)
    ours = load_cifar(CIFARS["cifar100"], tmp_path, [].append)
    for name, images, labels in (
        ("train", ours.train_images, ours.train_labels),
        ("test", ours.test_images, ours.test_labels),
    ):
        assert np.array_equal(images.flatten(1).numpy(), expected[name][0])
        assert labels.tolist() == expected[name][1]
    # The folder that was unpacked is the one that torchvision reads.
    for attribute, name in (("train_list", "train"), ("test_list", "test")):
        monkeypatch.setattr(CIFAR100, attribute, [[name, sums[name]]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": sums["meta"]})
    theirs = CIFAR100(str(tmp_path), train=True)
    assert theirs.targets == ours.train_labels.tolist()
    assert np.array_equal(theirs.data.transpose(0, 3, 1, 2), ours.train_images.numpy())


def test_a_good_folder_is_read_in_the_order_of_its_files_and_nothing_is_written(
    tiny: TinyCifar, tmp_path: Path
) -> None:
    folder = tiny.put_folder(tmp_path)
    dataset = loaded(tmp_path)
    assert dataset.source == str(folder)
    assert dataset.train_images.shape == (5 * PER_FILE, 3, 32, 32)
    for number in range(5):
        content = pickle.loads(batch_file(number))
        part = slice(number * PER_FILE, (number + 1) * PER_FILE)
        assert np.array_equal(dataset.train_images[part].flatten(1).numpy(), content[b"data"])
        assert dataset.train_labels[part].tolist() == content[b"labels"]
    assert dataset.test_labels.tolist() == pickle.loads(batch_file(5))[b"labels"]
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]


def test_the_folder_is_good_without_the_file_of_names(tiny: TinyCifar, tmp_path: Path) -> None:
    (tiny.put_folder(tmp_path) / "batches.meta").unlink()
    assert len(loaded(tmp_path).train_labels) == 5 * PER_FILE


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() if path.is_file() else b"folder" for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (empty, "is truncated or altered (0 bytes, MD5 d41d8cd98f00b204e9800998ecf8427e"),
        (cut_short, "is truncated or altered ("),
        (Path.unlink, "is missing"),
        (make_a_folder, "cannot be read (Is a directory)"),
    ],
)
def test_a_bad_batch_file_is_named_and_left_as_it_is(
    tiny: TinyCifar, tmp_path: Path, damage: Callable[[Path], None], says: str
) -> None:
    folder = tiny.put_folder(tmp_path)
    damage(folder / "data_batch_3")
    before = contents(folder)
    with pytest.raises(DataError) as error:
        loaded(tmp_path)
    assert str(error.value).startswith(f"{folder / 'data_batch_3'} {says}")
    assert contents(folder) == before


def test_a_file_in_the_place_of_the_folder_is_an_error_in_one_sentence(
    tiny: TinyCifar, tmp_path: Path
) -> None:
    (tmp_path / FOLDER).write_text("not a folder")
    with pytest.raises(DataError, match=r"data_batch_1 cannot be read \(Not a directory\), and 5 more files"):
        loaded(tmp_path)


class Planted:
    """Unpickling this writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.mark,)  # type: ignore[return-value]


def test_a_pickle_with_another_md5_is_never_loaded(tiny: TinyCifar, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    planted = pickle.dumps(Planted(mark))
    (tiny.put_folder(tmp_path) / "test_batch").write_bytes(planted)
    with pytest.raises(DataError, match="test_batch is truncated or altered"):
        loaded(tmp_path)
    assert not mark.exists()
    pickle.loads(planted)
    assert mark.exists()  # the trap works


def test_a_good_archive_by_itself_is_unpacked_and_then_the_folder_is_used(
    tiny: TinyCifar, tmp_path: Path
) -> None:
    archive = tiny.put_archive(tmp_path)
    first = loaded(tmp_path)
    folder = tmp_path / FOLDER
    assert first.source == str(archive)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == tiny.files
    archive.unlink()
    second = loaded(tmp_path)
    assert second.source == str(folder)
    assert torch.equal(first.train_images, second.train_images)
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]


def test_a_folder_that_another_run_has_unpacked_meanwhile_stays_in_its_place(
    tiny: TinyCifar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.put_archive(tmp_path)
    read = cifar._read_archive

    def while_another_unpacks(*arguments: Any) -> dict[str, bytes]:
        tiny.put_folder(tmp_path)
        return read(*arguments)

    monkeypatch.setattr(cifar, "_read_archive", while_another_unpacks)
    said: list[str] = []
    loaded(tmp_path, said)
    assert said == [] and sorted(path.name for path in tmp_path.iterdir()) == sorted([FOLDER, ARCHIVE])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_in_a_batch_files_place_is_not_waited_for(tiny: TinyCifar, tmp_path: Path) -> None:
    path = tiny.put_folder(tmp_path) / "data_batch_1"
    path.unlink()
    os.mkfifo(path)
    # Should the program open the pipe, this ends the wait, and the test fails.
    release = threading.Timer(600, lambda: os.close(os.open(path, os.O_WRONLY)))
    release.daemon = True
    release.start()
    with pytest.raises(DataError, match="data_batch_1 is no plain file"):
        loaded(tmp_path)
    release.cancel()


def test_a_bad_folder_beside_a_good_archive_is_moved_aside_and_both_are_told(
    tiny: TinyCifar, tmp_path: Path
) -> None:
    said: list[str] = []
    for number in (1, 2):
        folder = tmp_path / FOLDER
        if number == 1:
            tiny.put_folder(tmp_path)
        (folder / "data_batch_2").write_bytes(b"altered")
        tiny.put_archive(tmp_path)
        loaded(tmp_path, said)
        aside = tmp_path / f"{FOLDER}.aside-{number}"
        assert (aside / "data_batch_2").read_bytes() == b"altered"
        assert (folder / "data_batch_2").read_bytes() == tiny.files["data_batch_2"]
        assert "data_batch_2 is truncated or altered" in said[-1] and said[-1].endswith(str(aside))


def test_an_altered_archive_is_named_and_left_as_it_is(tiny: TinyCifar, tmp_path: Path) -> None:
    archive = tiny.put_archive(tmp_path)
    archive.write_bytes(tiny.archive[:-1])
    with pytest.raises(DataError, match=f"{archive} is truncated or altered .*: replace it"):
        loaded(tmp_path)
    assert archive.read_bytes() == tiny.archive[:-1]


def test_an_altered_folder_beside_an_altered_archive_has_both_named(tiny: TinyCifar, tmp_path: Path) -> None:
    (tiny.put_folder(tmp_path) / "data_batch_5").write_bytes(b"")
    tiny.put_archive(tmp_path).write_bytes(b"")
    with pytest.raises(DataError, match=f"data_batch_5 is truncated.*{ARCHIVE} is truncated"):
        loaded(tmp_path)


def test_only_the_expected_files_leave_the_archive(
    tiny: TinyCifar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = {f"{FOLDER}/{name}": content for name, content in tiny.files.items()}
    tiny.archive = packed(members | {"../outside": b"x", f"{FOLDER}/extra": b"x", "/tmp/absolute": b"x"})
    use_archive(monkeypatch, tiny.archive)
    tiny.put_archive(tmp_path / "data")
    loaded(tmp_path / "data")
    assert {path.name for path in (tmp_path / "data" / FOLDER).iterdir()} == set(tiny.files)
    assert not (tmp_path / "outside").exists()


def test_a_full_disk_while_unpacking_costs_a_line_and_leaves_nothing_behind(
    tiny: TinyCifar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tiny.put_archive(tmp_path)
    said: list[str] = []
    monkeypatch.setattr(Path, "write_bytes", disk_is_full)
    assert loaded(tmp_path, said).source == str(archive)
    assert "could not be written (No space left on device)" in said[-1]
    assert list(tmp_path.iterdir()) == [archive]


def disk_is_full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


# The download, from a server in this process.


class Server(http.server.ThreadingHTTPServer):
    """Serves one archive in many ways; the path says how."""

    archive: bytes
    over: threading.Event  # set at the end of the test, so that no answer outlives it
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are what these tests are about."""


class Answers(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        getattr(self, f"serve_{self.path.strip('/')}")(self.server.archive)

    def start(self, size: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.end_headers()

    def serve_good(self, archive: bytes) -> None:
        self.start(len(archive))
        for start in range(0, len(archive), 10_000):
            self.wfile.write(archive[start : start + 10_000])

    def serve_moved(self, archive: bytes) -> None:
        self.send_response(302)
        self.send_header("Location", "/good")
        self.end_headers()

    def serve_slow(self, archive: bytes) -> None:
        self.start(len(archive))
        for byte in archive:
            self.wfile.write(bytes([byte]))
            self.server.over.wait(0.001)

    def serve_stalled(self, archive: bytes) -> None:
        self.start(len(archive))
        self.wfile.write(archive[:1000])
        self.server.over.wait(DEADLINE)

    def serve_silent(self, archive: bytes) -> None:
        self.server.over.wait(DEADLINE)

    def serve_broken(self, archive: bytes) -> None:
        self.start(len(archive))
        self.wfile.write(archive[:-1])

    def serve_wrong(self, archive: bytes) -> None:
        self.start(len(archive))
        self.wfile.write(archive[:-1] + b"?")

    def serve_endless(self, archive: bytes) -> None:
        self.send_response(200)
        self.end_headers()
        while True:
            self.wfile.write(bytes(10_000))

    def serve_missing(self, archive: bytes) -> None:
        self.send_error(404, "Not Found")

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def server(tiny: TinyCifar, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(cifar, "CONNECT_SECONDS", DEADLINE)
    monkeypatch.setattr(cifar, "STALL_SECONDS", DEADLINE)
    with Server(("127.0.0.1", 0), Answers) as running:
        running.archive, running.over = tiny.archive, threading.Event()
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.over.set()
        running.shutdown()
        thread.join()


def use_sources(monkeypatch: pytest.MonkeyPatch, server: Server, *ways: str) -> list[str]:
    sources = [f"http://127.0.0.1:{server.server_port}/{way}" for way in ways]
    change_files(monkeypatch, sources=tuple(sources))
    return sources


@pytest.mark.parametrize("way", ["good", "moved"])
def test_a_download_leaves_the_archive_and_the_folder_and_no_part(
    tiny: TinyCifar, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(cifar, "PROGRESS_SECONDS", 1e-6)
    (url,) = use_sources(monkeypatch, server, way)
    said: list[str] = []
    shown: list[str] = []
    data_dir = tmp_path / "not" / "yet"
    assert (
        len(load_cifar(CIFARS["cifar10"], data_dir, said.append, shown.append).train_labels) == 5 * PER_FILE
    )
    assert {path.name for path in data_dir.iterdir()} == {ARCHIVE, FOLDER}
    assert (data_dir / ARCHIVE).read_bytes() == tiny.archive
    assert len(said) == 1 and url in said[0]
    assert "MB/s" in shown[0] and "left" in shown[0] and shown[-1] == ""


@pytest.mark.parametrize(
    ("way", "says"),
    [
        ("broken", "broke off after"),
        ("wrong", "wrong content"),
        ("endless", "sent more than the expected"),
        ("missing", "HTTP 404 Not Found"),
    ],
)
def test_a_source_that_fails_is_given_up_and_the_next_one_is_asked(
    tiny: TinyCifar, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, says: str
) -> None:
    bad, good = use_sources(monkeypatch, server, way, "good")
    said: list[str] = []
    loaded(tmp_path, said)
    assert bad in said[0] and good in said[2]
    assert re.search(says, said[1])
    assert {path.name for path in tmp_path.iterdir()} == {ARCHIVE, FOLDER}


@pytest.mark.parametrize(
    ("way", "says"),
    [
        ("silent", "timed out"),
        # On a busy machine the server's headers, too, may come later than the time-out.
        ("stalled", r"no bytes for 0\.5 seconds|timed out"),
    ],
)
def test_a_source_that_sends_nothing_is_given_up_after_the_time_out(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, says: str
) -> None:
    monkeypatch.setattr(cifar, "STALL_SECONDS", 0.5)
    use_sources(monkeypatch, server, way)
    with pytest.raises(NoCifarError, match=says):
        loaded(tmp_path)


def test_a_source_whose_headers_do_not_come_is_given_up_whatever_it_is_waiting_for(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar, "CONNECT_SECONDS", 0.05)
    use_sources(monkeypatch, server, "silent")
    with pytest.raises(NoCifarError, match=r"no answer within 0\.05 seconds"):
        loaded(tmp_path)


def use_a_clock_that_gains(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Have so many seconds pass between two looks at the clock, however busy the machine is."""
    clock = itertools.count(step=seconds)
    monkeypatch.setattr(cifar, "time", SimpleNamespace(monotonic=lambda: next(clock)))


def test_a_source_below_the_slowest_speed_is_given_up(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_a_clock_that_gains(monkeypatch, DEADLINE / 3)
    use_sources(monkeypatch, server, "slow")
    with pytest.raises(NoCifarError, match=r"below 20 kB/s after \d+ bytes"):
        loaded(tmp_path)


def test_a_download_has_a_limit_of_time_in_all(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar, "SLOWEST_BYTES_PER_SECOND", 0)
    use_a_clock_that_gains(monkeypatch, cifar.TOTAL_SECONDS / 5)
    use_sources(monkeypatch, server, "slow")
    with pytest.raises(NoCifarError, match="not done after 1800 seconds"):
        loaded(tmp_path)


def all_down(server: Server, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A source that refuses the connection, and one that answers 404."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        refusing = f"http://127.0.0.1:{free.getsockname()[1]}/"
    (missing,) = use_sources(monkeypatch, server, "missing")
    change_files(monkeypatch, sources=(refusing, missing))
    return [refusing, missing]


def test_with_all_sources_down_the_reason_of_each_is_told_and_nothing_is_left_behind(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing, missing = all_down(server, monkeypatch)
    with pytest.raises(NoCifarError) as error:
        loaded(tmp_path / "data")
    assert str(error.value) == f"{refusing}: Connection refused; {missing}: HTTP 404 Not Found"
    assert not (tmp_path / "data").exists()


def test_who_brings_it_by_hand_is_told_what_to_put_where(tmp_path: Path) -> None:
    sentence = how_to_bring_it(CIFARS["cifar10"], tmp_path)
    assert all(fact in sentence for fact in (CIFAR10.filename, CIFAR10.tgz_md5, CIFAR10.base_folder))
    assert "170,498,071 bytes" in sentence
    assert sentence.endswith(f"into {tmp_path}") and "\n" not in sentence


def test_an_empty_folder_counts_as_nothing_there(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / FOLDER).mkdir()
    use_sources(monkeypatch, server, "good")
    assert len(loaded(tmp_path).train_labels) == 5 * PER_FILE


def test_a_broken_file_is_no_reason_to_download(
    tiny: TinyCifar, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tiny.put_folder(tmp_path) / "data_batch_1").write_bytes(b"")
    use_sources(monkeypatch, server, "good")
    with pytest.raises(DataError, match="data_batch_1"):
        loaded(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]


def test_a_data_folder_that_cannot_be_made_is_named(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    use_sources(monkeypatch, server, "good")
    with pytest.raises(DataError, match=r"file/data cannot be read \(Not a directory\)"):
        loaded(tmp_path / "file" / "data")


class FullFile(io.BytesIO):
    write = disk_is_full


def test_a_full_disk_while_downloading_is_a_clear_error_and_the_part_is_removed(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_sources(monkeypatch, server, "good", "good")
    parts = []

    def open_on_a_full_disk(path: Path, mode: str) -> io.BytesIO:
        assert mode == "wb"
        parts.append(path)
        path.touch()
        return FullFile()

    with monkeypatch.context() as patch, pytest.raises(NoCifarError, match=r"\(No space left on device\)"):
        patch.setattr(Path, "read_bytes", no_such_file)
        patch.setattr(Path, "open", open_on_a_full_disk)
        loaded(tmp_path)
    assert len(parts) == 1 and parts[0].name.endswith(".part")
    assert list(tmp_path.iterdir()) == []


def no_such_file(path: Path) -> bytes:
    raise FileNotFoundError(path)


def test_ctrl_c_while_downloading_removes_the_part(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar, "PROGRESS_SECONDS", 1e-6)
    use_sources(monkeypatch, server, "good")

    def interrupt(text: str) -> None:
        if text:
            assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_cifar(CIFARS["cifar10"], tmp_path, say=print, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "kind", ["a link to nowhere", "a loop", "a file", "below a file", "batches to nowhere"]
)
def test_data_that_is_there_and_cannot_be_reached_is_not_taken_for_absent(kind, tmp_path):
    data_dir = tmp_path / "data"
    if kind == "batches to nowhere":
        data_dir.mkdir()
        (data_dir / "cifar-10-batches-py").symlink_to("nowhere")
    elif kind.startswith("a l"):
        data_dir.symlink_to("nowhere" if "nowhere" in kind else "data")
    else:
        data_dir.write_text("a file")
    data_dir = data_dir / "sub" if kind.startswith("below") else data_dir
    with pytest.raises(DataError, match=f"{data_dir}.* cannot be read") as error:
        load_dataset("auto", data_dir, None, None, lambda line: None)
    assert "\n" not in str(error.value)


def test_a_folder_without_permission_is_not_taken_for_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root
    with pytest.raises(DataError, match="Permission denied"):
        load_dataset("auto", tmp_path, None, None, lambda line: None)
