"""What benchmarks/plan_choice.py measures at one setting, and what it concludes from it.

A *setting* is a policy, a history and a link. Its samples are returns of a stored conversation,
each with ``load`` leading tokens loaded and the rest recomputed.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from restore_cells import times
from restore_peers import PAGE

CLAIM = 1.05
"""The planner's median over the best forced one is to be no more than this."""
SKIP = 3.0
"""A point is not measured when the link alone takes it this many times the best time known."""
FEW = 64
"""Tokens by which choices may differ and still be the same."""
NEAR = (-2, -1, 1, 2)
"""Sixteenths of a history by which more points lie beside the planner's choice."""
USUAL = 3
"""Restores whose choices, from the least to the most, count as the same."""


@dataclass(frozen=True)
class Sample:
    """One return of a conversation.

    forced: position that was asked for, None for the planner's choice. load: tokens that were
    loaded. chosen: what the planner would have loaded. ttft: seconds at the client. predicted,
    makespan: seconds from the first load to the end of the forward pass; where nothing was
    loaded, of the pass. computing: seconds of the pass, waiting not counted. load_bubble,
    compute_bubble: seconds that a stream stood idle, None where nothing was loaded. expected:
    ``[position, seconds]`` by the cost model when it was planned. believed: bytes a second of
    the link by the cost model afterwards.
    """

    number: int
    forced: int | None
    load: int
    chosen: int
    ttft: float
    predicted: float
    makespan: float
    computing: float | None
    load_bubble: float | None
    compute_bubble: float | None
    stored_bytes: int
    expected: Sequence[Sequence[float]]
    believed: float

    @property
    def error(self) -> float:
        """How far the prediction was off, as a share of what was measured."""
        return self.predicted / self.makespan - 1


def points(history: int, count: int) -> list[int]:
    """``count`` positions from 0 to the history's end, in whole pages, evenly spaced."""
    end = history // PAGE
    return sorted({round(end * i / (count - 1)) * PAGE for i in range(count)})


def beside(load: int, history: int) -> list[int]:
    """Positions around ``load``, in whole pages of a history."""
    end = history // PAGE * PAGE
    near = (round((load + by * history / 16) / PAGE) * PAGE for by in NEAR)
    return sorted({position for position in near if 0 <= position <= end})


def link_seconds(load: int, history: int, stored_bytes: float, rate: float) -> float:
    """What the link alone takes at least: the first tokens of a history are stored exactly, so
    its bytes lie in front rather than behind."""
    return load / history * stored_bytes / rate


def hopeless(
    loads: Sequence[int], history: int, stored_bytes: float, rate: float, best: float
) -> dict[int, float]:
    """Points that need not be measured, because the link alone takes :data:`SKIP` times the
    best time known, and what it takes."""
    seconds = {load: link_seconds(load, history, stored_bytes, rate) for load in loads}
    return {load: took for load, took in seconds.items() if took > SKIP * best}


def conclude(
    own: Sequence[Sample], forced: Sequence[Sample], skipped: dict[int, float]
) -> dict[str, Any]:
    """Figures of a setting, from the planner's samples and the forced ones.

    The best point is the one with the least median. ``round_ratios`` compares each of the
    planner's samples with that point in the same round: their spread is the noise of ``ratio``.
    """
    by_load: dict[int, list[Sample]] = {}
    for sample in forced:
        assert sample.forced is not None
        by_load.setdefault(sample.forced, []).append(sample)
    medians = {
        load: statistics.median(s.ttft for s in samples) for load, samples in by_load.items()
    }
    best = min(medians, key=lambda load: medians[load])
    planner = statistics.median(sample.ttft for sample in own)
    of_round = {sample.number: sample.ttft for sample in by_load[best]}
    rounds = [sample.ttft / of_round[sample.number] for sample in own]
    ratio = planner / medians[best]
    traced = [sample for sample in own if sample.load_bubble is not None]
    return {
        "best_load": best,
        "best_p50": medians[best],
        "planner_load": statistics.median_low(sample.load for sample in own),
        "planner_p50": planner,
        "ratio": ratio,
        "round_ratios": rounds,
        "within": ratio <= CLAIM,
        "undecided": _middle(rounds)[0] <= CLAIM < _middle(rounds)[1],
        "prediction_error": max((sample.error for sample in own), key=abs),
        "bubble_share": {
            lane: statistics.median(getattr(s, f"{lane}_bubble") / s.makespan for s in traced)
            if traced
            else None
            for lane in ("load", "compute")
        },
        "planner": times([s.ttft for s in own]) | {"samples": [asdict(s) for s in own]},
        "points": [
            {"load": load}
            | times([sample.ttft for sample in samples])
            | {"samples": [asdict(sample) for sample in samples]}
            for load, samples in sorted(by_load.items())
        ],
        "skipped": [{"load": load, "link_seconds": took} for load, took in sorted(skipped.items())],
    }


def _middle(values: Sequence[float]) -> tuple[float, float]:
    """Where the middle half of them lies."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4)
    return low, high


def moved_after(before: Sequence[Sample], after: Sequence[Sample]) -> int | None:
    """How many restores it took until the choice was none of the last few before; 2 means that
    the second one after the change differed. None if it never did."""
    usual = [sample.load for sample in before[-USUAL:]]
    changed = (n for n, s in enumerate(after, 1) if not min(usual) <= s.load <= max(usual))
    return next(changed, None)


def settled_after(after: Sequence[Sample]) -> int:
    """From which restore on all choices are the last one, but for a few tokens."""
    far = (n for n, s in enumerate(after, 1) if abs(s.load - after[-1].load) > FEW)
    return 1 + max(far, default=0)
