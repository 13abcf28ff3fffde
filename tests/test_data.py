"""The images: what a batch holds, what is read from disk, what is fetched, and what each fault says."""

import errno
import hashlib
import http.server
import io
import pickle
import re
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as vision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.datasets import CIFAR10

from experiments import data
from experiments.data import (
    DataError,
    Dataset,
    TestBatches,
    TrainBatches,
    draws,
    load_dataset,
    synthetic_dataset,
)
from experiments.distributed import Processes

PER_FILE = 6  # images in each batch file of the tiny CIFAR-10


def random_dataset(train: int, test: int = 4) -> Dataset:
    generator = torch.Generator().manual_seed(train)
    images = torch.randint(256, (train + test, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (train + test,), generator=generator)
    return Dataset(
        "random", "made here", True, images[:train], labels[:train], images[train:], labels[train:]
    )


def loaded(choice: str, folder: Path, said: list[str] | None = None) -> Dataset:
    return load_dataset(choice, folder, None, None, say=(said if said is not None else []).append)


# Batches.


def augmented_alone(image: Tensor, down: int, right: int, flip: int) -> Tensor:
    """One image through torchvision's transforms, as the plan's loader does it."""
    image = vision.crop(vision.pad(image, 4), down, right, 32, 32)
    image = vision.hflip(image) if flip else image
    return vision.normalize(vision.convert_image_dtype(image, torch.float32), data.MEAN, data.STD)


@settings(max_examples=20, deadline=None)
@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 50),
    seed=st.integers(-(2**63), 2**64),
    epoch=st.integers(0, 10**6),
)
def test_a_batch_is_what_torchvision_makes_of_each_image_alone(
    count: int, batch_size: int, seed: int, epoch: int
) -> None:
    dataset = random_dataset(count)
    order, down, right, flips = (drawn.tolist() for drawn in draws(count, seed, epoch))
    expected = [
        augmented_alone(dataset.train_images[order[i]], down[i], right[i], flips[i]) for i in range(count)
    ]
    batches = list(TrainBatches(dataset, batch_size, seed, "cpu").epoch(epoch))
    torch.testing.assert_close(torch.cat([images for images, _ in batches]), torch.stack(expected))
    assert torch.cat([labels for _, labels in batches]).tolist() == dataset.train_labels[order].tolist()


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 40), batch_size=st.integers(1, 50))
def test_every_image_comes_once_an_epoch_and_the_last_partial_batch_is_kept(
    count: int, batch_size: int
) -> None:
    dataset = random_dataset(count)
    batches = TrainBatches(replace(dataset, train_labels=torch.arange(count)), batch_size, 0, "cpu")
    labels = [labels for _, labels in batches.epoch(0)]
    assert sorted(torch.cat(labels).tolist()) == list(range(count))
    assert len(labels) == len(batches)
    assert [len(batch) for batch in labels[:-1]] == [batch_size] * (len(batches) - 1)
    assert [len(batch) for batch in labels] == batches.sizes


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 40), batch_size=st.integers(3, 50), processes=st.integers(2, 3))
def test_the_shares_of_all_processes_together_are_the_batches_of_one(
    count: int, batch_size: int, processes: int
) -> None:
    dataset = random_dataset(count, test=count)

    def together(make: Callable[[Processes], Iterable[tuple[Tensor, Tensor]]]) -> list[tuple[Tensor, Tensor]]:
        shares = zip(*(make(Processes(rank, processes)) for rank in range(processes)), strict=True)
        return [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in shares]

    def train(which: Processes) -> Iterable[tuple[Tensor, Tensor]]:
        return TrainBatches(dataset, batch_size, 0, "cpu", which).epoch(0)

    for (images, labels), (shared_images, shared_labels) in zip(
        train(Processes()), together(train), strict=True
    ):
        assert torch.equal(images, shared_images) and torch.equal(labels, shared_labels)
    shares = [TestBatches(dataset, "cpu", processes=Processes(r, processes)) for r in range(processes)]
    assert torch.equal(torch.cat([share.labels for share in shares]), dataset.test_labels)
    assert max(len(s.labels) for s in shares) - min(len(s.labels) for s in shares) <= 1


def test_images_are_float32_in_channels_last_memory_and_labels_int64() -> None:
    dataset = random_dataset(5, test=5)
    for batches in (TrainBatches(dataset, 4, 0, "cpu").epoch(0), TestBatches(dataset, "cpu", 4)):
        for images, labels in batches:
            assert images.dtype == torch.float32 and labels.dtype == torch.int64
            assert images.shape == (len(labels), 3, 32, 32)
            assert images.is_contiguous(memory_format=torch.channels_last)


def test_an_epoch_can_be_made_again_without_the_epochs_before_it() -> None:
    dataset = random_dataset(20)
    used = TrainBatches(dataset, 8, 3, "cpu")
    for epoch in range(3):
        next(used.epoch(epoch))
    again = TrainBatches(dataset, 8, 3, "cpu").epoch(3)
    for (images, labels), (images_again, labels_again) in zip(used.epoch(3), again, strict=True):
        assert torch.equal(images, images_again) and torch.equal(labels, labels_again)


def test_draws_differ_between_epochs_and_seeds_and_between_a_seed_and_an_epoch() -> None:
    orders = [tuple(draws(50, seed, epoch)[0].tolist()) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == 16


def test_draws_neither_read_nor_move_torchs_own_generator() -> None:
    torch.manual_seed(1)
    first, state = draws(10, 0, 0), torch.get_rng_state()
    torch.manual_seed(2)
    second = draws(10, 0, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_are_made_on_the_cpu_and_cover_every_offset_and_both_flips_evenly() -> None:
    _, down, right, flips = drawn = draws(81_000, 0, 0)
    assert all(values.device.type == "cpu" for values in drawn)
    windows = torch.bincount((down * 9 + right) * 2 + flips, minlength=162)
    assert windows.min() > 400 and windows.max() < 600 and len(windows) == 162  # 500 expected, deviation 22


def test_test_batches_are_the_images_as_they_are_in_order() -> None:
    dataset = random_dataset(1, test=7)
    batches = TestBatches(dataset, "cpu", batch_size=3)
    expected = torch.stack([augmented_alone(image, 4, 4, 0) for image in dataset.test_images])
    assert [len(labels) for _, labels in batches] == [3, 3, 1] and len(batches) == 3
    torch.testing.assert_close(torch.cat([images for images, _ in batches]), expected)
    assert torch.equal(torch.cat([labels for _, labels in batches]), dataset.test_labels)


def test_a_batch_size_below_one_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        TrainBatches(random_dataset(1), 0, 0, "cpu")
    with pytest.raises(ValueError, match="batch_size is -1"):
        TestBatches(random_dataset(1), "cpu", -1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same_batches_and_walking_them_never_waits_for_it() -> None:
    dataset = random_dataset(50)
    on_gpu = TrainBatches(dataset, 16, 0, "cuda").epoch(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        from_gpu = list(on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (images, labels), (gpu_images, gpu_labels) in zip(
        TrainBatches(dataset, 16, 0, "cpu").epoch(0), from_gpu, strict=True
    ):
        torch.testing.assert_close(gpu_images.cpu(), images)
        assert torch.equal(gpu_labels.cpu(), labels)


# The stand-in.


@pytest.fixture(scope="module")
def stand_in() -> Dataset:
    return synthetic_dataset("for the tests")


def test_the_stand_in_has_its_shape_and_the_ten_classes_in_equal_parts(stand_in: Dataset) -> None:
    assert stand_in.train_images.shape == (20_000, 3, 32, 32) and stand_in.train_images.dtype == torch.uint8
    assert stand_in.test_images.shape == (4_000, 3, 32, 32) and stand_in.test_labels.dtype == torch.int64
    assert torch.bincount(stand_in.train_labels).tolist() == [2_000] * 10
    assert torch.bincount(stand_in.test_labels).tolist() == [400] * 10
    assert torch.bincount(stand_in.train_labels[:100]).tolist() == [10] * 10


def test_the_stand_in_is_the_same_whatever_the_seed_of_the_run(stand_in: Dataset) -> None:
    torch.manual_seed(12345)
    again = synthetic_dataset("once more")
    assert torch.equal(again.train_images, stand_in.train_images)
    assert torch.equal(again.test_images, stand_in.test_images)


def test_the_stand_in_fills_the_range_of_pixels_and_has_no_image_twice(stand_in: Dataset) -> None:
    pixels = stand_in.test_images.float()
    assert 100 < pixels.mean() < 155 and 40 < pixels.std() < 75
    assert len(torch.unique(stand_in.train_images.flatten(1)[:, ::97], dim=0)) == 20_000


def test_the_stand_in_cannot_be_told_by_colour_or_by_a_mean_image_alone(stand_in: Dataset) -> None:
    """The nearest class mean, the easiest rule there is, must stay far from solving it."""
    train, test = stand_in.train_images.float().flatten(1), stand_in.test_images.float().flatten(1)
    means = torch.stack([train[stand_in.train_labels == label].mean(0) for label in range(10)])
    accuracy = (torch.cdist(test, means).argmin(1) == stand_in.test_labels).float().mean()
    assert 0.1 < accuracy < 0.5


# CIFAR-10 on disk.


@dataclass
class TinyCifar:
    """CIFAR-10's files with a few images each, and the tables in `data` to go with them."""

    files: dict[str, bytes]
    archive: bytes

    def put_folder(self, data_dir: Path) -> Path:
        folder = data_dir / data.FOLDER
        folder.mkdir(parents=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return folder

    def put_archive(self, data_dir: Path) -> Path:
        data_dir.mkdir(parents=True, exist_ok=True)
        path = data_dir / data.ARCHIVE
        path.write_bytes(self.archive)
        return path


def batch_file(number: int) -> bytes:
    images = np.random.default_rng(number).integers(256, size=(PER_FILE, 3072), dtype=np.uint8)
    return pickle.dumps({b"data": images, b"labels": [(number + i) % 10 for i in range(PER_FILE)]})


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


@pytest.fixture(autouse=True)
def no_network_and_a_small_stand_in(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(data, "SOURCES", ())
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    if "stand_in" not in request.fixturenames:
        monkeypatch.setattr(data, "SYNTHETIC_TRAIN", 60)
        monkeypatch.setattr(data, "SYNTHETIC_TEST", 20)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> TinyCifar:
    names = [*data.TRAIN_FILES, *data.TEST_FILES]
    files = {name: batch_file(number) for number, name in enumerate(names)} | {"batches.meta": b"names"}
    archive = packed({f"{data.FOLDER}/{name}": content for name, content in files.items()})
    for table in ("TRAIN_FILES", "TEST_FILES", "META_FILES"):
        monkeypatch.setattr(data, table, {name: md5(files[name]) for name in getattr(data, table)})
    use_archive(monkeypatch, archive)
    return TinyCifar(files, archive)


def use_archive(monkeypatch: pytest.MonkeyPatch, archive: bytes) -> None:
    monkeypatch.setattr(data, "ARCHIVE_MD5", md5(archive))
    monkeypatch.setattr(data, "ARCHIVE_BYTES", len(archive))


def test_names_and_sums_are_those_of_torchvision() -> None:
    assert (CIFAR10.base_folder, CIFAR10.filename) == (data.FOLDER, data.ARCHIVE)
    assert CIFAR10.tgz_md5 == data.ARCHIVE_MD5
    assert list(map(list, data.TRAIN_FILES.items())) == CIFAR10.train_list
    assert list(map(list, data.TEST_FILES.items())) == CIFAR10.test_list
    assert {CIFAR10.meta["filename"]: CIFAR10.meta["md5"]} == data.META_FILES


@pytest.mark.parametrize("choice", ["auto", "cifar10"])
def test_a_good_folder_is_read_in_the_order_of_its_files_and_nothing_is_written(
    tiny: TinyCifar, tmp_path: Path, choice: str
) -> None:
    folder = tiny.put_folder(tmp_path)
    dataset = loaded(choice, tmp_path)
    assert (dataset.name, dataset.source, dataset.synthetic) == ("CIFAR-10", str(folder), False)
    assert dataset.train_images.shape == (5 * PER_FILE, 3, 32, 32)
    for number in range(5):
        content = pickle.loads(batch_file(number))
        part = slice(number * PER_FILE, (number + 1) * PER_FILE)
        assert np.array_equal(dataset.train_images[part].flatten(1).numpy(), content[b"data"])
        assert dataset.train_labels[part].tolist() == content[b"labels"]
    assert dataset.test_labels.tolist() == pickle.loads(batch_file(5))[b"labels"]
    assert [path.name for path in tmp_path.iterdir()] == [data.FOLDER]


def test_the_folder_is_good_without_the_file_of_names(tiny: TinyCifar, tmp_path: Path) -> None:
    (tiny.put_folder(tmp_path) / "batches.meta").unlink()
    assert not loaded("auto", tmp_path).synthetic


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() if path.is_file() else b"folder" for path in folder.iterdir()}


@pytest.mark.parametrize("choice", ["auto", "cifar10"])
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
    tiny: TinyCifar, tmp_path: Path, choice: str, damage: Callable[[Path], None], says: str
) -> None:
    folder = tiny.put_folder(tmp_path)
    damage(folder / "data_batch_3")
    before = contents(folder)
    with pytest.raises(DataError) as error:
        loaded(choice, tmp_path)
    assert str(error.value).startswith(f"{folder / 'data_batch_3'} {says}")
    assert contents(folder) == before


def test_a_file_in_the_place_of_the_folder_is_an_error_in_one_sentence(
    tiny: TinyCifar, tmp_path: Path
) -> None:
    (tmp_path / data.FOLDER).write_text("not a folder")
    with pytest.raises(DataError, match=r"data_batch_1 cannot be read \(Not a directory\), and 5 more files"):
        loaded("auto", tmp_path)


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
        loaded("auto", tmp_path)
    assert not mark.exists()
    pickle.loads(planted)
    assert mark.exists()  # the trap works


@pytest.mark.parametrize("choice", ["auto", "cifar10"])
def test_a_good_archive_by_itself_is_unpacked_and_then_the_folder_is_used(
    tiny: TinyCifar, tmp_path: Path, choice: str
) -> None:
    archive = tiny.put_archive(tmp_path)
    first = loaded(choice, tmp_path)
    folder = tmp_path / data.FOLDER
    assert first.source == str(archive)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == tiny.files
    archive.unlink()
    second = loaded(choice, tmp_path)
    assert second.source == str(folder)
    assert torch.equal(first.train_images, second.train_images)
    assert [path.name for path in tmp_path.iterdir()] == [data.FOLDER]


def test_a_bad_folder_beside_a_good_archive_is_moved_aside_and_both_are_told(
    tiny: TinyCifar, tmp_path: Path
) -> None:
    said: list[str] = []
    for number in (1, 2):
        folder = tmp_path / data.FOLDER
        if number == 1:
            tiny.put_folder(tmp_path)
        (folder / "data_batch_2").write_bytes(b"altered")
        tiny.put_archive(tmp_path)
        assert not loaded("auto", tmp_path, said).synthetic
        aside = tmp_path / f"{data.FOLDER}.aside-{number}"
        assert (aside / "data_batch_2").read_bytes() == b"altered"
        assert (folder / "data_batch_2").read_bytes() == tiny.files["data_batch_2"]
        assert "data_batch_2 is truncated or altered" in said[-1] and said[-1].endswith(str(aside))


@pytest.mark.parametrize("choice", ["auto", "cifar10"])
def test_an_altered_archive_is_named_and_left_as_it_is(tiny: TinyCifar, tmp_path: Path, choice: str) -> None:
    archive = tiny.put_archive(tmp_path)
    archive.write_bytes(tiny.archive[:-1])
    with pytest.raises(DataError, match=f"{archive} is truncated or altered .*: replace it"):
        loaded(choice, tmp_path)
    assert archive.read_bytes() == tiny.archive[:-1]


def test_an_altered_folder_beside_an_altered_archive_has_both_named(tiny: TinyCifar, tmp_path: Path) -> None:
    (tiny.put_folder(tmp_path) / "data_batch_5").write_bytes(b"")
    tiny.put_archive(tmp_path).write_bytes(b"")
    with pytest.raises(DataError, match=f"data_batch_5 is truncated.*{data.ARCHIVE} is truncated"):
        loaded("auto", tmp_path)


def test_only_the_expected_files_leave_the_archive(
    tiny: TinyCifar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = {f"{data.FOLDER}/{name}": content for name, content in tiny.files.items()}
    tiny.archive = packed(members | {"../outside": b"x", f"{data.FOLDER}/extra": b"x", "/tmp/absolute": b"x"})
    use_archive(monkeypatch, tiny.archive)
    tiny.put_archive(tmp_path / "data")
    loaded("cifar10", tmp_path / "data")
    assert {path.name for path in (tmp_path / "data" / data.FOLDER).iterdir()} == set(tiny.files)
    assert not (tmp_path / "outside").exists()


def test_a_full_disk_while_unpacking_costs_a_line_and_leaves_nothing_behind(
    tiny: TinyCifar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tiny.put_archive(tmp_path)
    said: list[str] = []
    monkeypatch.setattr(Path, "write_bytes", disk_is_full)
    assert not loaded("cifar10", tmp_path, said).synthetic
    assert "could not be written (No space left on device)" in said[-1]
    assert list(tmp_path.iterdir()) == [archive]


def disk_is_full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


# Choices and limits.


def test_an_unknown_choice_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--data is 'mnist'; choose auto, cifar10 or synthetic"):
        loaded("mnist", tmp_path)


def test_synthetic_never_looks_at_the_data_folder(tiny: TinyCifar, tmp_path: Path) -> None:
    tiny.put_folder(tmp_path)
    dataset = loaded("synthetic", tmp_path)
    assert dataset.synthetic and dataset.name == "synthetic stand-in" and "--data synthetic" in dataset.source


def test_limits_keep_the_first_images(tiny: TinyCifar, tmp_path: Path) -> None:
    tiny.put_folder(tmp_path)
    whole = loaded("cifar10", tmp_path)
    part = load_dataset("cifar10", tmp_path, 7, 2, say=print)
    assert torch.equal(part.train_images, whole.train_images[:7])
    assert torch.equal(part.train_labels, whole.train_labels[:7])
    assert torch.equal(part.test_images, whole.test_images[:2])
    assert len(load_dataset("cifar10", tmp_path, 30, 6, say=print).train_labels) == 30


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ((31, None), "--limit-train is 31, but CIFAR-10's training set has 30 images: give 1 to 30"),
        ((None, 7), "--limit-test is 7, but CIFAR-10's test set has 6 images: give 1 to 6"),
        ((0, None), "--limit-train is 0, "),
    ],
)
def test_a_limit_outside_the_set_is_refused_by_its_flag(
    tiny: TinyCifar, tmp_path: Path, limits: tuple[int | None, int | None], says: str
) -> None:
    tiny.put_folder(tmp_path)
    with pytest.raises(DataError, match=says):
        load_dataset("auto", tmp_path, *limits, say=print)


# The download, from a server in this process.


class Server(http.server.ThreadingHTTPServer):
    """Serves one archive in many ways; the path says how."""

    archive: bytes
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
            time.sleep(0.02)

    def serve_stalled(self, archive: bytes) -> None:
        self.start(len(archive))
        self.wfile.write(archive[:1000])
        time.sleep(10)

    def serve_silent(self, archive: bytes) -> None:
        time.sleep(10)

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
    monkeypatch.setattr(data, "CONNECT_SECONDS", 5.0)
    monkeypatch.setattr(data, "STALL_SECONDS", 0.5)
    with Server(("127.0.0.1", 0), Answers) as running:
        running.archive = tiny.archive
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def use_sources(monkeypatch: pytest.MonkeyPatch, server: Server, *ways: str) -> list[str]:
    sources = [f"http://127.0.0.1:{server.server_port}/{way}" for way in ways]
    monkeypatch.setattr(data, "SOURCES", tuple(sources))
    return sources


@pytest.mark.parametrize("way", ["good", "moved"])
def test_a_download_leaves_the_archive_and_the_folder_and_no_part(
    tiny: TinyCifar, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(data, "PROGRESS_SECONDS", 1e-6)
    (url,) = use_sources(monkeypatch, server, way)
    said: list[str] = []
    shown: list[str] = []
    data_dir = tmp_path / "not" / "yet"
    dataset = load_dataset("auto", data_dir, None, None, said.append, shown.append)
    assert not dataset.synthetic and len(dataset.train_labels) == 5 * PER_FILE
    assert {path.name for path in data_dir.iterdir()} == {data.ARCHIVE, data.FOLDER}
    assert (data_dir / data.ARCHIVE).read_bytes() == tiny.archive
    assert len(said) == 1 and url in said[0]
    assert "MB/s" in shown[0] and "left" in shown[0] and shown[-1] == ""


@pytest.mark.parametrize(
    ("way", "says"),
    [
        ("slow", "below 20 kB/s"),
        ("stalled", "no bytes for 0.5 seconds"),
        ("silent", "timed out"),
        ("broken", "broke off after"),
        ("wrong", "wrong content"),
        ("endless", "sent more than the expected"),
        ("missing", "HTTP 404 Not Found"),
    ],
)
def test_a_source_that_fails_is_given_up_soon_and_the_next_one_is_asked(
    tiny: TinyCifar, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, says: str
) -> None:
    bad, good = use_sources(monkeypatch, server, way, "good")
    said: list[str] = []
    start = time.monotonic()
    assert not loaded("cifar10", tmp_path, said).synthetic
    assert time.monotonic() - start < 5
    assert bad in said[0] and good in said[2]
    assert re.search(says, said[1])
    assert {path.name for path in tmp_path.iterdir()} == {data.ARCHIVE, data.FOLDER}


def test_an_answer_that_takes_its_time_over_everything_is_given_up_after_one_limit(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "CONNECT_SECONDS", 0.05)
    use_sources(monkeypatch, server, "silent")
    with pytest.raises(DataError, match=r"no answer within 0\.05 seconds"):
        loaded("cifar10", tmp_path)


def test_a_download_has_a_limit_of_time_in_all(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "TOTAL_SECONDS", 0.1)
    use_sources(monkeypatch, server, "slow")
    with pytest.raises(DataError, match=r"not done after 0\.1 seconds"):
        loaded("cifar10", tmp_path)


def all_down(server: Server, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A source that refuses the connection, and one that answers 404."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        refusing = f"http://127.0.0.1:{free.getsockname()[1]}/"
    (missing,) = use_sources(monkeypatch, server, "missing")
    monkeypatch.setattr(data, "SOURCES", (refusing, missing))
    return [refusing, missing]


def test_with_all_sources_down_cifar10_says_in_one_message_what_was_tried_and_what_to_do(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing, missing = all_down(server, monkeypatch)
    with pytest.raises(DataError) as error:
        loaded("cifar10", tmp_path / "data")
    message = str(error.value)
    assert f"{refusing}: Connection refused" in message and f"{missing}: HTTP 404 Not Found" in message
    assert f"{data.ARCHIVE_BYTES:,} bytes" in message and data.ARCHIVE_MD5 in message
    assert message.endswith(f"into {tmp_path / 'data'}") and "\n" not in message
    assert not (tmp_path / "data").exists()


def test_with_all_sources_down_auto_goes_on_with_the_stand_in_and_says_so(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing, _ = all_down(server, monkeypatch)
    said: list[str] = []
    dataset = loaded("auto", tmp_path, said)
    assert dataset.synthetic and dataset.name == "synthetic stand-in"
    assert (
        dataset.source.startswith("no CIFAR-10 here: ")
        and f"{refusing}: Connection refused" in dataset.source
    )
    assert said[-1].startswith("NO CIFAR-10")


def test_an_empty_folder_counts_as_nothing_there(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / data.FOLDER).mkdir()
    use_sources(monkeypatch, server, "good")
    assert not loaded("auto", tmp_path).synthetic


def test_a_broken_file_is_no_reason_to_download(
    tiny: TinyCifar, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tiny.put_folder(tmp_path) / "data_batch_1").write_bytes(b"")
    use_sources(monkeypatch, server, "good")
    with pytest.raises(DataError, match="data_batch_1"):
        loaded("auto", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [data.FOLDER]


def test_a_data_folder_that_cannot_be_made_stops_cifar10_and_not_auto(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    use_sources(monkeypatch, server, "good")
    with pytest.raises(DataError, match=r"file/data cannot be written \(Not a directory\)"):
        loaded("cifar10", tmp_path / "file" / "data")
    dataset = loaded("auto", tmp_path / "file" / "data")
    assert dataset.synthetic and "cannot be written (Not a directory)" in dataset.source


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

    with monkeypatch.context() as patch, pytest.raises(DataError, match=r"\(No space left on device\)"):
        patch.setattr(Path, "read_bytes", no_such_file)
        patch.setattr(Path, "open", open_on_a_full_disk)
        loaded("cifar10", tmp_path)
    assert len(parts) == 1 and parts[0].name.endswith(".part")
    assert list(tmp_path.iterdir()) == []


def no_such_file(path: Path) -> bytes:
    raise FileNotFoundError(path)


def test_ctrl_c_while_downloading_removes_the_part(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "PROGRESS_SECONDS", 1e-6)
    use_sources(monkeypatch, server, "good")

    def interrupt(text: str) -> None:
        if text:
            assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_dataset("auto", tmp_path, None, None, say=print, progress=interrupt)
    assert list(tmp_path.iterdir()) == []
