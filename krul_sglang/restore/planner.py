"""How much of a stored history to load, and how much to compute anew with the new turn.

Tokens ``[device, p)`` are loaded while the forward pass computes ``[p, stored end)`` and the
new turn. Layer by layer, with ``f`` the link, ``d`` the decoders and ``c`` the pass:

    f_l = f_{l-1} + bytes_l(p) / rate
    d_l = max(d_{l-1}, f_l) + decode_l(p)
    c_l = max(c_{l-1}, d_l) + compute_l(p)

and the pass ends at ``c_{L-1}``, plus the time in which it is at no layer and what chunks after
the first take: those find every layer loaded. The planner tries up to :data:`CHOICES` values of
``p`` and takes the earliest end, but loads everything where that ends no later to speak of, which
leaves the most compute to others. Between the two the liberty is smaller: a little more to load is
a little for the pass to wait for at every layer.
Where decoders and the pass share cores, decoding slows the pass down, as much as it was seen to,
and no plan ends before their work divided by the cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from krul_sglang.restore.cost import ComputeCost, Floats, LoadCost, Prefill

CHOICES = 256
"""Of p beside everything, at most: where the span is longer they are as many tokens apart as it
takes."""
TRIAL = 16
"""Tokens that are loaded to see whether a link has become better."""
TRIED = 0.05
"""What a trial may cost, as a share of the restores that avoided the link before it: SGLang's
attention for CPUs takes 60 % longer for 4,000 tokens that continue 16 than for all of them."""
INDIFFERENT = 0.01
"""Loading everything is as good as the best choice if it takes no more than this share longer."""
NEARLY = 0.003
"""So is loading more than the best choice does, short of everything, where that loads at all."""


def _best(ends: Floats) -> int:
    """Which choice ends first, or loads more and ends no later to speak of."""
    best = int(ends.argmin())
    least = ends[best]
    if ends[-1] <= least * (1 + INDIFFERENT):
        return len(ends) - 1
    return int(np.flatnonzero(ends <= least * (1 + NEARLY))[-1]) if best else 0


def _plan(choices: np.ndarray, ends: Floats, parts: Sequence[Floats], at: int) -> Plan:
    fetch, *rest = (part[..., at] for part in parts)
    return Plan(int(choices[at]), float(ends[at]), fetch, *map(float, rest))


def block(span: int) -> int:
    """Tokens between two choices of p where there are ``span`` to choose from."""
    return max(1, -(-span // CHOICES))


@dataclass(frozen=True, eq=False)
class StoredRun:
    """Tokens that are stored as one, in the order of the history.

    layer_bytes: ``[layers]``, what each layer needs of ``nbytes`` beyond those below it, in any
    unit; None where that is not known, or where all need as much.
    """

    tokens: int
    nbytes: int
    codec: str
    tier: str = "memory"
    layer_bytes: Floats | None = None

    def shares(self, layers: int) -> Floats:
        """``[layers]``, of 1: each layer's part of the bytes."""
        if self.layer_bytes is None or not self.layer_bytes.any():
            return np.full(layers, 1 / layers)
        return self.layer_bytes / self.layer_bytes.sum()


@dataclass(frozen=True)
class Turn:
    """A request that returns.

    device: leading tokens that are on the device. stored: the runs that follow. new: tokens
    after them.
    """

    device: int
    stored: Sequence[StoredRun]
    new: int

    @property
    def end(self) -> int:
        """Tokens on the device or stored."""
        return self.device + sum(run.tokens for run in self.stored)


@dataclass
class Ahead:
    """What requests of the same batch have already been given, seconds. fetch: of each layer,
    ``[layers]``, or 0. cores: of one core, decoding and computing together."""

    fetch: Floats | float = 0.0
    decode: float = 0.0
    compute: float = 0.0
    cores: float = 0.0
    tokens: int = 0


@dataclass(frozen=True, eq=False)
class Plan:
    """load: absolute position up to which stored tokens are loaded. seconds: from the start
    to the end of the pass, expected. The parts are this request's own seconds, one stream
    alone: link (of each layer, ``[layers]``), decoders (side by side), pass; and those that one
    core would take for all of its decoding and computing."""

    load: int
    seconds: float
    fetch: Floats
    decode: float
    compute: float
    cores: float


@dataclass
class Planner:
    """Plans turns of one server. layers: the model's. cores: that decoders and forward pass
    share, None where the pass runs elsewhere. chunk: most tokens of one pass, None for any."""

    layers: int
    compute: ComputeCost
    load: LoadCost
    cores: int | None = None
    chunk: int | None = None
    page: int = 1
    ahead: Ahead = field(default_factory=Ahead)

    def choices(self, turn: Turn) -> np.ndarray:
        """Every p that is tried, ascending, whole pages."""
        step = -(-block(turn.end - turn.device) // self.page) * self.page
        return np.append(np.arange(turn.device, turn.end, step), turn.end)

    def plan(self, turn: Turn) -> Plan:
        """The best p for a turn, given what its batch already has to do."""
        choices = self.choices(turn)
        ends, parts = self.ends(turn, choices)
        best = _best(ends)
        trial = int(np.searchsorted(choices, turn.device + TRIAL))
        tiers, links = {run.tier for run in turn.stored}, self.load.links.items()
        hoped = [own.avoided for tier, own in links if tier in tiers and own.hoped_for]
        if best > trial and hoped:
            # Of what hope alone would load, a little, and seldom where that costs much: all of it
            # is lost if the hope is in vain.
            sober = replace(self, load=self.load.without_hope()).ends(turn, choices)[0]
            known = _best(sober)
            dear = sober[trial] / sober[known] - 1 > TRIED * max(hoped)
            best = min(best, known if dear else max(trial, known))
        return _plan(choices, ends, parts, best)

    def load_all(self, turn: Turn) -> Plan:
        """What loading everything is expected to take."""
        choices = np.array([turn.end])
        return _plan(choices, *self.ends(turn, choices), 0)

    def ends(self, turn: Turn, choices: np.ndarray) -> tuple[Floats, tuple[Floats, ...]]:
        """For each p: seconds to the end of the pass, and the parts of a :class:`Plan`, p last."""
        fetch, work = self._loading(turn, choices)
        alone, later = self._computing(turn, choices)
        first = alone + self.compute.beside * work
        threads = np.minimum(self.load.threads, np.maximum(1, len(turn.stored)))
        decode = work / threads
        ahead = self.ahead
        outside = np.minimum(self.compute.outside or 0.0, first)
        arrived = np.cumsum(fetch + np.reshape(ahead.fetch, (-1, 1)), axis=0)
        d = (decode + ahead.decode) / self.layers
        c = (first - outside + ahead.compute) / self.layers
        ready = np.zeros(len(choices))
        end = np.zeros(len(choices))
        for f in arrived:
            ready = np.maximum(ready, f) + d
            end = np.maximum(end, ready) + c
        end = end + outside
        if self.cores is not None:
            end = np.maximum(end, (work + alone + ahead.cores) / self.cores)
        return end + later, (fetch, decode, first + later, work + alone + later)

    def _loading(self, turn: Turn, choices: np.ndarray) -> tuple[Floats, Floats]:
        """Seconds of the link for each layer and p, and of one decoder for each p."""
        load, runs = self.load, turn.stored
        tokens = np.array([[run.tokens] for run in runs])
        begins = turn.device + np.cumsum(tokens, axis=0) - tokens
        loaded = np.clip((choices - begins) / tokens, 0.0, 1.0)  # [runs, choices]
        seconds = [load.fetch_seconds(run.tier, run.nbytes) for run in runs]
        link = np.stack([run.shares(self.layers) for run in runs], axis=1) * seconds
        decode = np.array([load.decode_seconds(run.codec, run.tokens) for run in runs])
        return link @ loaded, decode @ loaded

    def _computing(self, turn: Turn, choices: np.ndarray) -> tuple[Floats, Floats]:
        """Seconds of the pass that overlaps with loading, and of the chunks after it."""
        tokens = (turn.end - choices + turn.new).astype(np.float64)
        room = np.inf if self.chunk is None else max(1, self.chunk - self.ahead.tokens)
        first = np.minimum(tokens, room)
        rest = tokens - first

        def seconds(new: Floats, before: Floats) -> Floats:
            return self.compute.seconds(Prefill.of(new, before))

        later = np.zeros(len(choices))
        if rest.any():
            assert self.chunk is not None
            # All whole chunks as one, at what a chunk of that size costs a token.
            before = choices + first
            passes = np.ceil(rest / self.chunk)
            size = rest / np.maximum(passes, 1)
            later = passes * seconds(size, before + (rest - size) / 2)
        return seconds(first, choices.astype(np.float64)), later

    def take(self, plan: Plan, tokens: int) -> None:
        """The turn was admitted: what follows in its batch comes after it. tokens: that its
        pass computes."""
        self.ahead.fetch = self.ahead.fetch + plan.fetch
        self.ahead.decode += plan.decode
        self.ahead.compute += plan.compute
        self.ahead.cores += plan.cores
        self.ahead.tokens += tokens

    def next_batch(self) -> None:
        """A batch has been run; nothing is ahead any more."""
        self.ahead = Ahead()
