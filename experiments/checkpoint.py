"""A run's state after an epoch in one file, and back: stop the run anywhere, go on from there.

checkpoint_0007.pt is the state after epoch 7, in torch's format: tensors and JSON-like values alone, read
with `weights_only=True`. A SHA-256 of it all follows behind its end, where torch's reader does not look. The
folder holds the last two.
"""

import contextlib
import hashlib
import io
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_origin

import torch
from torch import nn

from experiments.files import OutputError, write_whole
from experiments.settings import Settings, flag

NAME = re.compile(r"checkpoint_(\d{4,})\.pt")
KEPT = 2
VERSION = 1
MAY_CHANGE = ("epochs", "data_dir", "output_dir")


@dataclass(frozen=True)
class Checkpoint:
    """All that the next epoch depends on, and all that the report needs of the epochs before."""

    settings: dict[str, Any]
    surroundings: dict[str, Any]  # what else the digits depend on: torch, device and threads, data set
    model: dict[str, torch.Tensor]  # its state_dict: weights, logits, batch norms
    optimizer: dict[int, Any]  # AdamW's moments and step counts; its rates follow from the settings
    random: dict[str, Any]  # torch's generators
    start: dict[str, Any]  # the logits before the first epoch
    records: list[dict[str, Any]]  # of history.json, one an epoch
    resumed: list[dict[str, Any]]  # each time the run went on: after which epoch, and what was said

    @property
    def epochs(self) -> int:
        return len(self.records)


def checkpoint_path(folder: Path, epoch: int) -> Path:
    return folder / f"checkpoint_{epoch:04d}.pt"


def checkpoint_paths(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the last one first; a file with a name of the user's own is none."""
    numbered = {int(m[1]): p for p in folder.iterdir() if (m := NAME.fullmatch(p.name))}
    return [numbered[epoch] for epoch in sorted(numbered, reverse=True)]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write it whole or not at all, then drop all but the last two.

    Raises: OutputError naming the file; the checkpoints before it are then still there.
    """
    buffer = io.BytesIO()
    state = {field.name: getattr(checkpoint, field.name) for field in fields(Checkpoint)}
    torch.save({"version": VERSION} | state, buffer)
    content = buffer.getvalue()
    write_whole(checkpoint_path(folder, checkpoint.epochs), content + hashlib.sha256(content).digest())
    # Later ones too: they are those that could not be read, or of a run that is being done again.
    keep = {checkpoint_path(folder, checkpoint.epochs - back) for back in range(KEPT)}
    with contextlib.suppress(OSError):  # one too many does no harm
        for path in checkpoint_paths(folder):
            if path not in keep and path.is_file():
                path.unlink()


def load_checkpoint(path: Path) -> Checkpoint:
    """Raises: ValueError with a few words on what is wrong with the file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    size = hashlib.sha256().digest_size
    if hashlib.sha256(content[:-size]).digest() != content[-size:]:
        raise ValueError(f"is truncated or altered ({len(content):,} bytes, and not the SHA-256 at its end)")
    try:
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        version = state.pop("version")
        checkpoint = Checkpoint(**state) if version == VERSION else None
    except Exception as error:  # torch raises all kinds for what is no file of its own
        raise ValueError(f"is no checkpoint of this program ({type(error).__name__})") from None
    if checkpoint is None:
        raise ValueError(f"is of version {version}, and this program reads version {VERSION}")
    for field in fields(Checkpoint):
        if not isinstance(getattr(checkpoint, field.name), get_origin(field.type) or object):
            raise ValueError(f"is no checkpoint of this program (its {field.name} are of another type)")
    return checkpoint


def last_checkpoint(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The last checkpoint that can be read; what is wrong with later ones is said. None if there is none.

    Raises: OutputError if there are some and none can be read.
    """
    paths = checkpoint_paths(folder)
    for path in paths:
        try:
            return load_checkpoint(path)
        except ValueError as error:
            say(f"{path} {error}: going back to the one before it")
    if paths:
        raise OutputError(
            f"--resume: no checkpoint in {folder} can be used; leave --resume out to start over "
            f"(the files there are moved aside)"
        )
    return None


def check_settings(saved: Mapping[str, Any], settings: Settings) -> None:
    """Raises: ValueError naming the first setting that is another than the checkpoint's and must not be."""
    now = settings.to_json()
    for name in now:
        if name not in MAY_CHANGE and saved.get(name) != now[name]:
            raise ValueError(
                f"--resume: {flag(name)} is {_shown(now[name])}, and the run to go on with has "
                f"{_shown(saved.get(name))}; give that, or another --output-dir, or leave --resume out"
            )
    if settings.epochs < saved["epochs"]:
        raise ValueError(
            f"--resume: --epochs is {settings.epochs}, and the run to go on with has {saved['epochs']}; "
            f"give that or more, since the learning rate already fell for it"
        )


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else "not given" if value is None else str(value)


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the checkpoint's weights, moments and random states in their places.

    Raises: ValueError if it is of another network.
    """
    groups = optimizer.state_dict()["param_groups"]
    try:
        model.load_state_dict(checkpoint.model)
        optimizer.load_state_dict({"state": checkpoint.optimizer, "param_groups": groups})
        torch.set_rng_state(checkpoint.random["cpu"])
        if torch.cuda.is_available() and checkpoint.random["cuda"] is not None:
            torch.cuda.set_rng_state(checkpoint.random["cuda"])
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--resume: the checkpoint of epoch {checkpoint.epochs} is not of this network "
            f"({str(error).splitlines()[0]}); leave --resume out to start over"
        ) from None


def random_states() -> dict[str, Any]:
    """Every random state that the run has: torch's. What an epoch draws comes of the seed and its number."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}
