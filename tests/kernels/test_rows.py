"""Gathering and scattering pool rows against plain indexing."""

from __future__ import annotations

import pytest
import torch
from krul_kernels.rows import gather_rows, scatter_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_gather_then_scatter_moves_rows(dtype, count):
    pool = [torch.randn(20, 2, 8).to(dtype) for _ in range(3)]
    rows = torch.randperm(20)[:count]
    out = torch.empty(3, count, 2, 8, dtype=dtype)
    gather_rows(pool, rows, out)
    for layer, source in enumerate(pool):
        assert torch.equal(out[layer], source[rows])
    target = [torch.zeros_like(x) for x in pool]
    for layer in range(3):
        scatter_rows(target[layer], rows, out[layer])
        assert torch.equal(target[layer][rows], pool[layer][rows])
        untouched = torch.ones(20, dtype=torch.bool)
        untouched[rows] = False
        assert not target[layer][untouched].any()
