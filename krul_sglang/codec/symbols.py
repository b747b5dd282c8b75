"""Small integers as bytes that a Huffman coder can squeeze.

zstd's Huffman stage spends at least one bit a byte, and one table serves a whole
block. So symbols that are nearly always zero share a byte, and symbols of a
similar spread share a block. How many fit is decided by ``ratio``, the standard
deviation over the quantization step, which both sides know from the profile.
A symbol beyond its alphabet is stored saturated and the rest of it in an overflow
list, so no value is lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

EDGES = np.array([0.28, 0.38, 0.55, 0.8, 1.2, 1.8, 2.6, 4.0, 7.0], np.float64)
"""Bin ``b`` holds ratios in ``[EDGES[b], EDGES[b + 1])``, the last bin all above.
Below the first edge a coefficient is dropped. It would nearly always be zero, and what
0.15 instead of 0.28 buys (5 % more ratio) costs a quarter of the decoder's arithmetic."""


@dataclass(frozen=True)
class Alphabet:
    """``largest``: symbols are ``-largest .. largest``; ``share``: how many go into a byte."""

    largest: int
    share: int

    def packed(self, symbols: int) -> int:
        """Bytes of ``symbols`` symbols."""
        return -(-symbols // self.share)


def _alphabet(low: float) -> Alphabet:
    if low < 0.3:
        return Alphabet(1, 5)
    if low < 0.75:
        return Alphabet(2, 3)
    return Alphabet(7, 2) if low < 2.6 else Alphabet(127, 1)


ALPHABETS = tuple(_alphabet(float(low)) for low in EDGES)


def bin_bounds(sigma: np.ndarray, step: float) -> list[int]:
    """Where each bin begins in ``sigma`` (float64, falling): ``bounds[b + 1] .. bounds[b]``.

    Only comparisons of IEEE quotients, so every machine draws the same lines.
    """
    ratio = sigma / step
    return [int(np.count_nonzero(ratio >= edge)) for edge in EDGES] + [0]


@cache
def _tables(alphabet: Alphabet) -> list[bytes]:
    """For each place in a byte, the byte -> symbol (offset by ``largest``) table."""
    base = 2 * alphabet.largest + 1
    every = np.arange(256)
    return [
        np.minimum(every // base**place % base, base - 1).astype(np.uint8).tobytes()
        for place in range(alphabet.share)
    ]


def pack(symbols: np.ndarray, alphabet: Alphabet) -> tuple[bytes, np.ndarray]:
    """Bytes of flat int32 ``symbols``, and what overflows (uint16, in order).

    Raises ValueError where a symbol exceeds what the overflow list can hold.
    """
    largest = alphabet.largest
    clipped = np.clip(symbols, -largest, largest)
    edge = np.flatnonzero((clipped == largest) | (clipped == -largest))
    over = np.abs(symbols[edge]) - largest
    if over.size and int(over.max()) > 0xFFFF:
        raise ValueError("values too far from what the profile predicts")
    rows = np.zeros((alphabet.share, alphabet.packed(len(symbols))), np.uint8)
    rows.reshape(-1)[: len(symbols)] = clipped + largest
    out = rows[-1]
    for row in rows[-2::-1]:
        out = out * np.uint8(2 * largest + 1) + row
    return out.tobytes(), over.astype(np.uint16)


def unpack(packed: bytes, count: int, alphabet: Alphabet) -> np.ndarray:
    """uint8 ``[count]``, symbol + ``largest``."""
    places = [packed.translate(table) for table in _tables(alphabet)]
    joined = places[0] if len(places) == 1 else b"".join(places)
    return np.frombuffer(joined, np.uint8, count)


def saturated(symbols: np.ndarray, alphabet: Alphabet) -> np.ndarray:
    """Where :func:`unpack`'s symbols have an overflow entry."""
    return np.flatnonzero((symbols == 2 * alphabet.largest) | (symbols == 0))
