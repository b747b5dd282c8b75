"""Between the layer as the codec sees it and rows of the paged pool, RoPE included.

The codec's ``x`` of a token is its pre-RoPE keys, then its values. RoPE pairs dimension
``i`` of a head with ``i + half`` (NeoX halves); what lies behind ``2 * half`` is not
rotated. This is a pass of its own and not the end of the transform: the float32 layer is
needed anyway to predict the next one, and a pair's halves lie in different tiles.

Shapes common to all functions here:

x: float32 ``[tokens, heads * head_dim + heads * v_head_dim]``.
rows: int64 ``[tokens]``, distinct slots of the pool.
cos, sin: float32 ``[tokens, half]`` of the tokens' positions; ``scale`` multiplies both
    (YaRN's attention factor).
k_pool, v_pool: ``[slots, heads, head_dim]`` and ``[slots, heads, v_head_dim]`` of one layer;
    bfloat16, float16 or float32, any strides.
"""

from __future__ import annotations

from typing import Any

import torch


def scatter_layer_reference(
    x: torch.Tensor,
    rows: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    scale: float,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
) -> None:
    """Rotate keys, round to the pool's type, write ``rows``; mutates both pools.

    Raises ValueError where ``x`` is not as wide as the pools' rows together.
    """
    keys, _ = widths_of(k_pool, v_pool, x.shape[1])
    k, v = x[:, :keys].unflatten(1, k_pool.shape[1:]), x[:, keys:].unflatten(1, v_pool.shape[1:])
    k_pool.index_copy_(0, rows, _rotate(k, cos * scale, sin * scale).to(k_pool.dtype))
    v_pool.index_copy_(0, rows, v.to(v_pool.dtype))


def gather_layer_reference(
    rows: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    scale: float,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
) -> torch.Tensor:
    """``x`` of the tokens in ``rows``: the inverse of :func:`scatter_layer_reference`, but
    for the rounding to the pool's type. Raises ValueError where the pools differ in shape."""
    widths_of(k_pool, v_pool)
    k = _rotate(k_pool[rows].float(), cos / scale, -sin / scale)
    return torch.cat([k.flatten(1), v_pool[rows].float().flatten(1)], 1)


def _rotate(k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[1]
    cos, sin = cos[:, None], sin[:, None]
    x, y, rest = k[..., :half], k[..., half : 2 * half], k[..., 2 * half :]
    return torch.cat([x * cos - y * sin, y * cos + x * sin, rest], -1)


def widths_of(
    k_pool: torch.Tensor, v_pool: torch.Tensor, width: int | None = None
) -> tuple[int, int]:
    """Scalars of a token's keys and of its values. Raises ValueError where the pools do not
    belong together, or together are not ``width`` wide."""
    keys, values = k_pool.shape[1] * k_pool.shape[2], v_pool.shape[1] * v_pool.shape[2]
    if k_pool.shape[:2] != v_pool.shape[:2] or width not in (None, keys + values):
        shapes = f"{tuple(k_pool.shape)} and {tuple(v_pool.shape)}"
        raise ValueError(f"pools of shapes {shapes} for rows of {width} scalars")
    return keys, values


@torch.library.custom_op(
    "krul_kernels::scatter_layer", mutates_args=("k_pool", "v_pool"), device_types="cpu"
)
def scatter_layer(
    x: torch.Tensor,
    rows: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    scale: float,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
) -> None:
    """:func:`scatter_layer_reference` on a CPU, its Triton version on a GPU."""
    scatter_layer_reference(x, rows, cos, sin, scale, k_pool, v_pool)


@scatter_layer.register_kernel("cuda")
def _(*args: Any) -> None:
    from krul_kernels.packed.pool_triton import scatter_layer_triton

    with torch.cuda.device_of(args[0]):
        scatter_layer_triton(*args)


@scatter_layer.register_fake
def _(*args: Any) -> None:
    return None


@torch.library.custom_op("krul_kernels::gather_layer", mutates_args=(), device_types="cpu")
def gather_layer(
    rows: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    scale: float,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
) -> torch.Tensor:
    """:func:`gather_layer_reference` on a CPU, its Triton version on a GPU."""
    return gather_layer_reference(rows, cos, sin, scale, k_pool, v_pool)


@gather_layer.register_kernel("cuda")
def _(*args: Any) -> torch.Tensor:
    from krul_kernels.packed.pool_triton import gather_layer_triton

    with torch.cuda.device_of(args[0]):
        return gather_layer_triton(*args)


@gather_layer.register_fake
def _(
    rows: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    scale: float,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
) -> torch.Tensor:
    return k_pool.new_empty((rows.shape[0], sum(widths_of(k_pool, v_pool))), dtype=torch.float32)
