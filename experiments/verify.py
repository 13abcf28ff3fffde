"""Check a compressed network that someone sends: accuracy, counts and bytes, without training.

    python -m experiments.verify debug_output/compressed.codeq --data-dir data
    python -m experiments.verify debug_output/slim.pt2 --data synthetic

A packed file (.codeq) holds no code and is safe to open whoever sends it. A .pt2 file is torch's own format,
which is not meant for files from strangers: open those of people you trust.
Exit status: 0, 1 when a packed file's own claims do not hold, 2 for bad input.
"""

import argparse
import io
import logging
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.data import DataError, TestBatches, load_dataset
from experiments.proofs import counted_macs
from experiments.settings import DATA
from metrics import count_network
from src.packing import MAX_FILE_BYTES, read_header, unpack_network

ENDINGS = (".codeq", ".pt2")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.verify", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, metavar="FILE", help="compressed.codeq or slim.pt2")
    parser.add_argument("--data", choices=DATA, default="auto", help="as for experiments.debug_run")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder of cifar-10-batches-py")
    parser.add_argument("--limit-test", type=int, help="use only the first so many test images")
    chosen = parser.parse_args(arguments)
    try:
        return verify(chosen.file, chosen.data, chosen.data_dir, chosen.limit_test)
    except (ValueError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def verify(path: Path, data: str, data_dir: Path, limit_test: int | None) -> int:
    if path.suffix not in ENDINGS:
        raise ValueError(
            f"{path} ends in {path.suffix!r}; expected a file that ends in {' or '.join(ENDINGS)}"
        )
    content = _read(path)
    dataset = load_dataset(data, data_dir, None, limit_test, print)
    print(f"Data:     {dataset.name}, {len(dataset.test_labels):,} test images ({dataset.source})")
    print(f"File:     {path}, {len(content):,} bytes")
    kept = _describe_packed(content) if path.suffix == ".codeq" else None
    network = kept[0] if kept else _load_exported(path, content)
    print(f"Accuracy: {100 * _accuracy(network, TestBatches(dataset, 'cpu')):.2f} %")
    print(f"MACs:     {counted_macs(network, 'cpu'):,} as the network runs, counted by torch")
    return 0 if kept is None or kept[1] else 1


def _read(path: Path) -> bytes:
    """The whole file, a packed one only up to the size that one can have."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES * 2 if path.suffix == ".codeq" else -1)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; name a file that is there") from None


def _describe_packed(content: bytes) -> tuple[nn.Module, bool]:
    """The network of a packed file, and whether what the file says of its MACs holds."""
    header, network = read_header(content), unpack_network(content)
    count = count_network(network)
    left = count.total("structured_macs")
    zeros, weights = count.total("zero_weights"), count.total("weights")
    print(f"Network:  {header.blocks_per_stage} blocks a stage; preset {header.settings.get('preset', '?')}")
    print(
        f"Bits:     {', '.join(f'{name} {bits}' for name, bits in header.bits.items()) or 'none quantized'}"
    )
    print(f"Zeros:    {zeros:,} of {weights:,} weights")
    claimed = header.metrics.get("structured_macs")
    holds = claimed in (None, left)
    said = "the file makes no claim" if claimed is None else f"the file claims {claimed:,}"
    print(f"Left:     {left:,} of {count.total('dense_macs'):,} MACs without the dead channels; {said}"
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


@torch.inference_mode()
def _accuracy(network: nn.Module, batches: TestBatches) -> float:
    hits: list[Tensor] = [network(images).argmax(1) == labels for images, labels in batches]
    return torch.cat(hits).double().mean().item()


if __name__ == "__main__":
    sys.exit(main())
