"""A compressed network that was received: what it is, and whether what it says of itself holds, untrained.

experiments/verify.py is the command for it; a rehearsal (experiments/rehearsal.py) does the same.
"""

import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from experiments.data import CLASSES, Dataset, TestBatches
from experiments.training import predict
from metrics import count_by_torch, count_network
from src.encoding import PackingError
from src.packing import MAX_FILE_BYTES, read_header, unpack_network

ENDINGS = (".codeq", ".pt2")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Received:
    """What was found out of a file."""

    holds: bool  # what it says of its own multiplications
    accuracy: float  # on the test images, 0 to 1
    macs: int  # as the network runs, counted by torch


def check_file(path: Path, load: Callable[[], Dataset], say: Say) -> Received:
    """Check a file and tell `say` what is found. The data set is loaded once the file has been read.

    Raises: ValueError for a file that cannot be checked, and what `load` raises.
    """
    if path.suffix not in ENDINGS:
        raise ValueError(
            f"{path} ends in {path.suffix!r}; expected a file that ends in {' or '.join(ENDINGS)}"
        )
    content = _read(path)
    say(f"File:     {path}, {len(content):,} bytes")
    holds = True
    if path.suffix == ".codeq":
        try:
            network, holds = _describe_packed(content, say)
        except PackingError as error:
            raise ValueError(f"{path}: {error}; get the file again") from None
    else:
        network = _load_exported(path, content)
    dataset = load()
    say(f"Data:     {dataset.name}, {len(dataset.test_labels):,} test images ({dataset.source})")
    try:
        accuracy, macs = _accuracy(network, TestBatches(dataset, "cpu")), count_by_torch(network)[""]
    except Exception as error:  # an exported network of another kind fails in its own way
        raise ValueError(
            f"{path} holds no network for 3 x 32 x 32 images and {CLASSES} classes ({type(error).__name__})"
        ) from None
    say(f"Accuracy: {100 * accuracy:.2f} %")
    say(f"MACs:     {macs:,} as the network runs, counted by torch")
    return Received(holds, accuracy, macs)


def _read(path: Path) -> bytes:
    """The whole file, a packed one only up to the size that one can have."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES * 2 if path.suffix == ".codeq" else -1)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; name a file that is there") from None


def _describe_packed(content: bytes, say: Say) -> tuple[nn.Module, bool]:
    """The network of a packed file, and whether what the file says of its MACs holds.

    Raises: PackingError. What the file says in words is shown with its control characters escaped.
    """
    header, network = read_header(content), unpack_network(content)
    claimed = header.metrics.get("structured_macs")
    if claimed is not None and type(claimed) is not int:
        raise PackingError(f"the file claims {claimed!r:.60} MACs; expected a whole number")
    count = count_network(network)
    left = count.total("structured_macs")
    zeros, weights = count.total("zero_weights"), count.total("weights")
    preset = header.settings.get("preset", "?")
    say(f"Network:  {header.blocks_per_stage} blocks a stage; preset {preset!r:.60}")
    say(f"Bits:     {', '.join(f'{name} {bits}' for name, bits in header.bits.items()) or 'none quantized'}")
    say(f"Zeros:    {zeros:,} of {weights:,} weights")
    said = "the file makes no claim" if claimed is None else f"the file claims {claimed:,}"
    holds = claimed in (None, left)
    say(f"Left:     {left:,} of {count.total('dense_macs'):,} MACs without the dead channels; {said}"
        + ("" if holds else ": NOT TRUE"))  # fmt: skip
    return network, holds


def _load_exported(path: Path, content: bytes) -> nn.Module:
    # What torch logs of a damaged archive is a traceback; the sentence below says it.
    logging.getLogger("torch.export").setLevel(logging.CRITICAL)
    try:
        return torch.export.load(io.BytesIO(content)).module()
    except Exception as error:  # torch raises all kinds for a damaged archive
        raise ValueError(
            f"{path} is no network that torch.export saved ({type(error).__name__}); get the file again"
        ) from None


def _accuracy(network: nn.Module, batches: TestBatches) -> float:
    logits, labels = predict(network, batches)
    if logits.shape != (len(labels), CLASSES):
        raise ValueError(f"logits of shape {tuple(logits.shape)}")
    return (logits.argmax(1) == labels).double().mean().item()
