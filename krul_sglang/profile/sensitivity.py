"""What a layer's errors really cost.

The importance metric (:mod:`.importance`) knows what an infinitesimal error costs. What
quantization leaves is larger, and some layers then hurt several times more than the metric
expects, the same ones in every conversation. So each layer alone is stored and restored, the
divergence measured, and the metric of a layer corrected by what it was off, to the power
:data:`TRUST`: few texts are asked, and their own corrections differ by half.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from krul_sglang.profile.base import Profile
from krul_sglang.profile.trial import Trial

TRUST = 0.6
"""Of four texts, the corrections of three left for the fourth 0.90 of the divergence at powers
of 0.5 to 0.75, 0.91 at 1."""
MOST = 32.0
"""What a layer's metric may be off, either way; more is noise or a model of random weights."""


def layer_costs(
    trials: Sequence[Trial],
    profile: Profile,
    step: float,
    tell: Callable[[float], None],
) -> list[float]:
    """By layer: KL (nats) over the error in the importance metric that came with it, means over
    the trials."""
    layers = len(profile.layers)
    kl, errors = [0.0] * layers, [0.0] * layers
    for done, trial in enumerate(trials):
        own, measured = trial.cost_by_layer(profile, step)
        for layer in range(layers):
            kl[layer] += own[layer]
            errors[layer] += measured.errors[layer]
        tell((done + 1) / len(trials))
    raw = [max(1e-12, cost) / max(1e-30, error) for cost, error in zip(kl, errors, strict=True)]
    usual = _geometric_mean(raw)
    return [usual * min(max(cost / usual, 1 / MOST), MOST) for cost in raw]


def corrections(costs: Sequence[float]) -> list[float]:
    """What to multiply each layer's metric with, 1 in the geometric mean."""
    usual = _geometric_mean(costs)
    return [(cost / usual) ** TRUST for cost in costs]


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
