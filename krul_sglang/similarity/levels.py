"""Attention levels: how much attention a token drew, as one byte a layer.

A level is ``log(mass / mean mass of the conversation + OFFSET)``, in natural logs. The
attention sinks are left out of the mean: what they draw differs from layer to layer and
says nothing about the other tokens.
"""

from __future__ import annotations

import math

import torch

OFFSET = 0.01
"""Below a hundredth of the mean a token counts as hardly attended."""
LEVELS_A_NAT = 16
LATE = 1 / 3
"""Share of the rows below which what has seen a token is few."""
_LOWEST = math.log(OFFSET)


def codes_of(mass: torch.Tensor, sinks: int) -> torch.Tensor:
    """uint8 ``[layers, tokens]`` of attention mass ``[layers, tokens]`` of a whole conversation.

    sinks: leading tokens that the mean leaves out. Mass is not negative; any scale.
    """
    mean = mass[:, sinks:].mean(1, keepdim=True) if mass.shape[1] > sinks else mass.new_ones(1, 1)
    level = (mass / mean.clamp_min(1e-30) + OFFSET).log()
    code = ((level - _LOWEST) * LEVELS_A_NAT).round()
    return code.clamp(0, 255).to(torch.uint8)


def mean_mass(mass: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """What one row that could look at a token gave it on average.

    mass: ``[layers, tokens]`` summed over rows. seen: int ``[tokens]``, how many rows could
    look at it, the first token all of them. The latest tokens few or none have seen, and the
    next ones will look at them most: they count as if one row more had given them what is
    usual there.
    """
    late = seen < seen.max() * LATE
    own = torch.where(late, mass, 0).sum(1, keepdim=True)
    usual = own / torch.where(late, seen, 0).sum().clamp_min(1)
    return torch.where(late, (mass + usual) / (seen + 1), mass / seen.clamp_min(1))


def levels_of(codes: torch.Tensor) -> torch.Tensor:
    """float32 levels of uint8 ``codes``, the same shape."""
    return codes.float() / LEVELS_A_NAT + _LOWEST
