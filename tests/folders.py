"""What lies in a folder: any folder, and the one that a run of `experiments.debug_run` leaves."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PICTURES = [
    "accuracy_curve.png",
    "channel_liveness.png",
    "channels_over_time.png",
    "per_layer_channels.png",
    "sparsity_curves.png",
]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tree(folder: Path) -> dict[str, str]:
    """Return each path below the folder, with a file's SHA-256 and with what else any other path is."""

    def content(path: Path) -> str:
        if path.is_symlink():
            return f"link to {path.readlink()}"
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"

    return {str(path.relative_to(folder)): content(path) for path in folder.rglob("*")}


def silent(sentence: str) -> None:
    """Stand for the function that prints, where nothing is to be printed."""
    raise AssertionError(f"said: {sentence}")


@dataclass
class RunFolder:
    """The working folder of a run that was not told another output folder."""

    folder: Path

    @property
    def output(self) -> Path:
        return self.folder / "debug_output"

    @property
    def files(self) -> list[str]:
        return names(self.output)

    @property
    def history(self) -> dict[str, Any]:
        return json.loads((self.output / "history.json").read_text())
