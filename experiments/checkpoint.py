"""Checkpoints: the state of a run after an epoch, in one file from which `--resume` continues the run.

checkpoint_0007.pt is the state after epoch 7 in torch's format. It holds only tensors, plain values and the
history as JSON, so that `torch.load` reads it with `weights_only=True`. Its last 32 bytes are the SHA-256 of
all bytes before them; torch's reader ignores bytes behind the end of its own format. The output folder keeps
the checkpoints of the last two epochs: if the last one is damaged, a run resumes from the one before it.
"""

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_origin

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from experiments.device import is_out_of_memory
from experiments.distributed import Processes
from experiments.draws import random_states, set_random_states
from experiments.files import OutputError, read_plain, write_whole
from experiments.history import History, Resumption
from experiments.schedules import cosine_anneal, warmed_up
from experiments.settings import Settings, flag
from experiments.training import pace
from experiments.user_code import first_line
from utils_quantization import quantized_layers

NAME = re.compile(r"checkpoint_(\d{4,})\.pt")
MOST = 1 << 32  # bytes; weights and moments of the networks of this field take far less
NO_FILE = (errno.ENOENT, errno.EISDIR, errno.ELOOP, errno.ENOTDIR)  # these stay; other errors may pass
KEPT = 2  # checkpoints in the output folder
VERSION = 6  # of the file format, and of what its settings mean
MAY_CHANGE = (
    "epochs",
    "data_dir",
    "output_dir",
    "figure_format",
    "preflight",
    "rehearse",
)  # settings that a resumed run may change


@dataclass(frozen=True)
class Checkpoint:
    """All that the next epoch depends on, and all that the report needs of the epochs before."""

    history: History  # with the settings of the run and a record for each finished epoch
    model: dict[str, torch.Tensor]  # its state_dict: weights, quantizers' parameters, batch norms
    optimizer: dict[int, Any]  # AdamW's moments and step counts; its rates follow from the settings
    random: dict[str, Any]  # the states of the random generators

    @property
    def epochs(self) -> int:
        """The number of finished epochs."""
        return len(self.history.epochs)


def take_checkpoint(history: History, model: nn.Module, optimizer: torch.optim.Optimizer) -> Checkpoint:
    """Take the state of the run as it is now; the tensors are not copied."""
    return Checkpoint(history, model.state_dict(), optimizer.state_dict()["state"], random_states())


def checkpoint_path(folder: Path, epoch: int) -> Path:
    """The path of the checkpoint after this epoch, counted from 1."""
    return folder / f"checkpoint_{epoch:04d}.pt"


def checkpoint_paths(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, the last epoch first.

    A file with any other name, such as a copy that the user made, is not listed.
    """
    found = ((int(m[1]), p) for p in folder.iterdir() if (m := NAME.fullmatch(p.name)))
    # A checkpoint_00007.pt, with more zeros than this program writes, is the user's.
    numbered = {epoch: path for epoch, path in found if path.name == checkpoint_path(folder, epoch).name}
    return [numbered[epoch] for epoch in sorted(numbered, reverse=True)]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the checkpoint atomically, then delete every other checkpoint but that of the epoch before.

    Raises: OutputError naming the file if it cannot be written; no other checkpoint is deleted then.
    """
    buffer = io.BytesIO()
    # One text, since the history grows by a record an epoch, and torch writes many small objects slowly.
    history = json.dumps(checkpoint.history, default=vars)
    torch.save(vars(checkpoint) | {"version": VERSION, "history": history}, buffer)
    content = buffer.getvalue()
    write_whole(checkpoint_path(folder, checkpoint.epochs), content + hashlib.sha256(content).digest())
    # Checkpoints of later epochs are deleted too. A resumed run has them if they were damaged: it went back
    # to an earlier checkpoint and now trains those epochs again.
    keep = {checkpoint_path(folder, checkpoint.epochs - back) for back in range(KEPT)}
    with contextlib.suppress(OSError):  # a checkpoint that cannot be deleted does no harm
        for path in checkpoint_paths(folder):
            if path not in keep and path.is_file():
                path.unlink()


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; its tensors are on the CPU.

    Raises: ValueError saying what is wrong with the file, in words that complete a sentence after its name;
        OutputError where that cannot be known, as the file cannot be read now. What torch raises for a lack
        of memory.
    """
    try:
        content = read_plain(path, MOST)
    except OSError as error:
        if error.errno in NO_FILE:
            raise ValueError(f"cannot be read ({error.strerror})") from None
        raise OutputError(
            f"{path} cannot be read ({error.strerror}), and it may be whole; mend that and try again"
        ) from None
    size = hashlib.sha256().digest_size
    if hashlib.sha256(content[:-size]).digest() != content[-size:]:
        raise ValueError(f"is truncated or altered ({len(content):,} bytes, and not the SHA-256 at its end)")
    try:
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        version = state.pop("version")
        if version == VERSION:
            state["history"] = History.from_json(json.loads(state["history"]))
        checkpoint = Checkpoint(**state) if version == VERSION else None
    except Exception as error:  # for a file that torch did not write, torch.load raises errors of many types
        if is_out_of_memory(error):
            raise
        what = str(error) if type(error) is ValueError else type(error).__name__
        raise ValueError(f"is no checkpoint of this program ({what})") from None
    if checkpoint is None:
        raise ValueError(f"is of version {version!r:.60}, and this program reads version {VERSION}")
    for field in fields(Checkpoint):
        if not isinstance(getattr(checkpoint, field.name), get_origin(field.type) or field.type):  # type: ignore[arg-type]
            raise ValueError(f"is no checkpoint of this program (its {field.name} are of another type)")
    name = NAME.fullmatch(path.name)
    if wrong := _impossible(checkpoint.history, int(name[1]) if name else checkpoint.epochs):
        raise ValueError(f"is no checkpoint of this program ({wrong})")
    return checkpoint


def _impossible(history: History, epochs: int) -> str:
    """What no run writes into the checkpoint of this epoch; empty where there is nothing of the kind."""
    numbers = [record.epoch for record in history.epochs]
    if numbers != [*range(1, epochs + 1)]:
        return f"its records are of the epochs {numbers!s:.60}; expected 1 to {epochs}"
    for record in history.epochs:
        if not 0 <= record.accuracy <= 1:
            return f"an accuracy is {record.accuracy}; expected 0 to 1"
        if not record.layers.keys() == history.start.keys() == set(history.quantized):
            return "its records are not of its quantized layers"
    return ""


def last_checkpoint(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """Read the last checkpoint that is not damaged. Returns: None if the folder holds no checkpoint.

    `say` is called with a line for each damaged checkpoint of a later epoch.
    Raises: OutputError if the folder holds checkpoints and all of them are damaged.
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


def find_checkpoint(
    settings: Settings, processes: Processes, say: Callable[[str], None]
) -> Checkpoint | None:
    """Find the checkpoint to resume from: rank 0 reads it and broadcasts it, so that all ranks have the same.

    Returns: None if the output folder holds no checkpoint.
    Raises: ValueError if the checkpoint's settings differ, OutputError if all checkpoints are damaged.
    """
    found = processes.broadcast(last_checkpoint(settings.output_dir, say) if processes.first else None)
    if found:
        check_settings(found.history.settings, settings)
        if found.epochs > found.history.settings["epochs"]:
            raise ValueError(
                f"--resume: the checkpoint has {found.epochs} epochs of a run of "
                f"{found.history.settings['epochs']}; leave --resume out to start over"
            )
    return found


def resume(
    checkpoint: Checkpoint, history: History, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Put the checkpoint's state into model, optimizer and history, which says what is different now.

    Raises: ValueError if the checkpoint is of another network or another data set.
    """
    saved = checkpoint.history
    differences = describe_differences(saved, history)
    if saved.quantized != history.quantized:
        raise ValueError(
            f"--resume: the checkpoint of epoch {checkpoint.epochs} is not of this network (other layers are "
            f"quantized); leave --resume out to start over"
        )
    restore(checkpoint, model, optimizer)
    history.start, history.epochs, history.rehearsal = saved.start, saved.epochs, saved.rehearsal
    history.resumed = [*saved.resumed, Resumption(checkpoint.epochs, differences)]


def check_settings(saved: Mapping[str, Any], settings: Settings) -> None:
    """Make sure that a run with these settings may resume from a checkpoint with the settings `saved`.

    Raises: ValueError naming the first setting that differs and is not in `MAY_CHANGE`, or --epochs if it is
        lower than before.
    """
    now = settings.to_json()
    for name in now:
        if name not in MAY_CHANGE and saved.get(name) != now[name]:
            was = saved.get(name)
            begun = "began without it" if was is None else f"has {_shown(was)}"
            raise ValueError(
                f"--resume: {flag(name)} is {_shown(now[name])}, and the run to go on with {begun}; do as it "
                f"did, or give another --output-dir, or leave --resume out"
            )
    if type(saved.get("epochs")) is not int:
        raise ValueError(
            f"--resume: the checkpoint has {saved.get('epochs')!r:.60} for --epochs; expected a number; "
            f"leave --resume out to start over"
        )
    if settings.epochs < saved["epochs"]:
        raise ValueError(
            f"--resume: --epochs is {settings.epochs}, and the run to go on with has {saved['epochs']}; "
            f"give that or more, since the learning rate already fell for it"
        )


def describe_differences(saved: History, now: History) -> list[str]:
    """Describe in words what differs between the run before and the resumed run: torch, device, code, epochs.

    Raises: ValueError if the data set is another one.
    """
    # The source is the folder or the URL that the images came from; the same images may come from elsewhere.
    before, data = (dataclasses.replace(h.data, source="") for h in (saved, now))
    if before != data:
        raise ValueError(
            f"--resume: this run would go on with the {data.name} ({data.train_images:,} "
            f"training images), and it began with the {before.name} "
            f"({before.train_images:,}); give the same data"
        )
    surroundings = [("torch", saved.versions.get("torch"), now.versions["torch"]),
                    ("device", saved.device, now.device),
                    ("commit", saved.origin.commit, now.origin.commit)]  # fmt: skip
    words = [
        f"{name} {was} before, {is_now} now: the last digits may differ"
        for name, was, is_now in surroundings
        if was != is_now
    ]
    return words + _longer(saved, now)


def _longer(saved: History, now: History) -> list[str]:
    """Describe what a higher --epochs than before changes in the epochs that are left."""
    was, epochs = saved.settings["epochs"], now.settings["epochs"]
    if was == epochs:
        return []
    schedule = warmed_up(now.settings["rate_warmup"], cosine_anneal(0))
    before, rate = (schedule(len(saved.epochs), total) for total in (was, epochs))
    steps = -(-now.data.train_images // now.settings["batch_size"])  # optimizer steps of an epoch
    meant_for = now.settings["pace_steps"]
    pace_before, pace_now = (pace(meant_for, total * steps) for total in (was, epochs))
    return [
        f"--epochs was {was}, is {epochs}: the learning rates go on at {rate:.4f} of their "
        f"peak instead of {before:.4f}"
        + (
            f", the quantizers' peak being {pace_now / pace_before:.4f} and the weights' decay "
            f"{math.sqrt(pace_now / pace_before):.4f} of what they were"
            if pace_now != pace_before
            else ""
        )
        + f"; a run of {epochs} epochs from the start gives other numbers"
    ]


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else "not given" if value is None else str(value)


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the checkpoint's weights into the model, its moments into the optimizer, and its random states.

    The optimizer keeps its own learning rates and weight decays, which come from the settings.
    Raises: ValueError if the checkpoint is of another network.
    """
    groups = optimizer.state_dict()["param_groups"]
    try:
        for name, tensor in model.state_dict().items():  # torch would cast another type in silence
            if (saved := checkpoint.model.get(name)) is not None and saved.dtype != tensor.dtype:
                raise ValueError(f"{name} is of {saved.dtype}, expected {tensor.dtype}")
        model.load_state_dict(checkpoint.model)
        _check_numbers(model)
        if checkpoint.epochs and not checkpoint.optimizer:
            raise ValueError("it holds no moments")
        optimizer.load_state_dict({"state": checkpoint.optimizer, "param_groups": groups})
        _check_moments(optimizer)
        # Of other parameters the logits may not depend, and so they may have none.
        for name, layer in quantized_layers(model).items():
            weight: Any = layer.parametrizations.weight.original  # type: ignore[union-attr]
            if weight.requires_grad and weight not in optimizer.state and not checkpoint.history.may_skip:
                raise ValueError(f"it holds no moments of {name}")
        for parameter, state in optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):  # they were saved in the layout of another device, perhaps
                state[name] = torch.empty_like(parameter).copy_(state[name])
        set_random_states(checkpoint.random)
    except Exception as error:  # what stands in the place of a tensor or a number may raise anything
        raise ValueError(
            f"--resume: the checkpoint of epoch {checkpoint.epochs} is not of this network "
            f"({first_line(error)}); leave --resume out to start over"
        ) from None


def _check_numbers(model: nn.Module) -> None:
    """Raises: ValueError for what training never leaves. A buffer may hold infinity, as masks do."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite")
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_var is not None:
            counter = module.num_batches_tracked
            if not (module.running_var >= 0).all() or (counter is not None and counter < 0):
                raise ValueError(f"{name} has a variance or a counter below zero")


def _check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Raises: ValueError for a state that is not AdamW's: a step count and two moments of each parameter."""
    for parameter, state in optimizer.state.items():
        for name in ("step", "exp_avg", "exp_avg_sq"):
            value, shape = state.get(name), () if name == "step" else parameter.shape
            if not isinstance(value, torch.Tensor) or value.shape != shape:
                raise ValueError(f"{name} of a parameter is {type(value).__name__}, expected numbers {shape}")
        # Squares of large gradients may be infinite; NaN is not at least 0.
        step, mean, square = (state[name] for name in ("step", "exp_avg", "exp_avg_sq"))
        if not (step > 0 and mean.isfinite().all() and (square >= 0).all()):
            raise ValueError("moments of a parameter are none that training leaves")
