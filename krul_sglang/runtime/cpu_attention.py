"""Attention over new rows only, for SGLang's torch_native backend on CPU.

SGLang 0.5.23's ``TorchNativeAttnBackend._run_sdpa_forward_extend`` pads the query
to the whole sequence, so extending a cached prefix costs as much as computing it
anew and restoring a conversation would gain nothing. Both hooks here compute the
same attention from the rows that are asked for; what they do not cover
(cross-attention, sliding windows, non-causal attention, other devices) goes to
the original.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention


def _covered(query: torch.Tensor, rest: list[Any], options: dict[str, Any]) -> bool:
    """Plain self-attention on CPU; ``rest`` is what follows the lengths: encoder_lens."""
    return (
        query.device.type == "cpu"
        and all(value is None for value in rest)
        and options.get("encoder_lens") is None
        and not options.get("is_cross_attn", False)
        and options.get("sliding_window_size") is None
    )


def _cached(cache: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of one sequence as ``[1, kv_heads, tokens, dim]``."""
    return cache[rows].to(dtype).movedim(0, 1).unsqueeze(0)


def extend(original: Callable, backend: Any, *tensors: Any, **options: Any) -> torch.Tensor:
    """AROUND ``_run_sdpa_forward_extend``: query ``[rows, heads, dim]``, output mutated."""
    query, output, k_cache, v_cache, table, slots, totals, prefixes, news, *rest = tensors
    if not options.get("causal") or not _covered(query, rest, options):
        return original(backend, *tensors, **options)
    first = 0
    for slot, total, prefix, new in zip(
        slots.tolist(), totals.tolist(), prefixes.tolist(), news.tolist(), strict=True
    ):
        rows = table[slot, :total]
        q = query[first : first + new].movedim(0, 1).unsqueeze(0)
        # New row i sees the prefix and the new rows up to itself.
        mask = torch.ones(new, total, dtype=torch.bool).tril_(diagonal=prefix) if prefix else None
        attended = scaled_dot_product_attention(
            q,
            _cached(k_cache, rows, q.dtype),
            _cached(v_cache, rows, q.dtype),
            attn_mask=mask,
            is_causal=mask is None,
            scale=options.get("scaling"),
            enable_gqa=options.get("enable_gqa", False),
        )
        output[first : first + new] = attended.squeeze(0).movedim(1, 0)
        first += new
    return output


def decode(original: Callable, backend: Any, *tensors: Any, **options: Any) -> torch.Tensor:
    """AROUND ``_run_sdpa_forward_decode``: one new row per sequence, output mutated.

    The query heads that share a KV head become rows of one matrix, so K and V are
    read once per KV head instead of being repeated for every query head.
    """
    query, output, k_cache, v_cache, table, slots, totals, *rest = tensors
    if not _covered(query, rest, options):
        return original(backend, *tensors, **options)
    heads, kv_heads = query.shape[1], k_cache.shape[1]
    for index, (slot, total) in enumerate(zip(slots.tolist(), totals.tolist(), strict=True)):
        rows = table[slot, :total]
        q = query[index].view(1, kv_heads, heads // kv_heads, -1)
        attended = scaled_dot_product_attention(
            q,
            _cached(k_cache, rows, q.dtype),
            _cached(v_cache, rows, q.dtype),
            scale=options.get("scaling"),
        )
        output[index] = attended.view(heads, -1)
    return output
