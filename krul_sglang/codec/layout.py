"""How a predictive payload is laid out: what both sides know from profile, step and classes.

Layers share a frame until it is worth compressing. Within a frame, coefficients go by
bin of :mod:`krul_sglang.codec.symbols`, within a bin by layer, class and coefficient.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from krul_sglang.codec.symbols import ALPHABETS, bin_bounds

if TYPE_CHECKING:
    from krul_sglang.profile.base import LayerMaps, Profile

FACTORS = tuple(2.0 ** (0.75 * (c - 2)) for c in range(4))
"""Step of a token's class against the segment's step, the most important class first."""
EXPANSION = 512
"""A frame may hold at most this many times its length; what packs better is no KV."""
GROUP_SYMBOLS = 128 * 1024
"""Layers share a frame until it holds this many symbols, so short runs stay small."""


class Cell(NamedTuple):
    """Coefficients ``first .. last`` of the (sorted) tokens ``begin .. end``, all one class."""

    layer: int
    first: int
    last: int
    begin: int
    end: int

    @property
    def symbols(self) -> int:
        """How many."""
        return (self.last - self.first) * (self.end - self.begin)


@dataclass(frozen=True)
class Plan:
    """What profile and step say about a layer.

    widths: coefficients that each class stores. cells: ``(bin, class, first, last)`` of
        the coefficients that lie in a bin, in the order they are stored.
    """

    maps: LayerMaps
    widths: tuple[int, ...]
    cells: tuple[tuple[int, int, int, int], ...]

    @property
    def width(self) -> int:
        """Coefficients that any class stores."""
        return self.widths[0]

    def packed(self, count: np.ndarray) -> float:
        """Bytes of the layer before entropy coding, without overflow; ``count`` = tokens of
        each class."""
        symbols = sum(
            (last - first) * count[c] / ALPHABETS[b].share for b, c, first, last in self.cells
        )
        return float(symbols + count.sum() / 4)


def plans_of(profile: Profile, step: float, shared: Collection[int] = ()) -> list[Plan]:
    """Every layer's :class:`Plan`; deterministic, so that nothing of it is stored.

    A layer in ``shared`` stores no coefficient: it is its prediction.
    """
    out = []
    for layer, maps in enumerate(profile.layers):
        sigma = maps.sigma.double().numpy()
        if layer in shared:
            sigma = np.zeros_like(sigma)
        bounds = [bin_bounds(sigma, step * factor) for factor in FACTORS]
        cells = tuple(
            (b, c, bounds[c][b + 1], bounds[c][b])
            for b in range(len(ALPHABETS))
            for c in range(len(FACTORS))
            if bounds[c][b] > bounds[c][b + 1]
        )
        out.append(Plan(maps, tuple(own[0] for own in bounds), cells))
    return out


def groups_of(layers: int, symbols: int) -> list[tuple[int, int]]:
    """Ranges of layers that share a frame, each layer having ``symbols`` coefficients."""
    size = max(1, -(-GROUP_SYMBOLS // max(1, symbols)))
    return [(a, min(a + size, layers)) for a in range(0, layers, size)]


def cells_of(plans: Sequence[Plan], counts: Sequence[np.ndarray]) -> list[list[Cell]]:
    """Per bin, its cells in the order they are stored; ``counts`` = tokens of each class."""
    out: list[list[Cell]] = [[] for _ in ALPHABETS]
    for layer, (plan, count) in enumerate(zip(plans, counts, strict=True)):
        ends = list(accumulate(count.tolist(), initial=0))
        for b, c, first, last in plan.cells:
            if ends[c + 1] > ends[c]:
                out[b].append(Cell(layer, first, last, ends[c], ends[c + 1]))
    return out


def slabs_of(count: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """``(class, begin, end)`` of the tokens of each class that occurs."""
    end = 0
    for c, tokens in enumerate(count.tolist()):
        begin, end = end, end + tokens
        if tokens:
            yield c, begin, end


def pack_classes(classes: np.ndarray) -> bytes:
    """Four classes (0 to 3) a byte."""
    padded = np.zeros(-(-len(classes) // 4) * 4, np.uint8)
    padded[: len(classes)] = classes
    q = padded.reshape(4, -1)
    return (q[0] | q[1] << 2 | q[2] << 4 | q[3] << 6).tobytes()


def unpack_classes(packed: np.ndarray, tokens: int) -> np.ndarray:
    """The inverse of :func:`pack_classes`, uint8 ``[tokens]``."""
    q = np.stack([packed & 3, packed >> 2 & 3, packed >> 4 & 3, packed >> 6])
    return q.reshape(-1)[:tokens]
