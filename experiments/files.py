"""Output files, written whole or not at all."""

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any


class OutputError(Exception):
    """One sentence for the user about a file or folder that cannot be written."""


def write_whole(path: Path, content: bytes) -> None:
    """Write beside, then rename: whoever reads `path` sees the old file or the new one, never a half.

    Raises: OutputError naming the file. What was written beside is removed.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_bytes(content)
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


def prepare_folder(folder: Path) -> None:
    """Make the output folder and try it out, before hours are spent on what should go there.

    Raises: OutputError naming it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"--output-dir is {folder}, which cannot be written ({error.strerror}); name a folder that can"
        ) from None
