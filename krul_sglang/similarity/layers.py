"""How alike layers attend, as the Krul paper (arXiv 2507.08045) measures it.

No code of the paper was available. It leaves open, and this module chooses:

- *Which attention.* The rows of sampled queries, after the softmax, as they are.
- *The edges* are the first and last 10 % of all keys, rounded up, not of the keys that
  each query sees. A layer's mass is the mean over heads and queries.
- *The distance* of two layers is the Euclidean distance of all sampled rows of one head,
  averaged over heads with the same index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from krul_sglang.similarity.estimate import attention_mass
from krul_sglang.similarity.window import QueryWindow

EDGE = 0.1
"""Share of the keys at either end whose attention mass is counted."""
CHUNK = 256
"""Keys whose probabilities are held at a time, of all layers."""


@dataclass(frozen=True)
class LayerSimilarity:
    """edges: float64 ``[layers]``, attention mass on the first and last keys, 0 to 1.
    distance: float64 ``[layers, layers]`` between their attention."""

    edges: torch.Tensor
    distance: torch.Tensor


def similarity_of_maps(attention: torch.Tensor, edge: float = EDGE) -> LayerSimilarity:
    """Of attention maps ``[layers, heads, queries, keys]``, any float dtype.

    Raises ValueError for another shape or no query, head or key.
    """
    if attention.ndim != 4 or 0 in attention.shape:
        raise ValueError(f"attention of shape {tuple(attention.shape)} is no [L, H, Q, K]")
    # The faster way through a matrix product loses what tells close layers apart.
    mode = "donot_use_mm_for_euclid_dist"
    heads = (head.double().flatten(1) for head in attention.unbind(1))
    distance = torch.stack([torch.cdist(head, head, compute_mode=mode) for head in heads]).mean(0)
    return LayerSimilarity(_edges(attention.mean((1, 2), dtype=torch.float64), edge), distance)


def similarity_of_window(
    window: QueryWindow,
    keys: Sequence[torch.Tensor],
    rows: torch.Tensor,
    scale: float,
    edge: float = EDGE,
) -> LayerSimilarity:
    """The same from sampled queries, at every layer of the window.

    See :func:`krul_sglang.similarity.estimate.attention_mass`. Never holds more than
    ``layers x rows x heads x CHUNK`` probabilities.
    """
    mass, lse = attention_mass(window, keys, rows, scale)
    layers, count, heads, _ = window.q.shape
    groups = keys[0].shape[1]
    # [layers, KV heads, rows x group, dim], in the same order as ``total`` and ``last``.
    q = window.q.float().unflatten(2, (groups, -1)).transpose(1, 2).flatten(2, 3)
    total = lse.unflatten(2, (groups, -1)).transpose(1, 2).flatten(2)
    last = window.positions.repeat_interleave(heads // groups)
    gram = torch.zeros(heads, layers, layers, dtype=torch.float64, device=rows.device)
    for begin in range(0, len(rows), CHUNK):
        chunk = rows[begin : begin + CHUNK]
        k = torch.stack([keys[layer][chunk] for layer in window.layers]).float()
        logits = (q @ k.permute(0, 2, 3, 1)) * (scale * math.log2(math.e))
        token = torch.arange(begin, begin + len(chunk), device=rows.device)
        seen = token <= last[:, None]
        p = torch.where(seen, torch.exp2(logits - total.nan_to_num(neginf=0)[..., None]), 0)
        # Heads apart again: [heads, layers, rows x keys of the chunk].
        p = p.unflatten(2, (count, -1)).transpose(2, 3).flatten(1, 2).flatten(2).transpose(0, 1)
        # Close layers differ in digits that products of floats lose; those of doubles keep
        # all that the probabilities, floats themselves, have.
        p = p.double()
        gram += p @ p.mT
    own = gram.diagonal(dim1=1, dim2=2)
    square = (own[:, :, None] + own[:, None] - 2 * gram).clamp_min(0)
    shown = (window.positions >= 0).sum().clamp_min(1)
    return LayerSimilarity(_edges(mass.double() / shown, edge), square.sqrt().mean(0))


def _edges(mass: torch.Tensor, edge: float) -> torch.Tensor:
    """Mass ``[layers, keys]`` on both ends; a key is counted once."""
    keys = mass.shape[1]
    width = min(math.ceil(edge * keys), (keys + 1) // 2)
    return mass[:, :width].sum(1) + mass[:, max(width, keys - width) :].sum(1)
