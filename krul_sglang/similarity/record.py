"""What is kept of measured attention once a segment is encoded: how alike layers attend.

The codes themselves (a byte a token and layer) are needed once, to choose token classes. Their
sums and products are enough for the correlation between two layers, over as many segments as a
conversation has.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from krul_sglang.similarity.window import STRIDE

if TYPE_CHECKING:
    from krul_sglang.strategy.base import Strategy


@dataclass(frozen=True)
class CodeSums:
    """Attention codes of a segment's tokens, summed.

    sums: float32 ``[n]``, of the sampled layers. products: float32 ``[n (n + 1) / 2]``, of every
    two of them, in the order of ``numpy.tril_indices``.
    """

    tokens: int
    sums: np.ndarray
    products: np.ndarray

    @classmethod
    def of(cls, codes: np.ndarray) -> CodeSums:
        """Of uint8 ``[layers, tokens]``, in which layers that were not sampled repeat others."""
        sampled = codes[::STRIDE].astype(np.float64)
        products = (sampled @ sampled.T)[np.tril_indices(len(sampled))]
        return cls(codes.shape[1], sampled.sum(1).astype(np.float32), products.astype(np.float32))

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return self.sums.nbytes + self.products.nbytes


@dataclass(frozen=True)
class Distances:
    """Distances between the attention of layers, over the whole conversation so far.

    values: float32 ``[layers (layers - 1) / 2]``, below the diagonal, row by row.
    """

    tokens: int
    layers: int
    values: np.ndarray

    @classmethod
    def of(cls, matrix: np.ndarray, tokens: int) -> Distances:
        """Of a symmetric ``[layers, layers]``, for a segment of ``tokens``."""
        below = matrix[np.tril_indices(len(matrix), -1)]
        return cls(tokens, len(matrix), below.astype(np.float32))

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return self.values.nbytes


AttentionRecord = CodeSums | Distances


def record_of(strategy: Strategy, tokens: int) -> AttentionRecord | None:
    """What to keep of what a segment's strategy was chosen by; None where nothing was measured."""
    if strategy.attention:
        return CodeSums.of(np.frombuffer(strategy.attention, np.uint8).reshape(-1, tokens))
    if strategy.similarity is not None:
        return Distances.of(strategy.similarity.distance.numpy(), tokens)
    return None


@dataclass(frozen=True)
class LayerMatrix:
    """How alike the layers of a conversation attend.

    measure: ``correlation`` (of attention levels over tokens, -1 to 1) or ``distance`` (see
        :class:`krul_sglang.similarity.layers.LayerSimilarity`; 0 is alike).
    layers: those that were sampled. values: float64 ``[sampled, sampled]``, symmetric; NaN where
        a layer looked at all tokens alike. tokens: of the segments it was measured for.
    """

    measure: str
    layers: tuple[int, ...]
    values: np.ndarray
    tokens: int


def layer_matrix(records: Iterable[AttentionRecord]) -> LayerMatrix | None:
    """Of a conversation's segments, first to last. Sums add up; distances are of the whole
    conversation, so the last ones know most."""
    found = list(records)
    sums = [record for record in found if isinstance(record, CodeSums)]
    if sums:
        return _correlation(sums)
    distances = [record for record in found if isinstance(record, Distances)]
    if not distances:
        return None
    layers = distances[-1].layers
    values = _symmetric(distances[-1].values, layers, -1)
    tokens = sum(record.tokens for record in distances)
    return LayerMatrix("distance", tuple(range(layers)), values, tokens)


def _correlation(records: list[CodeSums]) -> LayerMatrix:
    """Pearson's, over the tokens of all records together."""
    tokens = sum(record.tokens for record in records)
    mean = np.stack([record.sums for record in records]).sum(0, np.float64) / tokens
    products = np.stack([record.products for record in records]).sum(0, np.float64) / tokens
    covariance = _symmetric(products, len(mean), 0) - np.outer(mean, mean)
    # What float32 leaves of a layer that is constant is no spread.
    variance = np.diag(covariance)
    spread = np.sqrt(np.where(variance > 1e-6 * mean**2, variance, np.nan))
    values = np.clip(covariance / np.outer(spread, spread), -1, 1)
    return LayerMatrix("correlation", tuple(range(0, len(mean) * STRIDE, STRIDE)), values, tokens)


def _symmetric(below: np.ndarray, layers: int, diagonal: int) -> np.ndarray:
    """``[layers, layers]`` from what lies on and below a diagonal of it."""
    out = np.zeros((layers, layers))
    out[np.tril_indices(layers, diagonal)] = below
    return out + np.tril(out, -1).T
