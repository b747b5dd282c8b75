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


def _covered(
    query: torch.Tensor, encoder_lens: torch.Tensor | None, options: dict[str, Any]
) -> bool:
    return (
        query.device.type == "cpu"
        and encoder_lens is None
        and not options.get("is_cross_attn", False)
        and options.get("sliding_window_size") is None
    )


def _cached(cache: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of one sequence as ``[1, kv_heads, tokens, dim]``."""
    return cache[rows].to(dtype).movedim(0, 1).unsqueeze(0)


def extend(
    original: Callable,
    backend: Any,
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    extend_prefix_lens: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    encoder_lens: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """AROUND ``_run_sdpa_forward_extend``: query ``[rows, heads, dim]``, output mutated."""
    if not options.get("causal") or not _covered(query, encoder_lens, options):
        return original(
            backend,
            query,
            output,
            k_cache,
            v_cache,
            req_to_token,
            req_pool_indices,
            seq_lens,
            extend_prefix_lens,
            extend_seq_lens,
            encoder_lens,
            **options,
        )
    first = 0
    for pool_index, total, prefix, new in zip(
        req_pool_indices.tolist(),
        seq_lens.tolist(),
        extend_prefix_lens.tolist(),
        extend_seq_lens.tolist(),
        strict=True,
    ):
        rows = req_to_token[pool_index, :total]
        q = query[first : first + new].movedim(0, 1).unsqueeze(0)
        k = _cached(k_cache, rows, q.dtype)
        v = _cached(v_cache, rows, q.dtype)
        if prefix == 0:
            mask, causal = None, True
        else:
            # New row i sees the prefix and the new rows up to itself.
            mask = torch.ones(new, total, dtype=torch.bool).tril_(diagonal=prefix)
            causal = False
        attended = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=causal,
            scale=options.get("scaling"),
            enable_gqa=options.get("enable_gqa", False),
        )
        output[first : first + new] = attended.squeeze(0).movedim(1, 0)
        first += new
    return output


def decode(
    original: Callable,
    backend: Any,
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    encoder_lens: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """AROUND ``_run_sdpa_forward_decode``: one new row per sequence, output mutated.

    The query heads that share a KV head become rows of one matrix, so K and V are
    read once per KV head instead of being repeated for every query head.
    """
    if not _covered(query, encoder_lens, options):
        return original(
            backend,
            query,
            output,
            k_cache,
            v_cache,
            req_to_token,
            req_pool_indices,
            seq_lens,
            encoder_lens,
            **options,
        )
    heads, kv_heads = query.shape[1], k_cache.shape[1]
    for index, (pool_index, total) in enumerate(
        zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)
    ):
        rows = req_to_token[pool_index, :total]
        q = query[index].view(1, kv_heads, heads // kv_heads, -1)
        attended = scaled_dot_product_attention(
            q,
            _cached(k_cache, rows, q.dtype),
            _cached(v_cache, rows, q.dtype),
            scale=options.get("scaling"),
        )
        output[index] = attended.view(heads, -1)
    return output
