"""Restores on hardware that is not here: the planner's own arithmetic under stated assumptions.

A :class:`Regime` (model, accelerator, link) gives a :class:`Planner` its costs, which a server
would have measured. :func:`pyramid` says what a split that differs by layer could reach, as the
Krul paper's does: deep layers load more. To compute a token at a layer it must have been computed
at all layers below, so the loaded part ``p_l`` never shrinks with depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from krul_sglang.restore.cost import ComputeCost, LoadCost, Rate
from krul_sglang.restore.planner import Planner, StoredRun, Turn

DTYPE_BYTES = 2
"""Everything is computed and cached in 16 bits."""
STEPS = 32
"""Choices of ``p_l`` in a pyramid, without the first."""
TIER = "simulated"


@dataclass(frozen=True)
class Model:
    """A dense decoder with gated MLPs. ranks: accelerators it is split over, evenly."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    ranks: int = 1

    @property
    def weights(self) -> int:
        """Scalars that a token is multiplied with in all layers; the vocabulary's are not
        counted: a prefill needs them for its last token only."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.mlp)

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's raw KV, all ranks."""
        return 2 * self.layers * self.kv_heads * self.head_dim * DTYPE_BYTES


@dataclass(frozen=True)
class Accelerator:
    """flops: a second, dense 16 bit, at most. linear, attention: shares of it that the products
    with weights and the attention of a prefill reach. memory: bytes a second."""

    name: str
    flops: float
    memory: float
    linear: float = 0.6
    attention: float = 0.5


@dataclass(frozen=True)
class Link:
    """rate: bytes a second that reach the accelerator. shared: by all ranks of the model, or
    each has its own."""

    name: str
    rate: float
    shared: bool


@dataclass(frozen=True)
class Form:
    """How KV is stored. ratio: raw 16-bit bytes over stored ones. decode: raw bytes that are
    decoded a second, all ranks together, None where it keeps up with any link."""

    name: str
    ratio: float = 1.0
    decode: float | None = None


@dataclass(frozen=True)
class Regime:
    """What a planner's costs follow from; every rank does the same at the same time."""

    model: Model
    accelerator: Accelerator
    link: Link

    def compute_cost(self) -> ComputeCost:
        """A pass reads the weights once; then its arithmetic counts."""
        model, chip = self.model, self.accelerator
        weights = model.weights / model.ranks
        # A query and a key cost a multiplication and an addition for each of their products,
        # and as many for the value.
        pair = 4 * model.heads * model.head_dim * model.layers / model.ranks
        return ComputeCost(
            fixed=weights * DTYPE_BYTES / chip.memory,
            token=2 * weights / (chip.flops * chip.linear),
            pair=pair / (chip.flops * chip.attention),
        )

    def planner(self, form: Form, chunk: int | None = None) -> Planner:
        """Of all ranks as one. chunk: most tokens of one pass."""
        rate = self.link.rate * (1 if self.link.shared else self.model.ranks)
        decode = 0.0 if form.decode is None else self.model.token_bytes / form.decode
        load = LoadCost(1, {TIER: Rate(1 / rate)}, {form.name: Rate(decode)})
        return Planner(self.model.layers, self.compute_cost(), load, chunk=chunk)

    def turn(self, form: Form, history: int, new: int) -> Turn:
        """A stored history that comes back with ``new`` tokens."""
        nbytes = round(history * self.model.token_bytes / form.ratio)
        return Turn(0, [StoredRun(history, nbytes, form.name, TIER)], new)


@dataclass(frozen=True)
class Split:
    """seconds: to the end of the pass. loads: by layer, leading tokens that are loaded."""

    seconds: float
    loads: Sequence[int]


def pyramid(planner: Planner, turn: Turn, steps: int = STEPS) -> Split:
    """The best split by layer with ``p_0 <= p_1 <= ...`` on a grid of ``steps``, by dynamic
    programming over layer, ``p_l`` and the sum of what was loaded so far.

    Exact where nothing is to be decoded. Decoding is taken to be no later than its own layer's
    bytes and its own sum allow, which no order of the two beats: with decoding the result is a
    bound. All tokens are one pass. Raises ValueError for a history that is stored as several
    runs, whose tokens need not cost the same, or whose layers' bytes differ.
    """
    if len(turn.stored) != 1:
        raise ValueError(f"a history of one run is expected, not of {len(turn.stored)}")
    if turn.stored[0].layer_bytes is not None:
        raise ValueError("a history whose layers need as many bytes each is expected")
    choices = np.linspace(turn.device, turn.end, steps + 1)
    whole = Planner(planner.layers, planner.compute, planner.load)
    _, (by_layer, *rest) = whole.ends(turn, choices)
    fetch, (decode, compute) = by_layer[0], (part / planner.layers for part in rest[:2])
    sums = np.arange(planner.layers * steps + 1)
    # The earliest that a layer with p_l = p is decoded, s steps being loaded up to it: [p, s].
    ready = np.maximum(sums * (fetch[-1] / steps) + decode[:, None], sums * (decode[-1] / steps))
    end = np.full((steps + 1, sums.size), np.inf)
    end[0, 0] = 0.0  # nothing is loaded before the first layer
    below: list[np.ndarray] = []
    for _ in range(planner.layers):
        least = np.minimum.accumulate(end, axis=0)
        came = _argmin_so_far(end, least)
        end = np.full_like(end, np.inf)
        source = np.zeros(end.shape, np.int16)
        for p in range(steps + 1):
            begun = np.maximum(least[p, : sums.size - p], ready[p, p:])
            end[p, p:] = begun + compute[p]
            source[p, p:] = came[p, : sums.size - p]
        below.append(source)
    p, s = divmod(int(end.argmin()), sums.size)
    seconds, loads = float(end[p, s]), []
    for source in reversed(below):
        loads.append(round(choices[p]))
        p, s = int(source[p, s]), s - p
    return Split(seconds, loads[::-1])


def _argmin_so_far(values: np.ndarray, least: np.ndarray) -> np.ndarray:
    """Row of the least value up to each row of ``values``; ``least``: those values."""
    rows = np.where(values == least, np.arange(len(values))[:, None], 0)
    return np.maximum.accumulate(rows, axis=0)
