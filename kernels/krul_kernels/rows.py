"""Move token rows between a KV pool and contiguous memory.

The torch versions below are the reference and what CPUs run; on a GPU they are
one indexed copy a layer, at memory bandwidth. Host copies are asynchronous only
into pinned memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def gather_rows(layers: Sequence[torch.Tensor], rows: torch.Tensor, out: torch.Tensor) -> None:
    """``out[l] = layers[l][rows]``; mutates ``out``.

    layers: one ``[pool rows, heads, dim]`` tensor a layer, all on one device.
    rows: int64 ``[n]`` on that device.
    out: ``[layers, n, heads, dim]``, same dtype, on the same device or the host.
    """
    same_device = out.device == layers[0].device
    for layer, source in enumerate(layers):
        if same_device:
            torch.index_select(source, 0, rows, out=out[layer])
        else:
            out[layer].copy_(source.index_select(0, rows), non_blocking=out.is_pinned())


def scatter_rows(pool: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """``pool[rows] = values``; mutates ``pool``.

    pool: ``[pool rows, heads, dim]``. rows: int64 ``[n]``, distinct, on the pool's device.
    values: ``[n, heads, dim]``, same dtype, any device.
    """
    pool.index_copy_(0, rows, values.to(pool.device, non_blocking=True))
