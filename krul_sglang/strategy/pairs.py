"""Which layers to pair: fixed pairs (MiniCache) and the selection of the Krul paper.

The selection follows arXiv 2507.08045, of which no code was available. It leaves open,
and this module chooses:

- *Which attention.* The rows of the last queries of the history, after the softmax, as
  they are. The paper estimates similarity while it prefills and decodes.
- *The edges* are the first and last 10 % of all keys, rounded up, not of the keys that
  each query sees. A layer's mass is the mean over heads and queries.
- *The threshold*, for which no figure is known. ``THRESHOLD`` keeps about two thirds of
  the layers of SmolLM2-135M, nearly all of them in the deep half.
- *The distance* of two layers is the Euclidean distance of all sampled rows of one head,
  averaged over heads with the same index.
- *The target ratio* is a number of pairs. Fewer are returned where too few layers are
  left; layers below the threshold are never taken to fill up.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

EDGE = 0.1
"""Share of the keys at either end whose attention mass is counted."""
THRESHOLD = 0.7
"""Attention mass on both edges below which a layer is input-dependent."""


def fixed_pairs(layers: int) -> tuple[tuple[int, int], ...]:
    """Neighbouring layers of the deep half, as MiniCache pairs them (arXiv 2405.14366).

    The first layer of the deep half is ``layers // 2``; an odd one at the end is left out.
    """
    return tuple((upper - 1, upper) for upper in range(layers // 2 + 1, layers, 2))


def select_pairs(
    attention: torch.Tensor,
    count: int,
    threshold: float = THRESHOLD,
    edge: float = EDGE,
) -> tuple[tuple[int, int], ...]:
    """At most ``count`` disjoint ``(lower, upper)`` pairs of alike layers, ascending.

    attention: probabilities ``[layers, heads, queries, keys]`` of sampled query rows, any
        float dtype. Pairs are taken in the order of their distance, ties by layer number.
    Raises ValueError for another shape or no query, head or key.
    """
    if attention.ndim != 4 or 0 in attention.shape:
        raise ValueError(f"attention of shape {tuple(attention.shape)} is no [L, H, Q, K]")
    mass = edge_mass(attention, edge)
    eligible = [layer for layer, share in enumerate(mass.tolist()) if share >= threshold]
    distance = attention_distance(attention[eligible]).tolist() if eligible else []
    order = sorted(
        (distance[i][j], eligible[i], eligible[j]) for j in range(len(eligible)) for i in range(j)
    )
    pairs: list[tuple[int, int]] = []
    taken: set[int] = set()
    for _, lower, upper in order:
        if len(pairs) >= count:
            break
        if lower not in taken and upper not in taken:
            pairs.append((lower, upper))
            taken |= {lower, upper}
    return tuple(sorted(pairs))


def edge_mass(attention: torch.Tensor, edge: float = EDGE) -> torch.Tensor:
    """float64 ``[layers]``: attention on the first and last ``edge`` of the keys.

    attention: ``[layers, heads, queries, keys]``. Between 0 and 1; a key is counted once.
    """
    import torch

    keys = attention.shape[3]
    width = min(math.ceil(edge * keys), (keys + 1) // 2)
    rows = attention.mean((1, 2), dtype=torch.float64)
    return rows[:, :width].sum(1) + rows[:, max(width, keys - width) :].sum(1)


def attention_distance(attention: torch.Tensor) -> torch.Tensor:
    """float64 ``[layers, layers]``: Euclidean distance of a head's rows, mean over heads.

    attention: ``[layers, heads, queries, keys]``.
    """
    import torch

    # The faster way through a matrix product loses what tells close layers apart.
    mode = "donot_use_mm_for_euclid_dist"
    heads = (head.double().flatten(1) for head in attention.unbind(1))
    return torch.stack([torch.cdist(head, head, compute_mode=mode) for head in heads]).mean(0)
