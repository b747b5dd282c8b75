"""Arguments of the attention-mass op, for the tests that hold it against others."""

from __future__ import annotations

from typing import Any

import torch

Case = dict[str, Any]


def make_case(
    lengths: list[int],
    rows: list[list[int]],
    *,
    heads: tuple[int, int] = (4, 2),
    dim: int = 64,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    weighted: bool = True,
    seed: int = 0,
) -> Case:
    """The op's arguments: requests of ``lengths`` keys whose query rows stand at ``rows``.

    Pages lie scattered in a cache that holds others too; what no request owns is huge.
    """
    draw = torch.Generator().manual_seed(seed)
    pages = [-(-length // page_size) for length in lengths]
    last = [(length - 1) % page_size + 1 if length else 0 for length in lengths]
    indices = torch.randperm(sum(pages) + 3, generator=draw)[: sum(pages)]
    cache = torch.full((sum(pages) + 3, page_size, heads[1], dim), 100.0)
    cache[indices] = torch.randn((len(indices), *cache.shape[1:]), generator=draw) * 2
    for end, kept in zip(torch.tensor(pages).cumsum(0).tolist(), last, strict=True):
        if kept:
            cache[indices[end - 1], kept:] = 100.0  # of the last page, not of the request
    count = sum(map(len, rows))
    return {
        "q": torch.randn(count, heads[0], dim, generator=draw).to(dtype),
        "qo_indptr": int32([0, *map(len, rows)]).cumsum(0).int(),
        "k_cache": cache.to(dtype),
        "paged_kv_indptr": int32([0, *pages]).cumsum(0).int(),
        "paged_kv_indices": indices.int(),
        "paged_kv_last_page_len": int32(last),
        "q_positions": int32([position for request in rows for position in request]),
        "weights": torch.rand(count, generator=draw) if weighted else None,
        "sm_scale": dim**-0.5,
    }


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)
