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
FEW = 1 / 12
"""Share of the rows that must have seen a token for their mean to say anything."""
_LOWEST = math.log(OFFSET)


def codes_of(mass: torch.Tensor, sinks: int) -> torch.Tensor:
    """uint8 ``[layers, tokens]`` of attention mass ``[layers, tokens]`` of a whole conversation.

    sinks: leading tokens that the mean leaves out. Mass is not negative; any scale.
    """
    mean = mass[:, sinks:].mean(1, keepdim=True) if mass.shape[1] > sinks else mass.new_ones(1, 1)
    level = (mass / mean.clamp_min(1e-30) + OFFSET).log()
    code = ((level - _LOWEST) * LEVELS_A_NAT).round()
    return code.clamp(0, 255).to(torch.uint8)


def mean_mass(mass: torch.Tensor, seen: torch.Tensor, rows: int) -> torch.Tensor:
    """What one row that could look at a token gave it on average.

    mass: ``[layers, tokens]`` summed over rows. seen: ``[tokens]``, how many of the ``rows``
    could look at it; tokens that few have seen count as seen by :data:`FEW` of them.
    """
    return mass / seen.clamp(rows * FEW, rows)


def levels_of(codes: torch.Tensor) -> torch.Tensor:
    """float32 levels of uint8 ``codes``, the same shape."""
    return codes.float() / LEVELS_A_NAT + _LOWEST
