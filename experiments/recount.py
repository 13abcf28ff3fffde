"""A packed file counted a second time, from its bytes: zeros, filters, bits, levels and multiplications.

Nothing of src/ and metrics.py is used but the layout that src/packing.py describes, so that an error there
and the same error here are unlikely to meet. Counts are of one image of 32 x 32 pixels.
"""

import bz2
import hashlib
import json
import lzma
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.history import FileLayer

HEADER_START = 52  # 8 bytes of magic, three numbers of 4 bytes, 32 bytes of SHA-256
WIDTHS, SIDES = (16, 32, 64), (32, 16, 8)  # channels of the three stages, and pixels along a side
FULL_PRECISION = 32  # bits
FILTERS: Any = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20, "lc": 0, "lp": 0, "pb": 0, "nice_len": 273}]

Array = np.ndarray


def recount(content: bytes) -> dict[str, FileLayer]:
    """The counts of every convolution and linear layer, by name.

    Of a network that is not `resnet.py`'s the bytes tell no wiring, and so no multiplications.
    Raises: ValueError in words for bytes that are not as src/packing.py describes.
    """
    said, body = _read(content)
    own, blocks, bits = "network" not in said, said["blocks_per_stage"], said["bits"]
    shapes = dict(_shapes(blocks, said["num_classes"])) if own else said["tensors"]
    tensors = _tensors({name: tuple(shape) for name, shape in shapes.items()}, bits, body)
    ends = ".weight"
    weights = {n.removesuffix(ends): w for n, w in tensors.items() if w.ndim in (2, 4) and n.endswith(ends)}
    macs = _macs(weights, _left(weights, tensors, blocks)) if own else {}
    return {name: _layer(w, bits.get(name), *macs.get(name, (None, None))) for name, w in weights.items()}


def read_claims(content: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the file says of itself: the settings of its run, and its metrics."""
    said = json.loads(_header_bytes(content))
    return said["settings"], said["metrics"]


def body_sizes(content: bytes) -> tuple[int, int]:
    """The bytes of the file's body, and the fewest that one of its three compressions makes of the same."""
    body = _read(content)[1]
    made = [lzma.compress(body, lzma.FORMAT_RAW, filters=FILTERS), bz2.compress(body), zlib.compress(body, 9)]
    return struct.unpack_from("<8sIII", content)[3], min(map(len, made))


def _header_bytes(content: bytes) -> bytes:
    """The header, as JSON."""
    return content[HEADER_START : HEADER_START + struct.unpack_from("<8sII", content)[2]]


def _read(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header, and the body with its compression undone."""
    body_bytes, header = struct.unpack_from("<8sIII", content)[3], _header_bytes(content)
    compressed = content[HEADER_START + len(header) :]
    if len(compressed) != body_bytes:
        raise ValueError(f"the body has {len(compressed)} bytes, the file says {body_bytes}")
    if hashlib.sha256(content[:20] + header + compressed).digest() != content[20:HEADER_START]:
        raise ValueError("the SHA-256 in the file is not that of its content")
    said = json.loads(header)
    undo = {
        "lzma": lambda: lzma.decompress(compressed, lzma.FORMAT_RAW, filters=FILTERS),
        "bz2": lambda: bz2.decompress(compressed),
        "zlib": lambda: zlib.decompress(compressed),
    }
    return said, undo[said["compression"]]()


def _shapes(blocks: int, classes: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the network that its logits depend on, in the order of the file."""

    def convolution(name: str, norm: str, outputs: int, inputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (outputs, inputs, 3, 3)
        for part in ("weight", "bias", "running_mean", "running_var"):
            yield f"{norm}.{part}", (outputs,)

    yield from convolution("conv1", "bn1", WIDTHS[0], 3)
    for stage, width in enumerate(WIDTHS, 1):
        for block in range(blocks):
            before = WIDTHS[stage - 2] if stage > 1 and block == 0 else width
            at = f"layer{stage}.{block}"
            yield from convolution(f"{at}.conv1", f"{at}.bn1", width, before)
            yield from convolution(f"{at}.conv2", f"{at}.bn2", width, width)
    yield "linear.weight", (classes, WIDTHS[-1])
    yield "linear.bias", (classes,)


def _tensors(shapes: dict[str, tuple[int, ...]], bits: dict[str, int], body: bytes) -> dict[str, Array]:
    """The numbers of every tensor; of a coded weight its codes, from -2^(b-1) to 2^(b-1) - 1."""
    coded = {f"{layer}.weight": b for layer, b in bits.items()}
    plain = sum(2 if name in coded else int(np.prod(shape)) for name, shape in shapes.items())
    planes = np.frombuffer(body[: 4 * plain], np.uint8).reshape(4, plain)
    numbers = np.ascontiguousarray(planes.T).view("<f4")[:, 0]
    place, tensors, used = 4 * plain, {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        if name in coded:
            content, place = _codes(body, place, size, coded[name])
            tensors[name], used = content.reshape(shape), used + 2
        else:
            tensors[name], used = numbers[used : used + size].reshape(shape), used + size
    if place != len(body):
        raise ValueError(f"the body has {len(body)} bytes, its tensors take {place}")
    return tensors


def _codes(body: bytes, place: int, size: int, bits: int) -> tuple[Array, int]:
    """`size` codes of so many bits from this byte on, and the first byte behind them.

    A row of as many codes as a byte holds, at least one, begins at a byte; each from its highest bit.
    """
    row = max(1, 8 // bits)
    row_bytes, rows = (row * bits + 7) // 8, (size + row - 1) // row
    taken = np.frombuffer(body, np.uint8, rows * row_bytes, place).reshape(rows, row_bytes).astype(np.int64)
    value = np.zeros(rows, np.int64)
    for byte in range(row_bytes):
        value = (value << 8) | taken[:, byte]
    unused = 8 * row_bytes - row * bits
    each = [(value >> (unused + bits * (row - 1 - i))) & ((1 << bits) - 1) for i in range(row)]
    codes = np.stack(each, 1).reshape(-1)[:size] - ((1 << (bits - 1)) - 1)
    codes[codes == 1 << (bits - 1)] -= 1 << bits  # the one code that has no opposite
    return codes, place + rows * row_bytes


def _left(weights: dict[str, Array], tensors: dict[str, Array], blocks: int) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each layer that are left: what depends on the image and is read."""
    links = {}
    for name, w in weights.items():
        links[name] = (w != 0).any((2, 3)) if w.ndim == 4 else w != 0
        if w.ndim == 4:
            links[name] = links[name] & (tensors[f"{name.replace('conv', 'bn')}.weight"] != 0)[:, None]
    path = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(blocks)]
    stream = links["conv1"].any(1)
    entering, inner, branch = {}, {}, {}
    for at in path:
        entering[at] = stream
        inner[at] = (links[f"{at}.conv1"] & stream).any(1)
        branch[at] = (links[f"{at}.conv2"] & inner[at]).any(1)
        stream = branch[at] | _shortcut(stream, len(branch[at]))
    linear = links["linear"]
    answers = (linear & stream).any(1)
    left = {"linear": (answers, stream & linear.any(0))}
    needed = linear.any(0)
    for at in reversed(path):
        inner_needed = links[f"{at}.conv2"][needed].any(0)
        left[f"{at}.conv2"] = (needed & branch[at], inner[at] & inner_needed)
        reads = links[f"{at}.conv1"][inner_needed].any(0)
        left[f"{at}.conv1"] = (inner_needed & inner[at], entering[at] & reads)
        needed = reads | _shortcut_back(needed, len(reads))
    left["conv1"] = (needed & links["conv1"].any(1), links["conv1"][needed].any(0))
    return {name: (int(outputs.sum()), int(inputs.sum())) for name, (outputs, inputs) in left.items()}


def _shortcut(flags: Array, channels: int) -> Array:
    """Option A: the old channels in the middle of the new ones."""
    beside = (channels - len(flags)) // 2
    return np.pad(flags, beside) if beside else flags


def _shortcut_back(flags: Array, channels: int) -> Array:
    beside = (len(flags) - channels) // 2
    return flags[beside : beside + channels]


def _macs(weights: dict[str, Array], left: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Structured and unstructured multiplications of each layer."""
    macs = {}
    for name, w in weights.items():
        positions = SIDES[int(name[5]) - 1] ** 2 if name.startswith("layer") else SIDES[0] ** 2
        positions, kernel = (positions, 9) if w.ndim == 4 else (1, 1)
        outputs, inputs = left[name]
        macs[name] = outputs * inputs * kernel * positions, int(np.count_nonzero(w)) * positions
    return macs


def _values(row: Array) -> int:
    """The number of different values in a row, but for rounding."""
    apart = np.diff(np.sort(row)) > 1e-6 * np.abs(row).max(initial=0)
    return int(apart.sum()) + 1


def _layer(w: Array, bits: int | None, structured: int | None, unstructured: int | None) -> FileLayer:
    zeros = int(w.size - np.count_nonzero(w))
    return FileLayer(
        coded=bits is not None,
        bits=FULL_PRECISION if bits is None else bits,
        levels=len(np.unique(w)) if bits is not None else max(map(_values, w.reshape(len(w), -1)), default=0),
        weights=int(w.size),
        zero_weights=zeros,
        filters=len(w),
        zero_filters=sum(not np.any(row) for row in w),
        structured_macs=structured,
        unstructured_macs=unstructured,
    )
