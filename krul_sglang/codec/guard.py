"""The guard: what an encoding is expected to cost, before the original is gone.

Calibration measures, on text the fit has not seen, the divergence of the finished codec
at several steps, its error in the importance metric, and how far that text is from the
samples. The guard holds a segment's own figures against these: error beyond the usual
spread means more divergence in proportion; text far from anything calibrated is coded
much finer, because what its errors cost is not known. It is an estimate from the KV
alone. Its coverage is measured, not proven (docs/quality.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from krul_sglang.profile.base import Profile

ERROR_SPREAD = 1.5
"""Error, against held-out calibration text, that the profile's margin already covers."""
UNLIKE = 1.5
"""Distance, against held-out calibration text, from which a text counts as unlike it: of 35 chats,
plays and programs 33 lay at 0.93 to 1.40 and two at 1.7, C++ at 1.41 and 1.55, random tokens and
base64 at 1.55 to 1.62, other languages at 3.0. It depends on the coarsest step of calibration's
curve."""
UNLIKE_COST = 4.0
"""How much more an error may cost in unlike text: other languages showed up to 5 times as much
as held-out text, random tokens 3.5 times; the margin covers the rest."""
FOREIGN = 6.0
"""Distance from which nothing is assumed at all."""
TRIES = 4
QUARTERS = 4


@dataclass(frozen=True)
class Measured:
    """What encoding a run showed; the first two by layer, empty for no tokens.

    errors: squared error in the importance metric, a token's mean.
    novelty: how far its tokens were from the profile's.
    repetitive: whether a few tokens are all it has. One token over and over showed 200 times
        the divergence of other text at the same error, and nothing else gives it away.
    """

    errors: tuple[float, ...]
    novelty: tuple[float, ...]
    repetitive: bool = False

    @property
    def error(self) -> float:
        """Over all layers: the metric carries their sensitivities, so their errors add up."""
        return sum(self.errors)


def quarters(novelty: Sequence[float]) -> list[float]:
    """Means over consecutive quarters of the layers (fewer where there are fewer layers)."""
    parts = min(QUARTERS, len(novelty))
    edges = [len(novelty) * i // parts for i in range(parts + 1)] if parts else []
    return [sum(novelty[a:b]) / (b - a) for a, b in pairwise(edges)]


def distance(profile: Profile, measured: Measured) -> float:
    """How many times farther than held-out calibration text a run is, at its farthest."""
    found = zip(quarters(measured.novelty), profile.novelty, strict=False)
    return max((a / b for a, b in found), default=0.0)


def penalty(profile: Profile, measured: Measured, step: float) -> float:
    """How much more than held-out text a run encoded at ``step`` is expected to cost: 1 for
    text like it, infinite for foreign KV and mere repetition."""
    far = distance(profile, measured)
    if far > FOREIGN or measured.repetitive:
        return math.inf
    _, error = profile.cost_at(step)
    return max(1.0, measured.error / error / ERROR_SPREAD) * (UNLIKE_COST if far > UNLIKE else 1.0)


def guarded(
    profile: Profile, budget: float, encode_at: Callable[[float], tuple[bytes, Measured]]
) -> bytes:
    """The payload at a step whose expected cost is within ``budget``, the budget's own first.

    Raises ValueError where none is found; the caller stores such a run losslessly.
    """
    allowed = budget
    for _ in range(TRIES):
        step = profile.step_for(allowed)
        payload, measured = encode_at(step)
        cost = penalty(profile, measured, step)
        if cost * allowed <= budget * 1.001:
            return payload
        if cost == math.inf:
            break
        allowed = budget / cost
    raise ValueError(f"no step keeps this run within {budget:g} nats")
