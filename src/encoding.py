"""Integer codes and float32 numbers to bytes, bytes compressed by Python's own library, and all of it back.

Codes of b bits are packed 8 // b to a byte, with zero bits left over, so that none is split between two
bytes. (Codes of more than 8 bits take whole bytes, one code at a time.) Compressors work on bytes: without
splits they need up to a quarter less than for codes packed without gaps.

The bytes to decode may come from an untrusted file, so that no function here produces more bytes than its
caller asked for.
"""

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np


class PackingError(ValueError):
    """One sentence that says why a network cannot be packed, or why a file is not a packed network."""


def code_bytes(count: int, bits: int) -> int:
    """The number of bytes that `pack_codes` makes of `count` codes of so many bits."""
    return -(-count // _row(bits)) * -(-_row(bits) * bits // 8)


def pack_codes(codes: np.ndarray, bits: int) -> bytes:
    """Pack codes (n,), each from 0 to 2^bits - 1, into bytes; the most significant bit comes first.

    >>> pack_codes(np.array([1, 2, 3]), bits=3).hex()  # 001 010 00, 011 000 00
    '2860'
    """
    padded = np.pad(codes, (0, -len(codes) % _row(bits)))
    digits = padded[:, None] >> np.arange(bits)[::-1] & 1  # (n, bits)
    return np.packbits(digits.astype(np.uint8).reshape(-1, _row(bits) * bits), axis=1).tobytes()


def unpack_codes(content: bytes, count: int, bits: int) -> np.ndarray:
    """Unpack what `pack_codes` made: `code_bytes(count, bits)` bytes -> (count,) int64.

    >>> unpack_codes(bytes.fromhex("2860"), count=3, bits=3)
    array([1, 2, 3])
    """
    rows = np.frombuffer(content, np.uint8).reshape(-(-count // _row(bits)), -1)
    digits = np.unpackbits(rows, axis=1, count=_row(bits) * bits).reshape(-1, bits)[:count]
    return digits @ (1 << np.arange(bits)[::-1])


def _row(bits: int) -> int:
    """How many codes share a byte; 1 if a code takes more than a byte."""
    return max(1, 8 // bits)


def pack_numbers(numbers: np.ndarray) -> bytes:
    """Pack numbers (n,) as little-endian float32 in byte planes: byte 0 of every number, then byte 1, ...

    In the planes the exponents of all numbers are adjacent, which compresses better.
    """
    return numbers.astype("<f4").view(np.uint8).reshape(-1, 4).T.tobytes()


def unpack_numbers(content: bytes) -> np.ndarray:
    """Unpack what `pack_numbers` made: 4 n bytes -> (n,) float32."""
    planes = np.frombuffer(content, np.uint8).reshape(4, -1)
    return np.ascontiguousarray(planes.T).view("<f4").ravel().astype(np.float32)


# With lc, lp and pb 0, LZMA predicts a byte from no neighbour and no position: neighbouring codes are almost
# independent of each other.
_LZMA: Any = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20, "lc": 0, "lp": 0, "pb": 0, "nice_len": 273}]

COMPRESSIONS: dict[str, tuple[Callable[[bytes], bytes], Callable[[], Any]]] = {
    "lzma": (
        lambda content: lzma.compress(content, lzma.FORMAT_RAW, filters=_LZMA),
        lambda: lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_LZMA),
    ),
    "bz2": (bz2.compress, bz2.BZ2Decompressor),
    "zlib": (lambda content: zlib.compress(content, 9), zlib.decompressobj),
}


ALL_TRIED = 1 << 24  # bytes; on ten times as many the others take minutes


def compress(content: bytes) -> tuple[str, bytes]:
    """Compress with the one of `COMPRESSIONS` that makes the fewest bytes; a large content with the quickest.

    Returns: its name, these bytes.
    """
    names = COMPRESSIONS if len(content) <= ALL_TRIED else ("zlib",)
    made = {name: COMPRESSIONS[name][0](content) for name in names}
    return min(made.items(), key=lambda item: len(item[1]))


def decompress(compressed: bytes, compression: str, size: int) -> bytes:
    """Decompress what `compress` made of `size` bytes, 1 or more; stops after one byte more than these.

    Raises: PackingError if the content is not exactly `size` bytes, compressed in this way.
    """
    decoder = COMPRESSIONS[compression][1]()
    try:
        content = decoder.decompress(compressed, size + 1)
    except (zlib.error, lzma.LZMAError, OSError, EOFError) as error:
        raise PackingError(f"the body cannot be decompressed ({error})") from None
    if len(content) != size or not decoder.eof or decoder.unused_data:
        raise PackingError(f"the body does not hold the {size} bytes that its architecture and bits take")
    return content
