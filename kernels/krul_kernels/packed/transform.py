"""One layer between its symbols and its rebuilt values: prediction, residual, quantization.

A layer is predicted from the *rebuilt* layer below, so encoder and decoder must rebuild
alike: all products are IEEE float32 (a TF32 product would drift from layer to layer), and
:func:`quantize_layer` rebuilds with the code that :func:`rebuild_layer` runs.

Shapes common to all functions here, ``dim`` being the pre-RoPE keys and the values of a
token side by side:

symbols: int32 ``[width, tokens]``, tokens sorted by class.
order: int64 ``[tokens]``, the token that is at each place of that order.
ends: int32 ``[classes]``, where the tokens of each class end in that order.
widths: int32 ``[classes]``, coefficients that each class stores, falling; symbols
    beyond are 0. (Tiles of tokens stop at the widest class they hold.)
scales: float32 ``[classes]``, each class's quantization step.
below: float32 ``[tokens, dim]``, the rebuilt layer below; None in the lowest.
bias: ``[dim]``; down: ``[dim, rank]``; up: ``[rank, dim]``; forward: ``[dim, n]``;
    inverse: ``[n, dim]``, ``n >= width``; all float32.
"""

from __future__ import annotations

from typing import Any

import torch

FARTHEST = 1 << 24
"""Symbols are at most that; :func:`~krul_kernels.packed.symbols.pack_symbols` reports them
as too far, as it does NaN, which counts as one of them."""


def rebuild_layer_reference(
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
    """``bias + below @ down @ up + scale * symbols @ inverse``, float32 ``[tokens, dim]``.

    Tokens in their own order. Some of a segment's tokens alone: pass their columns of
    ``symbols``, their ``order`` counted from the first, and their ``ends``.
    """
    rows = _of_class(ends, scales, len(order))[:, None] * symbols.T @ inverse[: len(symbols)]
    rows += _predict(below, order, bias, down, up)
    out = torch.empty_like(rows)
    out[order] = rows
    return out


def quantize_layer_reference(
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
    """Symbols of a layer and the layer that :func:`rebuild_layer` will make of them.

    x: float32 ``[tokens, dim]``, in the tokens' own order.
    width: of the symbols, that of the widest class.
    rounding: share of a step that rounds up to the next symbol; below 0.5 it is a dead zone.

    Returns int32 ``[width, tokens]`` and float32 ``[tokens, dim]``.
    """
    residual = x[order] - _predict(below, order, bias, down, up)
    y = residual @ forward[:, :width] / _of_class(ends, scales, len(order))[:, None]
    y += torch.copysign(torch.full_like(y, rounding), y)
    y = y.nan_to_num_(FARTHEST).clamp_(-FARTHEST, FARTHEST)
    stored = torch.arange(width, device=x.device) < _of_class(ends, widths, len(order))[:, None]
    symbols = (y.to(torch.int32) * stored).T.contiguous()
    maps = (below, bias, down, up, inverse)
    return symbols, rebuild_layer_reference(symbols, order, ends, widths, scales, *maps)


def _of_class(ends: torch.Tensor, values: torch.Tensor, tokens: int) -> torch.Tensor:
    """``values`` of the class of each of the sorted tokens."""
    place = torch.arange(tokens, device=ends.device, dtype=ends.dtype)
    return values[torch.searchsorted(ends, place, right=True)]


def _predict(
    below: torch.Tensor | None,
    order: torch.Tensor,
    bias: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
) -> torch.Tensor:
    if below is None:
        return bias.expand(len(order), -1)
    return torch.addmm(bias, (below @ down)[order], up)


@torch.library.custom_op("krul_kernels::rebuild_layer", mutates_args=(), device_types="cpu")
def rebuild_layer(
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
    """:func:`rebuild_layer_reference` on a CPU, its Triton version on a GPU."""
    maps = (below, bias, down, up, inverse)
    return rebuild_layer_reference(symbols, order, ends, widths, scales, *maps)


@rebuild_layer.register_kernel("cuda")
def _(*args: Any) -> torch.Tensor:
    from krul_kernels.packed.transform_triton import rebuild_layer_triton

    with torch.cuda.device_of(args[0]):
        return rebuild_layer_triton(*args)


@rebuild_layer.register_fake
def _(symbols: torch.Tensor, order: torch.Tensor, *args: Any) -> torch.Tensor:
    bias = args[4]
    return bias.new_empty((order.shape[0], bias.shape[0]))


@torch.library.custom_op("krul_kernels::quantize_layer", mutates_args=(), device_types="cpu")
def quantize_layer(
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
    """:func:`quantize_layer_reference` on a CPU, its Triton version on a GPU."""
    maps = (below, bias, down, up, forward, inverse)
    return quantize_layer_reference(x, order, ends, widths, scales, *maps, width, rounding)


@quantize_layer.register_kernel("cuda")
def _(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    from krul_kernels.packed.transform_triton import quantize_layer_triton

    with torch.cuda.device_of(args[0]):
        return quantize_layer_triton(*args)


@quantize_layer.register_fake
def _(x: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    width = args[-2]
    return x.new_empty((width, x.shape[0]), dtype=torch.int32), torch.empty_like(x)
