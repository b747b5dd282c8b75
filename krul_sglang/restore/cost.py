"""What loading and computing cost on this machine, learnt from what the server measures.

Nothing here is a constant of some machine: the first values are measured at launch
(:mod:`krul_sglang.restore.probe`), and every restore and prefill corrects them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

WEIGHT = 0.5
"""How much of an estimate a new measurement replaces. Less would follow a machine that becomes
slower too late, and hardly gain: passes of one shape differ by 4 %, which this makes 4.5, a quarter
4.2."""

SURPRISE, BELIEF = 2.0, 0.85
"""A measurement that is off by more than this factor replaces that much: after a tenfold change
the first one leaves a factor of 1.4."""

HOPE = 0.9
"""What a rate is multiplied with when a plan avoids its tier: without being tried it would
stay what it last was, however long ago. A plan that hopes loads a few tokens, which tell the
truth."""

MOST_PATIENCE = 64
"""Plans that avoid a tier before hope sets in, at most. Each trial that finds the tier no better
doubles them, so that trying costs less and less."""

APART = 4.0
"""What a pass that continues something has in common with one that does not: as much as two
passes of which one has 16 times the tokens."""

LEAST = 64
"""Tokens below which a decode says more of what it costs to begin than of a token."""

BESIDE = 0.2
"""Share of a pass's seconds that decoders on its cores may work beside it for these to be its own,
nearly. Beyond, they say what working side by side costs."""

Floats = npt.NDArray[np.float64]


def _blend(old: float | None, new: float) -> float:
    """An estimate brought up to date; in logarithms, as rates are wrong by factors."""
    if old is None:
        return new
    surprising = not 1 / SURPRISE <= new / old <= SURPRISE
    weight = BELIEF if surprising else WEIGHT
    return math.exp((1 - weight) * math.log(old) + weight * math.log(new))


@dataclass
class Rate:
    """Seconds per unit of something, learnt online."""

    seconds: float
    """Seconds a unit takes; before the first observation, what was measured at launch."""
    observations: int = 0
    patience: int = 1
    """How often it is avoided before hope sets in."""
    avoided: int = 0
    """How often it has been since it was last observed."""
    observed: float = 0.0
    """The estimate then, which hope does not touch."""

    def __post_init__(self) -> None:
        self.observed = self.observed or self.seconds

    @property
    def hoped_for(self) -> bool:
        """Whether it counts as better than it was when it was last observed."""
        return self.avoided >= self.patience

    def hope(self) -> None:
        """It was avoided: it may have become better."""
        self.avoided += 1
        if self.hoped_for:
            self.seconds *= HOPE

    def observe(self, units: float, seconds: float) -> None:
        """``units`` took ``seconds``; nothing is learnt from nothing."""
        if not (units > 0 and seconds > 0):
            return
        new = seconds / units
        if self.hoped_for:  # a trial
            better = new * SURPRISE < self.observed
            self.patience = 1 if better else min(2 * self.patience, MOST_PATIENCE)
        self.seconds = new if self.observations == 0 else _blend(self.seconds, new)
        self.observed, self.avoided = self.seconds, 0
        self.observations += 1


@dataclass(frozen=True)
class Prefill:
    """Shape of a forward pass over new tokens.

    tokens: new tokens, of all requests. pairs: query-key pairs. continued: whether any request
    has tokens before its new ones, which backends may have another way for: SGLang's for CPUs
    takes 34 s for 3,904 tokens after 256, and 24 s for 4,160 after none.
    """

    tokens: Floats | float
    pairs: Floats | float
    continued: npt.NDArray[np.bool_] | bool

    @classmethod
    def of(cls, new: Floats | float, before: Floats | float) -> Prefill:
        """Of one request's ``new`` tokens after ``before`` others; arrays give arrays."""
        return cls(new, new * (before + new / 2), before > 0)

    @classmethod
    def of_batch(cls, new: Floats, before: Floats) -> Prefill:
        """One pass over the new tokens of several requests, float ``[requests]``."""
        pairs = new * (before + new / 2)
        return cls(float(new.sum()), float(pairs.sum()), bool((before > 0).any()))


class Lesson(NamedTuple):
    """What passes of one bucket of shapes taught: where among shapes they lay, see
    :func:`_position`, and the factor there."""

    at: tuple[float, ...]
    factor: float


@dataclass
class ComputeCost:
    """Seconds of a forward pass: a fixed part, one by token and one by query-key pair.

    The three are measured at launch; what they get wrong is learnt as a factor for each
    bucket of shapes (powers of two of tokens and of keys a token, continued or not), which holds
    where the bucket's passes lay, and in between as their mean in logarithms, weighted by the
    inverse square of the distance.

    beside: seconds that a pass takes longer for each that a decoder works on its cores meanwhile.
    outside: seconds of a pass in which it is at none of its layers (embeddings, the head), None
    before any was watched.
    """

    fixed: float
    token: float
    pair: float
    lessons: dict[tuple[int, ...], Lesson] = field(default_factory=dict)
    beside: float = 0.0
    outside: float | None = None

    def _base(self, prefill: Prefill) -> Floats:
        cost = self.fixed + self.token * prefill.tokens + self.pair * prefill.pairs
        return np.asarray(cost, np.float64)

    def seconds(self, prefill: Prefill) -> Floats:
        """Expected seconds, 0 for no tokens; arrays give arrays."""
        tokens = np.asarray(prefill.tokens, np.float64)
        base = self._base(prefill) * (tokens > 0)
        if not self.lessons:
            return base
        known = np.array([lesson.at for lesson in self.lessons.values()])
        values = np.log([lesson.factor for lesson in self.lessons.values()])
        apart = np.square(_position(prefill)[..., None, :] - known).sum(-1)
        # Where something was seen, within a tenth of a power, it decides alone, nearly.
        weights = 1 / (apart + 0.01)
        return base * np.exp((weights * values).sum(-1) / weights.sum(-1))

    def observe(self, prefill: Prefill, seconds: float, decoding: float = 0.0) -> None:
        """A pass of this shape took ``seconds``, waiting not counted. decoding: seconds that
        threads decoded for it on cores that it shares."""
        if seconds > 0 and decoding > BESIDE * seconds:
            slower = max(0.0, seconds - float(self.seconds(prefill))) / decoding
            self.beside += WEIGHT * (slower - self.beside)
            return
        seconds -= self.beside * decoding
        base = float(self._base(prefill))
        if base <= 0 or seconds <= 0 or not float(prefill.tokens) > 0:
            return
        at = _position(prefill)
        bucket = tuple(int(axis) for axis in at.round())
        factor, old = seconds / base, self.lessons.get(bucket)
        if old is not None:
            at, factor = at + WEIGHT * (old.at - at), _blend(old.factor, factor)
        self.lessons[bucket] = Lesson(tuple(at.tolist()), factor)

    def observe_outside(self, seconds: float) -> None:
        """A pass was at none of its layers for so long."""
        seconds = max(0.0, seconds)
        if self.outside is None:
            self.outside = seconds
        else:
            self.outside += WEIGHT * (seconds - self.outside)


def _position(prefill: Prefill) -> Floats:
    """``[..., 3]``: powers of two of the tokens and of the keys that a token attends, and a
    third axis for what is continued."""
    tokens = np.maximum(np.asarray(prefill.tokens, np.float64), 1)
    keys = np.maximum(np.asarray(prefill.pairs, np.float64) / tokens, 1)
    continued = APART * np.broadcast_to(prefill.continued, tokens.shape)
    return np.stack((np.log2(tokens), np.log2(keys), continued), -1)


@dataclass
class LoadCost:
    """Seconds of loading: a rate for each tier's link and for each codec.

    links: seconds a byte, by tier; a tier that is missing has no link to speak of.
    codecs: seconds a token that one thread decodes, all layers.
    threads: how many decode side by side.
    """

    threads: int
    links: dict[str, Rate] = field(default_factory=dict)
    codecs: dict[str, Rate] = field(default_factory=dict)

    def fetch_seconds(self, tier: str, nbytes: float) -> float:
        """Seconds the tier's link is busy."""
        return self.links[tier].seconds * nbytes if tier in self.links else 0.0

    def without_hope(self) -> LoadCost:
        """With links as they were when they were last observed."""
        links = {tier: Rate(rate.observed) for tier, rate in self.links.items()}
        return LoadCost(self.threads, links, self.codecs)

    def decode_seconds(self, codec: str, tokens: float) -> float:
        """Seconds of one thread."""
        rate = self.codecs.get(codec)
        if rate is None:  # never met: as the slowest known
            rate = max(self.codecs.values(), key=lambda own: own.seconds, default=Rate(0.0))
        return rate.seconds * tokens

    def observe_decode(self, codec: str, tokens: float, seconds: float) -> None:
        """``tokens`` took one thread ``seconds``; fewer than :data:`LEAST` teach nothing."""
        if tokens < LEAST:
            return
        self.codecs.setdefault(codec, Rate(0.0)).observe(tokens, seconds)
