"""The measurements of benchmarks/plan_choice.py: one live server, asked setting by setting."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from plan_cells import (
    NEAR,
    USUAL,
    Sample,
    beside,
    conclude,
    hopeless,
    moved_after,
    points,
    settled_after,
)
from plan_returns import MEMORY, PHASES, REFERENCES, Plan, Returns, Steered
from restore_cells import UNTHROTTLED, Bandwidth, Cell, Results
from restore_peers import RECOMPUTE, token_bytes
from restore_plan import Prompts
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

CUT = 10
"""The link is cut to this part of its rate."""


class Benchmark:
    """Carries out a plan. ``failures`` counts the rows that are errors."""

    def __init__(self, plan: Plan, results: Results, prompts: Prompts, console: Console) -> None:
        self.plan, self.results = plan, results
        self.failures = 0
        self._prompts = prompts
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("starting the server", total=None)

    def run(self) -> None:
        """Measure every row that the file does not have yet."""
        left = {history: self._left(history) for history in self.plan.histories}
        if not any(left.values()):
            return
        with self._bar, Steered.up(self.plan) as server:
            self._bar.update(self._task, total=sum(h * n for h, n in left.items()))
            for history in (history for history, count in left.items() if count):
                self._measure_history(server, history)

    # ---- what is left to do ----------------------------------------------------

    def _missing(self, history: int) -> list[Bandwidth]:
        cells = ((b, Cell(self.plan.policy, history, b.name)) for b in self.plan.bandwidths)
        return [bandwidth for bandwidth, cell in cells if not self.results.find(cell)]

    def _cut_is_missing(self, history: int) -> bool:
        cell = Cell(self.plan.policy, history, self.plan.cut_name())
        return history == self.plan.cut_history and not self.results.find(cell)

    def _left(self, history: int) -> int:
        """Requests of this history that are still to be sent, at most."""
        plan = self.plan
        each = plan.warm_up + plan.repeats_of(history) * (2 + plan.points + len(NEAR))
        count = len(self._missing(history)) * each
        count += sum(PHASES.values()) * self._cut_is_missing(history)
        known = self.results.find(Cell(RECOMPUTE, history, UNTHROTTLED.name))
        return count and count + len(self._prompts.conversations) + REFERENCES * (not known)

    # ---- one history -----------------------------------------------------------

    def _measure_history(self, server: Steered, history: int) -> None:
        self._bar.update(self._task, description=f"{history} tokens: storing conversations")
        returns = Returns(server, self.plan, self._prompts, history)
        returns.store()
        self._advance(history, len(self._prompts.conversations))
        reference = self._reference(returns, history)
        if reference is None:
            return
        best = reference["ttft_p50"]
        for bandwidth in self._missing(history):
            cell = Cell(self.plan.policy, history, bandwidth.name)
            rate = bandwidth.rate(reference["balanced"])
            self._row(cell, rate, lambda rate=rate: self._choice(returns, history, rate, best))
        if self._cut_is_missing(history):
            cell = Cell(self.plan.policy, history, self.plan.cut_name())
            rate = self.plan.cut_bandwidth.rate(reference["balanced"]) or MEMORY
            self._row(cell, rate, lambda: self._cut(returns, rate))

    def _reference(self, returns: Returns, history: int) -> dict[str, Any] | None:
        """What recomputing takes, from the file or measured now."""
        cell = Cell(RECOMPUTE, history, UNTHROTTLED.name)
        known = self.results.find(cell)
        if known is None:

            def measure() -> dict[str, Any]:
                samples = [returns(None, number, forced=0) for number in range(REFERENCES)]
                self._advance(history, REFERENCES)
                median = statistics.median(sample.ttft for sample in samples)
                raw = history * token_bytes(self.plan.model, self.plan.dtype)
                said = {"ttft_p50": median, "raw_bytes": raw, "balanced": raw / median}
                return said | {"samples": [asdict(sample) for sample in samples]}

            self._row(cell, None, measure)
            known = self.results.find(cell)
        return known

    def _choice(
        self, returns: Returns, history: int, rate: float | None, recompute: float
    ) -> dict[str, Any]:
        """The planner against every point, evenly spaced ones and some beside its choice, in
        turns; its place in a round changes."""
        plan = self.plan
        warm = [returns(rate, n, relearn=n == 0) for n in range(plan.warm_up)]
        self._advance(history, plan.warm_up)
        stored = warm[-1].stored_bytes
        best = min([recompute, *(sample.ttft for sample in warm)])
        choice = statistics.median_low(sample.load for sample in warm[-USUAL:])
        returns.points = sorted({*points(history, plan.points), *beside(choice, history)})
        skipped = hopeless(returns.points, history, stored, rate or MEMORY, best)
        tried = [load for load in returns.points if load not in skipped]
        half = len(tried) // 2
        asked = [None, *tried[:half], None, *tried[half:]]  # the planner is asked twice a round
        found: list[Sample] = []
        rounds = plan.repeats_of(history)
        for number in range(rounds):
            first = number * len(asked) // rounds
            for forced in [*asked[first:], *asked[:first]]:
                found.append(returns(rate, number, forced))
                self._advance(history, 1)
            self._advance(history, plan.points + len(NEAR) - len(tried))
        own = [sample for sample in found if sample.forced is None]
        forced_ones = [sample for sample in found if sample.forced is not None]
        figures = conclude(own, forced_ones, skipped)
        return figures | {
            "stored_bytes": stored,
            "warm_up": [asdict(sample) for sample in warm],
        }

    def _cut(self, returns: Returns, rate: float) -> dict[str, Any]:
        """The link becomes ten times slower, unannounced, and then what it was."""
        found: dict[str, list[Sample]] = {}
        number = 0
        for phase, count in PHASES.items():
            link = rate / CUT if phase == "cut" else rate
            found[phase] = []
            for _ in range(count):
                found[phase].append(returns(link, number, relearn=number == 0))
                self._advance(self.plan.cut_history or 0, 1)
                number += 1
        return {
            "moved_after": moved_after(found["before"], found["cut"]),
            "settled_after": settled_after(found["cut"]),
            "moved_back_after": moved_after(found["cut"], found["back"]),
            "settled_back_after": settled_after(found["back"]),
            "phases": {phase: [asdict(s) for s in samples] for phase, samples in found.items()},
        }

    # ---- rows ------------------------------------------------------------------

    def _row(self, cell: Cell, rate: float | None, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure a row and write it: what ``measure`` returns, or its error."""
        self._bar.update(self._task, description=f"{cell.history} tokens, {cell.bandwidth}")
        row = {
            "policy": cell.policy,
            "history": cell.history,
            "bandwidth": rate,
            "bandwidth_name": cell.bandwidth,
        }
        try:
            row |= measure()
        except OSError as error:  # requests' errors are
            self.failures += 1
            row["error"] = str(error)
        self.results.put(row)
        self._console.print(line(row), highlight=False)

    def _advance(self, history: int, count: int) -> None:
        self._bar.advance(self._task, history * count)


def line(row: dict[str, Any]) -> str:
    """A row in a line."""
    begin = f"{row['history']:5} {row['bandwidth_name']:24}"
    if "error" in row:
        return f"{begin} error: {row['error']}"
    if "balanced" in row:
        return f"{begin} recomputed in {row['ttft_p50']:.2f} s"
    if "phases" in row:
        loads = {name: [s["load"] for s in samples] for name, samples in row["phases"].items()}
        told = "; ".join(f"{name} {' '.join(map(str, found))}" for name, found in loads.items())
        return f"{begin} loaded {told}"
    low, high = min(row["round_ratios"]), max(row["round_ratios"])
    return (
        f"{begin} best {row['best_p50']:.2f} s at {row['best_load']}, planner "
        f"{row['planner_p50']:.2f} s at {row['planner_load']}: {row['ratio']:.3f} "
        f"({low:.3f} - {high:.3f}), predicted {row['prediction_error']:+.0%}"
    )
