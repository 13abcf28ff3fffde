"""Output files, written whole or not at all, in a folder that one run holds at a time."""

import contextlib
import errno
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PART = re.compile(r"\..+\.\d+\.part")  # what `write_whole` writes beside its file


class OutputError(Exception):
    """One sentence for the user about a file or folder that cannot be written."""


def write_whole(path: Path, content: bytes) -> None:
    """Write beside, then rename: whoever reads `path` sees the old file or the new one, never a half.

    Raises: OutputError naming the file. What was written beside is removed.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the new name on an empty file
        beside.replace(path)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror}; free the space or name another --output-dir"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def write_json(path: Path, value: Any) -> None:
    """Strict JSON: a number that is not finite is written as the string "inf", "-inf" or "nan"."""
    write_whole(path, (json.dumps(_finite(value), indent=1, allow_nan=False) + "\n").encode())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def lock_folder(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Make the output folder, try it out before hours are spent on what should go there, and hold it.

    Litter of a run that was killed while it wrote is removed; so is, at the end, a folder that was made here
    and is still empty.

    Raises: OutputError naming it where it cannot be written or another run holds it.
    """
    made: list[Path] = []
    try:
        made = missing_folders(folder)
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}.part"
        probe.write_bytes(b"")
        probe.unlink()
        lock = _lock(folder, say)
    except OSError as error:
        remove_empty(made)
        raise OutputError(
            f"--output-dir is {folder}, which cannot be written ({error.strerror}); name a folder that can"
        ) from None
    try:
        for path in folder.iterdir():
            if PART.fullmatch(path.name) and path.is_file():
                path.unlink(missing_ok=True)
        yield
    finally:
        remove_empty(made)
        if lock is not None:
            os.close(lock)


def missing_folders(folder: Path) -> list[Path]:
    """Those that `mkdir` would have to make for it, itself first."""
    return [path for path in (folder, *folder.parents) if not os.path.lexists(path)]


def remove_empty(folders: Iterable[Path]) -> None:
    """Those that are there and empty, each before the one that holds it."""
    for path in folders:
        with contextlib.suppress(OSError):
            path.rmdir()


def _lock(folder: Path, say: Callable[[str], None]) -> int | None:
    """A descriptor that holds the folder until it is closed or the process ends, however it ends."""
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


def archive_files(folder: Path, files: Iterable[Path]) -> Path | None:
    """Move those that are there into a folder of their own, earlier-1 or the next free number; None if none.

    Raises: OutputError naming the file that could not be moved.
    """
    files = [path for path in files if path.is_file()]
    if not files:
        return None
    number = 1
    while os.path.lexists(aside := folder / f"earlier-{number}"):
        number += 1
    try:
        aside.mkdir()
        for path in files:
            path.rename(aside / path.name)
    except OSError as error:
        remove_empty([aside])
        raise OutputError(
            f"cannot move an earlier run's files to {aside}: {error.strerror}; name another --output-dir"
        ) from None
    return aside
