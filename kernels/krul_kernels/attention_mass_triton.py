"""The two passes of :mod:`krul_kernels.attention_mass` as Triton kernels.

Query rows and the query heads that share a KV head are packed into one axis, row-major, so
that a group of heads reads its keys once. Both passes walk ragged requests without a device
synchronisation: the grid is the largest number of tiles the totals allow, and a program
finds its request among the tiles' starts (programs past the last tile end at once).

Mass needs no atomics: a program owns a block of keys and walks the request's rows.
Imported on first use, because not every host has Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from krul_kernels.attention_mass import LOG2E, kv_indptr


def _tiles(dim_pad: int, dtype: torch.dtype) -> tuple[int, int]:
    """Packed rows and keys that a program holds.

    Compiled for sm_80 and sm_89 these keep two-byte types free of register spills, and both
    operands with the next tile within 100 KiB of shared memory (130 KiB for sm_90) up to a
    ``head_dim`` of 256. float32 takes three tensor core products, hence smaller tiles.
    """
    rows, key_bytes = (32, 16384) if dtype == torch.float32 else (64, 32768)
    return rows, max(16, min(128, key_bytes // (dim_pad * dtype.itemsize)))


@triton.jit
def _owner(tile_indptr, tile, batch, BATCH: tl.constexpr):
    """The request whose tiles include ``tile``; ``batch`` if there is none."""
    request = tl.arange(0, BATCH)
    ends = tl.load(tile_indptr + 1 + request, mask=request < batch, other=2147483647)
    return tl.sum((ends <= tile).to(tl.int32), 0)


@triton.jit
def _load_queries(q, row, head, valid, q_row, q_head, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    """``[rows, DIM_PAD]``, zero where there is no row or dimension."""
    dim = tl.arange(0, DIM_PAD)
    at = row.to(tl.int64)[:, None] * q_row + head[:, None] * q_head + dim[None, :]
    return tl.load(q + at, mask=valid[:, None] & (dim < DIM)[None, :], other=0.0)


@triton.jit
def _load_keys(
    k,
    pages,
    token,
    valid,
    k_page,
    k_token,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """``[DIM_PAD, tokens]``, zero where there is no token or dimension."""
    dim = tl.arange(0, DIM_PAD)
    # A pool has more than 2 ** 31 elements.
    page = tl.load(pages + token // PAGE, mask=valid, other=0).to(tl.int64)
    at = page * k_page + (token % PAGE) * k_token
    return tl.load(
        k + at[None, :] + dim[:, None], mask=valid[None, :] & (dim < DIM)[:, None], other=0.0
    )


@triton.jit
def _lse_pass(
    q,
    k,
    lse,
    qo_indptr,
    tile_indptr,
    key_indptr,
    page_indptr,
    pages,
    positions,
    batch,
    scale,
    q_row,
    q_head,
    k_page,
    k_token,
    k_head,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BATCH: tl.constexpr,
):
    """``lse`` of one tile of packed rows: program (tile, KV head)."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    request = _owner(tile_indptr, tile, batch, BATCH)
    if request >= batch:
        return
    first_row = tl.load(qo_indptr + request)
    packed = (tile - tl.load(tile_indptr + request)) * ROWS + tl.arange(0, ROWS)
    valid = packed < (tl.load(qo_indptr + request + 1) - first_row) * GROUP
    row = first_row + packed // GROUP
    head = kv_head * GROUP + packed % GROUP
    position = tl.load(positions + row, mask=valid, other=-1)
    queries = _load_queries(q, row, head, valid, q_row, q_head, DIM, DIM_PAD)

    length = tl.load(key_indptr + request + 1) - tl.load(key_indptr + request)
    visible = tl.minimum(length, tl.max(position, 0) + 1)
    request_pages = pages + tl.load(page_indptr + request)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, visible, KEYS):
        token = start + tl.arange(0, KEYS)
        keys = _load_keys(
            k + kv_head * k_head,
            request_pages,
            token,
            token < visible,
            k_page,
            k_token,
            PAGE,
            DIM,
            DIM_PAD,
        )
        logits = tl.dot(queries, keys, input_precision="tf32x3") * scale
        seen = (token[None, :] <= position[:, None]) & (token < visible)[None, :]
        logits = tl.where(seen, logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        # A row that has seen no key yet: -inf - -inf is no number.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(peak - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)
        peak = higher
    at = row.to(tl.int64) * (GROUP * tl.num_programs(1)) + head
    tl.store(lse + at, peak + tl.log2(total), mask=valid)


@triton.jit
def _mass_pass(
    q,
    k,
    lse,
    mass,
    weights,
    qo_indptr,
    tile_indptr,
    key_indptr,
    page_indptr,
    pages,
    positions,
    batch,
    scale,
    q_row,
    q_head,
    k_page,
    k_token,
    k_head,
    WEIGHTED: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BATCH: tl.constexpr,
):
    """``mass`` of one block of keys: program (block, KV head)."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    kv_heads = tl.num_programs(1)
    request = _owner(tile_indptr, tile, batch, BATCH)
    if request >= batch:
        return
    first_key = tl.load(key_indptr + request)
    token = (tile - tl.load(tile_indptr + request)) * KEYS + tl.arange(0, KEYS)
    present = token < tl.load(key_indptr + request + 1) - first_key
    keys = _load_keys(
        k + kv_head * k_head,
        pages + tl.load(page_indptr + request),
        token,
        present,
        k_page,
        k_token,
        PAGE,
        DIM,
        DIM_PAD,
    )
    first_row = tl.load(qo_indptr + request)
    rows = (tl.load(qo_indptr + request + 1) - first_row) * GROUP
    total = tl.zeros([KEYS], tl.float32)
    for start in range(0, rows, ROWS):
        packed = start + tl.arange(0, ROWS)
        valid = packed < rows
        row = first_row + packed // GROUP
        head = kv_head * GROUP + packed % GROUP
        position = tl.load(positions + row, mask=valid, other=-1)
        queries = _load_queries(q, row, head, valid, q_row, q_head, DIM, DIM_PAD)
        logits = tl.dot(queries, keys, input_precision="tf32x3") * scale
        at = row.to(tl.int64) * (GROUP * kv_heads) + head
        shift = tl.load(lse + at, mask=valid, other=0.0)
        seen = (token[None, :] <= position[:, None]) & present[None, :]
        probability = tl.where(seen, tl.exp2(logits - shift[:, None]), 0.0)
        if WEIGHTED:
            probability *= tl.load(weights + row, mask=valid, other=0.0)[:, None]
        total += tl.sum(probability, 0)
    at = (first_key + token).to(tl.int64) * kv_heads + kv_head
    tl.store(mass + at, total, mask=present)


def run(
    q: torch.Tensor,
    qo_indptr: torch.Tensor,
    k_cache: torch.Tensor,
    paged_kv_indptr: torch.Tensor,
    paged_kv_indices: torch.Tensor,
    paged_kv_last_page_len: torch.Tensor,
    q_positions: torch.Tensor,
    weights: torch.Tensor | None,
    sm_scale: float,
    total_kv: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`krul_kernels.attention_mass.reference` on Triton; not for float64."""
    nnz, heads, dim = q.shape
    page_size, kv_heads = k_cache.shape[1:3]
    group, batch = heads // kv_heads, qo_indptr.shape[0] - 1
    mass = q.new_empty((total_kv, kv_heads), dtype=torch.float32)
    lse = q.new_empty((nnz, heads), dtype=torch.float32)
    key_indptr = kv_indptr(paged_kv_indptr, paged_kv_last_page_len, page_size)
    dim_pad = max(16, triton.next_power_of_2(dim))
    tile_rows, tile_keys = _tiles(dim_pad, q.dtype)

    inputs = (key_indptr, paged_kv_indptr, paged_kv_indices, q_positions, batch, sm_scale * LOG2E)
    strides = (q.stride(0), q.stride(1), *k_cache.stride()[:3])
    sizes = {
        "GROUP": group,
        "PAGE": page_size,
        "DIM": dim,
        "DIM_PAD": dim_pad,
        "ROWS": tile_rows,
        "KEYS": tile_keys,
        "BATCH": triton.next_power_of_2(batch),
    }
    if nnz:
        tiles = _tile_indptr(qo_indptr * group, tile_rows)
        grid = (nnz * group // tile_rows + batch, kv_heads)
        _lse_pass[grid](q, k_cache, lse, qo_indptr, tiles, *inputs, *strides, **sizes)
    if total_kv:
        tiles = _tile_indptr(key_indptr, tile_keys)
        grid = (total_kv // tile_keys + batch, kv_heads)
        operands = (q, k_cache, lse, mass, weights, qo_indptr, tiles)
        weighted = weights is not None
        _mass_pass[grid](*operands, *inputs, *strides, WEIGHTED=weighted, **sizes)
    return mass, lse


def _tile_indptr(indptr: torch.Tensor, size: int) -> torch.Tensor:
    """Where each request's tiles of ``size`` begin; int32 ``[batch + 1]``."""
    tiles = (indptr.diff() + size - 1) // size
    return torch.nn.functional.pad(tiles.cumsum(0), (1, 0)).to(torch.int32)
