"""From a conversation's sampled queries and its cached keys to what each token drew.

Cost: ``rows x tokens`` logits a sampled layer, one layer at a time, and of that on a CPU a
million logits (4 MB) at most (:mod:`krul_kernels.attention_mass`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from krul_kernels.attention_mass import window_attention_mass

from krul_sglang.similarity.levels import codes_of, mean_mass
from krul_sglang.similarity.window import DECODE, STRIDE, QueryWindow


def attention_mass(
    window: QueryWindow, keys: Sequence[torch.Tensor], rows: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention on each token, and the queries' log-sum-exp.

    keys: one ``[pool rows, kv_heads, head_dim]`` tensor a model layer. rows: int ``[tokens]``,
        the conversation's pool rows in order, on the keys' device. Returns float32
        ``[sampled layers, tokens]``, summed over the window's rows, a head's mean; and
        ``[sampled layers, rows, heads]`` in base 2.
    """
    tokens = len(rows)

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32).to(rows.device, non_blocking=True)

    begin, pages, page_len = ints(0, window.q.shape[1]), ints(0, tokens), ints(1)
    slots = rows.to(torch.int32)
    found = [
        window_attention_mass(
            q, begin, keys[layer].unsqueeze(1), pages, slots, page_len, window.positions,
            sm_scale=scale, total_kv=tokens,
        )
        for q, layer in zip(window.q, window.layers, strict=True)
    ]  # fmt: skip
    mass = torch.stack([own.sum(1) for own, _ in found]) / window.q.shape[2]
    return mass, torch.stack([lse for _, lse in found])


def attention_codes(
    window: QueryWindow,
    keys: Sequence[torch.Tensor],
    rows: torch.Tensor,
    scale: float,
    sinks: int,
) -> torch.Tensor:
    """uint8 ``[layers, tokens]`` codes of :mod:`krul_sglang.similarity.levels`, on the keys'
    device; layers that were not sampled take those of the sampled layer below. See
    :func:`attention_mass`; no host synchronisation.
    """
    mass, _ = attention_mass(window, keys, rows, scale)
    return _codes(mass, window.positions, len(keys), sinks)


def codes_of_maps(maps: torch.Tensor, sinks: int) -> torch.Tensor:
    """The same from the attention maps of a conversation's last tokens.

    maps: probabilities ``[layers, heads, queries, tokens]``; of the queries as many are
    used as would have been sampled of an answer.
    """
    layers, _, queries, tokens = maps.shape
    positions = torch.arange(tokens - queries, tokens, dtype=torch.int32)
    kept = (positions % DECODE.stride == 0).nonzero()[-DECODE.size :, 0]
    mass = maps[::STRIDE, :, kept].sum(2).mean(1)
    return _codes(mass, positions[kept], layers, sinks)


def _codes(mass: torch.Tensor, positions: torch.Tensor, layers: int, sinks: int) -> torch.Tensor:
    token = torch.arange(mass.shape[1], device=mass.device)
    seen = (positions[:, None] >= token).sum(0)
    codes = codes_of(mean_mass(mass, seen), sinks)
    return codes.repeat_interleave(-(-layers // len(mass)), 0)[:layers]
