"""How alike layers attend: from sampled queries, chunk by chunk, as from whole maps."""

from __future__ import annotations

import math

import pytest
import torch

from krul_sglang.similarity import layers as module
from krul_sglang.similarity.layers import similarity_of_maps, similarity_of_window
from krul_sglang.similarity.window import QueryWindow
from krul_sglang.strategy.base import Estimate
from krul_sglang.strategy.fixed import FixedSelector, fixed_pairs
from krul_sglang.strategy.paper import PaperSelector, select_pairs

LAYERS, TOKENS = 6, 130


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 3, 64), (6, 2, 64), (8, 1, 128)])
@pytest.mark.parametrize("chunk", [32, 1000])
def test_it_is_that_of_whole_maps(
    heads: int, kv_heads: int, dim: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    gen = torch.Generator().manual_seed(0)
    keys = [torch.randn(200, kv_heads, dim, generator=gen) for _ in range(LAYERS)]
    rows = torch.randperm(200, generator=gen)[:TOKENS]
    positions = torch.tensor([129, 70, 3, -1, 100], dtype=torch.int32)
    q = torch.randn(LAYERS, len(positions), heads, dim, generator=gen) * 2
    # Two layers that attend nearly alike.
    keys[4], q[4] = keys[1].clone(), q[1] + 1e-3 * torch.randn(q[1].shape, generator=gen)
    found = similarity_of_window(QueryWindow(q, positions, range(LAYERS)), keys, rows, dim**-0.5)

    kept = [i for i, p in enumerate(positions.tolist()) if p >= 0]
    maps = torch.zeros(LAYERS, heads, len(kept), TOKENS, dtype=torch.float64)
    for layer in range(LAYERS):
        for head in range(heads):
            k = keys[layer][rows, head // (heads // kv_heads)].double()
            for i, row in enumerate(kept):
                seen = int(positions[row]) + 1
                logits = k[:seen] @ q[layer, row, head].double() / math.sqrt(dim)
                maps[layer, head, i, :seen] = logits.softmax(0)
    expected = similarity_of_maps(maps)
    torch.testing.assert_close(found.edges, expected.edges, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.distance, expected.distance, atol=1e-4, rtol=1e-3)
    assert found.distance.diagonal().abs().max() == 0
    assert select_pairs(found, 2, 0.0) == select_pairs(expected, 2, 0.0)
    assert (1, 4) in select_pairs(found, 2, 0.0)


def test_paper_pairs_what_attends_alike_and_falls_back_to_fixed() -> None:
    gen = torch.Generator().manual_seed(1)
    keys = [torch.randn(60, 1, 16, generator=gen) for _ in range(LAYERS)]
    window = QueryWindow(
        torch.randn(LAYERS, 4, 2, 16, generator=gen),
        torch.tensor([59, 50, 40, 30], dtype=torch.int32),
        range(LAYERS),
    )
    selector = PaperSelector(LAYERS)
    estimate = selector.measure(window, keys, torch.arange(60), 0.25)
    pairs = selector.choose(estimate).pairs
    assert pairs == select_pairs(estimate.layers, len(fixed_pairs(LAYERS)))
    assert selector.choose(Estimate()) == selector.default == FixedSelector(LAYERS).default
