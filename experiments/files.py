"""Files written completely or not at all, in a folder that one run has locked; files read with care."""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import re
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CHECKSUM = 64  # bytes of a SHA-256 in hexadecimal digits
END_OF_ARCHIVE = 22  # bytes of the record that ends a zip archive, without its comment
# Names of the temporary files of `write_whole`.
PART = re.compile(r"\.(probe|.+\.(pt|pt2|codeq|json|csv|html|png|pdf))\.\d+\.part")


class OutputError(Exception):
    """One sentence for the user: which file or folder cannot be written, why, and what to do."""


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically: a reader of `path` sees the old file or the new one, never a part of either.

    The content goes into a temporary file in the same folder, which is then renamed to `path`.

    Raises: OutputError naming the file if it cannot be written; the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # without this, a power cut could leave an empty file under the name
        temporary.replace(path)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror}; free the space or name another --output-dir"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def with_checksum(archive: bytes) -> bytes:
    """A zip archive, such as torch's files are, with the SHA-256 of all else in it as its comment.

    A comment stands at the end of an archive, and what reads the archive passes over it.
    """
    sized = archive[:-2] + struct.pack("<H", CHECKSUM)  # the last two bytes are the length of the comment
    return sized + hashlib.sha256(sized).hexdigest().encode()


def checksum_holds(archive: bytes) -> bool | None:
    """Whether an archive is as `with_checksum` made it; None for one that carries no checksum."""
    content, digest = archive[:-CHECKSUM], archive[-CHECKSUM:]
    if content[-END_OF_ARCHIVE:][:4] != b"PK\5\6":
        return None
    return hashlib.sha256(content).hexdigest().encode() == digest


def read_plain(path: Path, most: int) -> bytes:
    """The bytes of a plain file. A pipe, which might never end, and a file above `most` bytes are not read.

    Raises: OSError; ValueError saying what is wrong with the file, in words that complete a sentence after
        its name.
    """
    found = path.stat()
    # Opening a folder says what is wrong by itself.
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise ValueError("is no plain file")
    if found.st_size > most:
        raise ValueError(f"has {found.st_size:,} bytes; expected {most:,} at most")
    return path.read_bytes()


def read_file(path: Path, most: int) -> bytes:
    """As `read_plain`, but a file that cannot be read is a ValueError too."""
    try:
        return read_plain(path, most)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically, `as_json`.

    Raises: OutputError as `write_whole` does.
    """
    write_whole(path, (as_json(value) + "\n").encode())


def as_json(value: Any) -> str:
    """`value` as strict JSON; a number that is not finite as "inf", "-inf" or "nan"."""
    return json.dumps(_finite(value), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def lock_folder(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Make the output folder, and keep it locked against other runs for as long as the context is open.

    A file is written there for a test, so that a run learns now, not hours later, if it cannot write its
    results. Temporary files of a killed run are removed. At the end, a folder that was made here is removed
    if it is still empty. `say` is called with a line if this system or the folder's disk has no locks.

    Raises: OutputError naming the folder if it cannot be written or another run has locked it.
    """
    made: list[Path] = []
    try:
        made = missing_folders(folder)
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}.part"
        try:
            probe.write_bytes(bytes(1 << 20))  # a full disk still takes an empty file
        finally:
            probe.unlink(missing_ok=True)
        lock = _lock(folder, say)
    except OSError as error:
        remove_empty(made)
        raise OutputError(
            f"--output-dir is {folder}, which cannot be written ({error.strerror}); name a folder that can"
        ) from None
    try:
        if lock is not None:  # otherwise another run may be writing them now
            with contextlib.suppress(OSError):  # in a shared folder they may be another user's
                for path in folder.iterdir():
                    if PART.fullmatch(path.name) and path.is_file():
                        path.unlink()
        yield
    finally:
        remove_empty(made)
        if lock is not None:
            os.close(lock)


def refuse_folders(paths: Iterable[Path]) -> None:
    """Raises: OutputError naming the first of these paths where something else than a file stands.

    A file cannot be written in the place of a folder, and a link that leads nowhere would be lost.
    """
    for path in paths:
        if os.path.lexists(path) and not path.is_file():
            raise OutputError(
                f"{path} is no file, and one is to be written there; move it away or name another "
                f"--output-dir"
            )


def missing_folders(folder: Path) -> list[Path]:
    """List the folder and its parents that do not exist yet, the innermost first."""
    return [path for path in (folder, *folder.parents) if not os.path.lexists(path)]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of the folders that exist and are empty; inner folders must come before outer ones."""
    for path in folders:
        with contextlib.suppress(OSError):
            path.rmdir()


def _lock(folder: Path, say: Callable[[str], None]) -> int | None:
    """Lock the folder. Returns: an open descriptor of it; None if there are no locks.

    The lock lasts until the descriptor is closed or the process ends, also if it is killed.
    """
    if fcntl is None:
        say(f"this system has no file locks: nothing keeps a second run out of {folder}")
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise OutputError(
                f"--output-dir is {folder}, which another run is writing to; wait for its end, "
                f"or name another folder"
            ) from None
        say(f"{folder} cannot be locked ({error.strerror}): nothing keeps a second run out of it")
        return None
    return descriptor


def numbered(path: Path) -> Path:
    """The first of `path`-1, `path`-2 and so on that is not there."""
    names = (path.with_name(f"{path.name}-{number}") for number in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def archive_files(folder: Path, files: Iterable[Path]) -> Path | None:
    """Move the files that exist into an archive: a new folder earlier-1 in `folder`, or the next free number.

    Returns: the archive's path; None if none of the files exists.
    Raises: OutputError naming the archive if a file could not be moved.
    """
    files = [path for path in files if path.is_file()]
    if not files:
        return None
    archive = numbered(folder / "earlier")
    try:
        archive.mkdir()
        for path in files:
            path.rename(archive / path.name)
    except OSError as error:
        remove_empty([archive])
        raise OutputError(
            f"cannot move an earlier run's files to {archive}: {error.strerror}; name another --output-dir"
        ) from None
    return archive
