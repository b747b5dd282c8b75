"""The policy ``paper``: the selection of the Krul paper (arXiv 2507.08045), reimplemented.

What it measures is in :mod:`krul_sglang.similarity.layers`. Of the selection it leaves open,
and this module chooses:

- *The threshold*, for which no figure is known. ``THRESHOLD`` keeps about two thirds of
  the layers of SmolLM2-135M, nearly all of them in the deep half.
- *The target ratio* is a number of pairs. Fewer are returned where too few layers are
  left; layers below the threshold are never taken to fill up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from krul_sglang.strategy.base import Estimate, Selector, Strategy
from krul_sglang.strategy.fixed import fixed_pairs

if TYPE_CHECKING:
    import torch

    from krul_sglang.similarity.layers import LayerSimilarity
    from krul_sglang.similarity.window import QueryWindow

THRESHOLD = 0.7
"""Attention mass on both edges below which a layer is input-dependent."""


def select_pairs(
    similarity: LayerSimilarity, count: int, threshold: float = THRESHOLD
) -> tuple[tuple[int, int], ...]:
    """At most ``count`` disjoint ``(lower, upper)`` pairs of alike layers, ascending.

    Pairs are taken in the order of their distance, ties by layer number.
    """
    eligible = [n for n, share in enumerate(similarity.edges.tolist()) if share >= threshold]
    distance = similarity.distance.tolist()
    order = sorted((distance[i][j], i, j) for j in eligible for i in eligible if i < j)
    pairs: list[tuple[int, int]] = []
    taken: set[int] = set()
    for _, lower, upper in order:
        if len(pairs) >= count:
            break
        if lower not in taken and upper not in taken:
            pairs.append((lower, upper))
            taken |= {lower, upper}
    return tuple(sorted(pairs))


class PaperSelector(Selector):
    """Merges as many pairs as ``fixed`` does, those that attend alike in this conversation."""

    stride: ClassVar[int] = 1

    def __init__(self, layers: int) -> None:
        self._pairs = fixed_pairs(layers)

    @property
    def default(self) -> Strategy:
        """MiniCache's pairs."""
        return Strategy("pair_merge", pairs=self._pairs)

    def measure(
        self, window: QueryWindow, keys: Sequence[torch.Tensor], rows: torch.Tensor, scale: float
    ) -> Estimate:
        """See :class:`Selector`."""
        from krul_sglang.similarity.layers import similarity_of_window

        return Estimate(layers=similarity_of_window(window, keys, rows, scale))

    def choose(self, estimate: Estimate) -> Strategy:
        """See :class:`Selector`."""
        if estimate.layers is None:
            return self.default
        pairs = select_pairs(estimate.layers, len(self._pairs))
        return Strategy("pair_merge", pairs=pairs, similarity=estimate.layers)
