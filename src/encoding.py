"""Integer codes and float32 numbers as bytes, and bytes made small with what Python ships; both ways.

A code takes its layer's bits. Codes share a byte where several fit, but none lies across two bytes that would
fit in one: compressors, which look at bytes, then need up to a quarter less than where codes leave no gap.

What is decoded may come from a stranger, so nothing here makes more bytes than the caller expects.
"""

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np


class PackingError(ValueError):
    """One sentence about a network that cannot be packed, or a file that is not a packed network."""


def code_bytes(count: int, bits: int) -> int:
    """The bytes of so many codes."""
    return -(-count // _row(bits)) * -(-_row(bits) * bits // 8)


def pack_codes(codes: np.ndarray, bits: int) -> bytes:
    """Codes 0 to 2^bits - 1, (n,), from the most significant bit.

    >>> pack_codes(np.array([1, 2, 3]), bits=3).hex()  # 001 010 00, 011 000 00
    '2860'
    """
    padded = np.pad(codes, (0, -len(codes) % _row(bits)))
    digits = padded[:, None] >> np.arange(bits)[::-1] & 1  # (n, bits)
    return np.packbits(digits.astype(np.uint8).reshape(-1, _row(bits) * bits), axis=1).tobytes()


def unpack_codes(content: bytes, count: int, bits: int) -> np.ndarray:
    """Back from `code_bytes(count, bits)` bytes to (count,) int64.

    >>> unpack_codes(bytes.fromhex("2860"), count=3, bits=3)
    array([1, 2, 3])
    """
    rows = np.frombuffer(content, np.uint8).reshape(-(-count // _row(bits)), -1)
    digits = np.unpackbits(rows, axis=1, count=_row(bits) * bits).reshape(-1, bits)[:count]
    return digits @ (1 << np.arange(bits)[::-1])


def _row(bits: int) -> int:
    """Codes that share a byte; 1 where a code takes more than a byte."""
    return max(1, 8 // bits)


def pack_numbers(numbers: np.ndarray) -> bytes:
    """float32, (n,), little-endian, in byte planes: the first byte of each, the second of each ...

    Exponents then stand side by side, which compresses better.
    """
    return numbers.astype("<f4").view(np.uint8).reshape(-1, 4).T.tobytes()


def unpack_numbers(content: bytes) -> np.ndarray:
    """Back from 4 n bytes to (n,) float32."""
    planes = np.frombuffer(content, np.uint8).reshape(4, -1)
    return np.ascontiguousarray(planes.T).view("<f4").ravel().astype(np.float32)


# LZMA takes each byte without context, since neighbouring codes say little of each other.
_LZMA: Any = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20, "lc": 0, "lp": 0, "pb": 0, "nice_len": 273}]

COMPRESSIONS: dict[str, tuple[Callable[[bytes], bytes], Callable[[], Any]]] = {
    "lzma": (
        lambda content: lzma.compress(content, lzma.FORMAT_RAW, filters=_LZMA),
        lambda: lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_LZMA),
    ),
    "bz2": (bz2.compress, bz2.BZ2Decompressor),
    "zlib": (lambda content: zlib.compress(content, 9), zlib.decompressobj),
}


def compress(content: bytes) -> tuple[str, bytes]:
    """The name of the compression that makes the fewest bytes, and these."""
    made = {name: encode(content) for name, (encode, _) in COMPRESSIONS.items()}
    return min(made.items(), key=lambda item: len(item[1]))


def decompress(compressed: bytes, compression: str, size: int) -> bytes:
    """Back to exactly `size` bytes, 1 or more; it stops at one byte beyond them.

    Raises: PackingError for anything that `compress` does not make of so many bytes.
    """
    decoder = COMPRESSIONS[compression][1]()
    try:
        content = decoder.decompress(compressed, size + 1)
    except (zlib.error, lzma.LZMAError, OSError, EOFError) as error:
        raise PackingError(f"the body cannot be decompressed ({error})") from None
    if len(content) != size or not decoder.eof or decoder.unused_data:
        raise PackingError(f"the body does not hold the {size} bytes that its architecture and bits take")
    return content
