"""Triton versions of :mod:`krul_kernels.packed.transform`: three products of tiles.

Dequantization is a factor a token, so it is applied to the accumulator, and the symbols
go into the product as the small integers they are. Products are ``ieee``: float32
multiply-adds, no tensor cores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from krul_kernels.packed.transform import FARTHEST

TOKENS, COLUMNS, DEPTH, WARPS = 64, 64, 16, 8
"""Of a tile of a product. With fewer warps or a deeper tile, registers spill on compute
capability 8.0 or 9.0 where ``tokens`` is no multiple of 16; not tuned beyond that."""
_FARTHEST = tl.constexpr(float(FARTHEST))


@triton.jit
def _accumulate(acc, a, a_step, b, b_step, columns, some, wanted, depth, DEPTH: tl.constexpr):
    """``acc`` plus a tile of ``A @ B`` (IEEE float32).

    a: pointers to the first element of each row of ``A``, the next ``a_step`` apart; ``some``
    says which rows exist. Neither a layer's symbols (see the layout) nor a map has more
    elements than int32 counts. b: pointer to ``B``, rows ``b_step`` apart; ``columns`` of it, of
    which those ``wanted`` exist. depth: how much is summed up.
    """
    for k in range(0, depth, DEPTH):
        inner = k + tl.arange(0, DEPTH)
        known = inner < depth
        left = a[:, None] + inner[None, :] * a_step
        right = b + inner[:, None] * b_step + columns[None, :]
        acc = tl.dot(
            tl.load(left, mask=some[:, None] & known[None, :], other=0).to(tl.float32),
            tl.load(right, mask=known[:, None] & wanted[None, :], other=0),
            acc,
            input_precision="ieee",
        )
    return acc


@triton.jit
def _class_of(ends, place, CLASSES: tl.constexpr):
    """Class of the token (or tokens) at ``place`` of the order."""
    found = place * 0
    for c in tl.static_range(CLASSES - 1):
        found += (place >= tl.load(ends + c)).to(tl.int32)
    return found


@triton.jit
def _tile(tokens, width, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    """First token, tokens, columns of this program, and which of them exist."""
    first = tl.program_id(1) * TOKENS
    token = first + tl.arange(0, TOKENS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    return first, token, column, token < tokens, column < width


@triton.jit
def _project(
    below,
    down,
    out,
    tokens,
    dim,
    rank,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    _, token, column, some, wanted = _tile(tokens, rank, TOKENS, COLUMNS)
    token = token.to(tl.int64)
    acc = tl.zeros([TOKENS, COLUMNS], tl.float32)
    acc = _accumulate(acc, below + token * dim, 1, down, rank, column, some, wanted, dim, DEPTH)
    at = out + token[:, None] * rank + column[None, :]
    tl.store(at, acc, mask=some[:, None] & wanted[None, :])


@triton.jit
def _rebuild(
    symbols,
    order,
    ends,
    widths,
    scales,
    projected,
    bias,
    up,
    inverse,
    out,
    tokens,
    dim,
    rank,
    CLASSES: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    first, place, column, some, wanted = _tile(tokens, dim, TOKENS, COLUMNS)
    token = tl.load(order + place, mask=some, other=0)
    # Sorted by class, and no later class is wider: the first token's width does for all.
    width = tl.load(widths + _class_of(ends, first, CLASSES))
    acc = tl.zeros([TOKENS, COLUMNS], tl.float32)
    acc = _accumulate(
        acc, symbols + place, tokens, inverse, dim, column, some, wanted, width, DEPTH
    )
    acc *= tl.load(scales + _class_of(ends, place, CLASSES))[:, None]
    acc = _accumulate(acc, projected + token * rank, 1, up, dim, column, some, wanted, rank, DEPTH)
    acc += tl.load(bias + column, mask=wanted, other=0)[None, :]
    at = out + token[:, None] * dim + column[None, :]
    tl.store(at, acc, mask=some[:, None] & wanted[None, :])


@triton.jit
def _quantize(
    residual,
    order,
    ends,
    widths,
    scales,
    forward,
    out,
    tokens,
    dim,
    step,
    width,
    rounding,
    CLASSES: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    _, place, column, some, wanted = _tile(tokens, width, TOKENS, COLUMNS)
    token = tl.load(order + place, mask=some, other=0)
    acc = tl.zeros([TOKENS, COLUMNS], tl.float32)
    acc = _accumulate(
        acc, residual + token * dim, 1, forward, step, column, some, wanted, dim, DEPTH
    )
    kind = _class_of(ends, place, CLASSES)
    y = acc / tl.load(scales + kind)[:, None]
    y = tl.where(y < 0, y - rounding, y + rounding)
    y = tl.where(y == y, y, _FARTHEST)
    y = tl.minimum(tl.maximum(y, -_FARTHEST), _FARTHEST)
    stored = column[None, :] < tl.load(widths + kind)[:, None]
    at = out + column[None, :] * tokens + place[:, None]
    symbol = tl.where(stored, y.to(tl.int32), 0)  # towards zero
    tl.store(at, symbol, mask=some[:, None] & wanted[None, :])


def rebuild_layer_triton(
    symbols: torch.Tensor,
    order: torch.Tensor,
    ends: torch.Tensor,
    widths: torch.Tensor,
    scales: torch.Tensor,
    below: torch.Tensor | None,
    bias: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    inverse: torch.Tensor,
) -> torch.Tensor:
    """:func:`krul_kernels.packed.transform.rebuild_layer_reference` on a GPU."""
    tokens, dim = len(order), len(bias)
    out = torch.empty(tokens, dim, dtype=torch.float32, device=bias.device)
    if not tokens:
        return out
    rank = 0 if below is None else down.shape[1]
    projected = torch.empty(tokens, rank, dtype=torch.float32, device=bias.device)
    if below is not None and rank:
        grid = (triton.cdiv(rank, COLUMNS), triton.cdiv(tokens, TOKENS))
        _project[grid](
            below.contiguous(),
            down.contiguous(),
            projected,
            tokens,
            dim,
            rank,
            TOKENS,
            COLUMNS,
            DEPTH,
            num_warps=WARPS,
        )
    grid = (triton.cdiv(dim, COLUMNS), triton.cdiv(tokens, TOKENS))
    _rebuild[grid](
        symbols.contiguous(),
        order,
        ends,
        widths,
        scales,
        projected,
        bias,
        up.contiguous(),
        inverse.contiguous(),
        out,
        tokens,
        dim,
        rank,
        len(ends),
        TOKENS,
        COLUMNS,
        DEPTH,
        num_warps=WARPS,
    )
    return out


def quantize_layer_triton(
    x: torch.Tensor,
    order: torch.Tensor,
    ends: torch.Tensor,
    widths: torch.Tensor,
    scales: torch.Tensor,
    below: torch.Tensor | None,
    bias: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    forward: torch.Tensor,
    inverse: torch.Tensor,
    width: int,
    rounding: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`krul_kernels.packed.transform.quantize_layer_reference` on a GPU."""
    tokens, dim = x.shape
    symbols = torch.zeros(width, tokens, dtype=torch.int32, device=x.device)
    maps = (below, bias, down, up, inverse)
    if tokens and width:
        # The prediction is what is rebuilt of no coefficients.
        nothing = torch.zeros_like(widths)
        residual = x - rebuild_layer_triton(symbols, order, ends, nothing, scales, *maps)
        grid = (triton.cdiv(width, COLUMNS), triton.cdiv(tokens, TOKENS))
        forward = forward.contiguous()
        _quantize[grid](
            residual,
            order,
            ends,
            widths,
            scales,
            forward,
            symbols,
            tokens,
            dim,
            forward.shape[1],
            width,
            rounding,
            len(ends),
            TOKENS,
            COLUMNS,
            DEPTH,
            num_warps=WARPS,
        )
    return symbols, rebuild_layer_triton(symbols, order, ends, widths, scales, *maps)
