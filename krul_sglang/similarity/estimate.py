"""From a conversation's sampled queries and its cached keys to what each token drew.

Cost: ``rows x tokens`` logits a sampled layer, a chunk of keys at a time
(:mod:`krul_kernels.attention_mass`); no attention map is ever held.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from krul_kernels.attention_mass import window_attention_mass

from krul_sglang.similarity.levels import codes_of, mean_mass
from krul_sglang.similarity.window import DECODE, QueryWindow, sampled_layers


def attention_mass(
    window: QueryWindow, keys: Sequence[torch.Tensor], rows: torch.Tensor, scale: float
) -> torch.Tensor:
    """float32 ``[sampled layers, tokens]``: attention on each token, summed over the window's
    rows, a head's mean.

    keys: one ``[pool rows, kv_heads, head_dim]`` tensor a model layer. rows: int ``[tokens]``,
        the conversation's pool rows in order, on the keys' device.
    """
    tokens = len(rows)

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32).to(rows.device, non_blocking=True)

    begin, pages, page_len = ints(0, window.q.shape[1]), ints(0, tokens), ints(1)
    slots = rows.to(torch.int32)
    out = [
        window_attention_mass(
            q, begin, keys[layer].unsqueeze(1), pages, slots, page_len, window.positions,
            sm_scale=scale, total_kv=tokens,
        )[0].sum(1)
        for q, layer in zip(window.q, sampled_layers(len(keys)), strict=True)
    ]  # fmt: skip
    return torch.stack(out) / window.q.shape[2]


def attention_codes(
    window: QueryWindow,
    keys: Sequence[torch.Tensor],
    rows: torch.Tensor,
    scale: float,
    sinks: int,
) -> torch.Tensor:
    """uint8 ``[layers, tokens]`` codes of :mod:`krul_sglang.similarity.levels`, on the keys'
    device; layers that were not sampled take those of the layer below. See
    :func:`attention_mass`; no host synchronisation.
    """
    mass = attention_mass(window, keys, rows, scale)
    return _codes(mass, window.positions, window.q.shape[1], len(keys), sinks)


def codes_of_maps(maps: torch.Tensor, sinks: int) -> torch.Tensor:
    """The same from the attention maps of a conversation's last tokens.

    maps: probabilities ``[layers, heads, queries, tokens]``; of the queries as many are
    used as would have been sampled of an answer.
    """
    layers, _, queries, tokens = maps.shape
    positions = torch.arange(tokens - queries, tokens, dtype=torch.int32)
    kept = (positions % DECODE.stride == 0).nonzero()[-DECODE.size :, 0]
    mass = maps[sampled_layers(layers)][:, :, kept].sum(2).mean(1)
    return _codes(mass, positions[kept], len(kept), layers, sinks)


def _codes(
    mass: torch.Tensor, positions: torch.Tensor, rows: int, layers: int, sinks: int
) -> torch.Tensor:
    token = torch.arange(mass.shape[1], device=mass.device)
    seen = (positions[:, None] >= token).sum(0)
    codes = codes_of(mean_mass(mass, seen, rows), sinks)
    return codes.repeat_interleave(2, 0)[:layers]
