"""How alike layers attend, from what is left of the measured codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from krul_sglang.similarity.layers import LayerSimilarity
from krul_sglang.similarity.record import CodeSums, Distances, layer_matrix, record_of
from krul_sglang.similarity.window import STRIDE
from krul_sglang.strategy.base import Strategy

LAYERS, TOKENS = 7, 500
SAMPLED = tuple(range(0, LAYERS, STRIDE))


def codes_of(seed: int, tokens: int = TOKENS) -> np.ndarray:
    """uint8 ``[layers, tokens]``: sampled layers that resemble each other, the rest repeated."""
    rng = np.random.default_rng(seed)
    common = rng.normal(70, 20, tokens)
    own = [0.7 * common + rng.normal(0, 15 + n, tokens) for n in SAMPLED]
    return np.repeat(own, STRIDE, 0)[:LAYERS].clip(0, 255).astype(np.uint8)


def measured(codes: np.ndarray) -> Strategy:
    return Strategy("predictive", attention=codes.tobytes())


@pytest.mark.parametrize("parts", [1, 3])
def test_correlation_is_that_of_all_tokens_together(parts: int) -> None:
    codes = codes_of(1)
    cuts = np.array_split(codes, parts, axis=1)
    found = layer_matrix(record_of(measured(cut), cut.shape[1]) for cut in cuts)
    assert (found.measure, found.layers, found.tokens) == ("correlation", SAMPLED, TOKENS)
    np.testing.assert_allclose(found.values, np.corrcoef(codes[::STRIDE]), atol=1e-5)
    assert 0.2 < found.values[0, 1] < 0.9


def test_the_longest_segments_sums_stay_precise() -> None:
    codes = (codes_of(2, 60_000) // 8 + 224).astype(np.uint8)  # large mean, little spread
    found = layer_matrix([record_of(measured(codes), 60_000)])
    np.testing.assert_allclose(found.values, np.corrcoef(codes[::STRIDE]), atol=1e-3)


def test_a_layer_that_looks_at_all_tokens_alike_correlates_with_nothing() -> None:
    codes = codes_of(3)
    codes[2:4] = 173
    found = layer_matrix([record_of(measured(codes), TOKENS)]).values
    assert np.isnan(found[1]).all()
    assert np.isnan(found[:, 1]).all()
    assert np.isfinite(found[0, 2])


def test_distances_are_the_last_ones() -> None:
    def strategy(seed: int) -> Strategy:
        x = torch.randn(LAYERS, 4, generator=torch.Generator().manual_seed(seed)).double()
        similarity = LayerSimilarity(torch.zeros(LAYERS).double(), torch.cdist(x, x))
        return Strategy("pair_merge", similarity=similarity)

    early, late = strategy(1), strategy(2)
    found = layer_matrix([record_of(early, 30), record_of(late, 12)])
    assert (found.measure, found.layers, found.tokens) == ("distance", tuple(range(LAYERS)), 42)
    np.testing.assert_allclose(found.values, late.similarity.distance, rtol=1e-6, atol=1e-7)


def test_nothing_measured_is_nothing_kept() -> None:
    assert record_of(Strategy("predictive"), 9) is None
    assert layer_matrix([]) is None


def test_it_is_small() -> None:
    """30 layers: what they drew is 30 bytes a token, what is kept does not grow with tokens."""
    codes = np.zeros((30, 1024), np.uint8)
    assert CodeSums.of(codes).nbytes == 4 * (15 + 15 * 16 // 2)
    assert Distances.of(np.zeros((30, 30)), 9).nbytes == 4 * 30 * 29 // 2
