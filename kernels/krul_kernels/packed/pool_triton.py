"""Triton versions of :mod:`krul_kernels.packed.pool`: one program a head of some tokens.

Both directions touch the same addresses, so they are one kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from krul_kernels.packed.pool import widths_of

TOKENS = 16
"""Of one program."""


@triton.jit
def _copy(x, pool, mask, TO_POOL: tl.constexpr):
    if TO_POOL:
        tl.store(pool, tl.load(x, mask=mask, other=0).to(pool.dtype.scalar.element_ty), mask=mask)
    else:
        tl.store(x, tl.load(pool, mask=mask, other=0).to(tl.float32), mask=mask)


@triton.jit
def _exchange(
    x,
    rows,
    cos,
    sin,
    scale,
    k_pool,
    v_pool,
    tokens,
    width,
    half,
    k_dim,
    v_dim,
    k_row,
    k_head,
    k_step,
    v_row,
    v_head,
    v_step,
    TO_POOL: tl.constexpr,
    TOKENS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    VALUE: tl.constexpr,
):
    """HALF, REST, VALUE: ``half``, what RoPE leaves alone, and ``v_dim``, rounded up to a
    power of two; 0 where there is none."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None]
    head, heads = tl.program_id(1), tl.num_programs(1)
    some = token < tokens
    row = tl.load(rows + token, mask=some, other=0)
    token = token.to(tl.int64)  # a long run has more than 2^31 scalars
    keys = x + token * width + head * k_dim
    k_pool += row * k_row + head * k_head
    if HALF:
        i = tl.arange(0, HALF)[None, :]
        mask = some & (i < half)
        c = tl.load(cos + token * half + i, mask=mask, other=0)
        s = tl.load(sin + token * half + i, mask=mask, other=0)
        first, second = keys + i, keys + half + i
        k_first, k_second = k_pool + i * k_step, k_pool + (half + i) * k_step
        if TO_POOL:
            kind = k_pool.dtype.scalar.element_ty
            a, b = tl.load(first, mask=mask, other=0), tl.load(second, mask=mask, other=0)
            c, s = c * scale, s * scale
            tl.store(k_first, (a * c - b * s).to(kind), mask=mask)
            tl.store(k_second, (b * c + a * s).to(kind), mask=mask)
        else:
            a = tl.load(k_first, mask=mask, other=0).to(tl.float32)
            b = tl.load(k_second, mask=mask, other=0).to(tl.float32)
            c, s = c / scale, s / scale
            tl.store(first, a * c + b * s, mask=mask)
            tl.store(second, b * c - a * s, mask=mask)
    if REST:
        i = 2 * half + tl.arange(0, REST)[None, :]
        _copy(keys + i, k_pool + i * k_step, some & (i < k_dim), TO_POOL)
    i = tl.arange(0, VALUE)[None, :]
    values = x + token * width + heads * k_dim + head * v_dim + i
    v_pool += row * v_row + head * v_head
    _copy(values, v_pool + i * v_step, some & (i < v_dim), TO_POOL)


def _launch(
    x: torch.Tensor,
    rows: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    scale: float,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    to_pool: bool,
) -> None:
    tokens, half = cos.shape
    _, heads, k_dim = k_pool.shape
    v_dim = v_pool.shape[2]
    rest = k_dim - 2 * half
    if not tokens:
        return
    _exchange[(triton.cdiv(tokens, TOKENS), heads)](
        x,
        rows,
        cos.contiguous(),
        sin.contiguous(),
        scale,
        k_pool,
        v_pool,
        tokens,
        x.shape[1],
        half,
        k_dim,
        v_dim,
        *k_pool.stride(),
        *v_pool.stride(),
        TO_POOL=to_pool,
        TOKENS=TOKENS,
        HALF=triton.next_power_of_2(half) if half else 0,
        REST=triton.next_power_of_2(rest) if rest else 0,
        VALUE=triton.next_power_of_2(v_dim),
    )


def scatter_layer_triton(
    x: torch.Tensor,
    rows: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    scale: float,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
) -> None:
    """:func:`krul_kernels.packed.pool.scatter_layer_reference` on a GPU."""
    widths_of(k_pool, v_pool, x.shape[1])
    _launch(x.contiguous(), rows, cos, sin, scale, k_pool, v_pool, True)


def gather_layer_triton(
    rows: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    scale: float,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
) -> torch.Tensor:
    """:func:`krul_kernels.packed.pool.gather_layer_reference` on a GPU."""
    width = sum(widths_of(k_pool, v_pool))
    x = torch.empty(len(rows), width, dtype=torch.float32, device=k_pool.device)
    _launch(x, rows, cos, sin, scale, k_pool, v_pool, False)
    return x
