"""The rounds of benchmarks/restore.py: servers side by side, asked in turns, cell by cell."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hicache_cpu
import psutil
from restore_cells import UNTHROTTLED, Bandwidth, Cell, Results, agreement, times
from restore_peers import HICACHE, KRUL, RECOMPUTE, Answer, Peer, Shape, token_bytes
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from server_plugin import as_plugin

from krul_sglang.live_server import ServerFailedError

SERVER_BYTES = 2.4e9
"""What a server of a small model takes of the machine's memory, without any KV."""
SPARE_BYTES = 1e9


@dataclass(frozen=True)
class Prompts:
    """Token ids: two conversations as long as any history, and new turns."""

    conversations: Sequence[Sequence[int]]
    turns: Sequence[Sequence[int]]

    def of(self, number: int, history: int) -> list[int]:
        """The prompt of a round; conversations alternate, so that each was just evicted."""
        past = self.conversations[number % len(self.conversations)][:history]
        return [*past, *self.turns[number % len(self.turns)]]


@dataclass(frozen=True)
class Plan:
    """What is asked for. dtype: of model and KV; recompute: --krul-recompute of the policies
    that may; turn, answer: tokens; alive: servers side by side besides `recompute`, None for what
    fits into memory."""

    model: Path
    dtype: str
    profile: Path | None
    recompute: str
    longest: int
    """Tokens of the longest history the model takes."""
    histories: Sequence[int]
    bandwidths: Sequence[Bandwidth]
    policies: Sequence[str]
    repeats: int
    turn: int
    answer: int
    alive: int | None
    p99_cells: Sequence[Cell]
    p99_repeats: int

    def repeats_of(self, cell: Cell) -> int:
        """How often a cell is measured."""
        return self.p99_repeats if cell in self.p99_cells else self.repeats

    def settings(self) -> dict[str, Any]:
        """What all cells of a file have in common."""
        names = ("dtype", "recompute", "repeats", "turn", "answer")
        return {"model": self.model.name} | {name: getattr(self, name) for name in names}


@dataclass
class Series:
    """A peer and its samples of one cell. rate: bytes a second."""

    peer: Peer
    cell: Cell
    rate: float | None
    repeats: int
    samples: list[Answer] = field(default_factory=list)
    before: dict[str, Any] = field(default_factory=dict)
    """The krul block when the rounds began."""
    failure: str | None = None


class Benchmark:
    """Carries out a plan. ``failures`` counts the cells that are errors."""

    def __init__(self, plan: Plan, results: Results, prompts: Prompts, console: Console) -> None:
        self.plan = plan
        self.results = results
        self.prompts = prompts
        self.failures = 0
        self._console = console
        self._plugin: dict[str, str] = {}
        self._token_bytes = token_bytes(plan.model, plan.dtype)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None)

    def run(self) -> None:
        """Measure every cell that the file does not have yet."""
        todo = {history: self._requests(history) for history in self.plan.histories}
        self._bar.update(self._task, total=sum(h * count for h, count in todo.items()))
        with as_plugin(hicache_cpu) as self._plugin, self._bar:
            for history, count in todo.items():
                if count:
                    self._measure_history(history)

    # ---- what is left to do ----------------------------------------------------

    def _known(self, cell: Cell) -> dict[str, Any] | None:
        """The cell's row, if it was measured as often as it is asked for."""
        row = self.results.find(cell)
        return row if row and row["repeats"] >= self.plan.repeats_of(cell) else None

    def _missing(self, history: int, bandwidth: Bandwidth) -> list[Cell]:
        cells = (Cell(policy, history, bandwidth.name) for policy in self.plan.policies)
        return [c for c in cells if c.policy != RECOMPUTE and self._known(c) is None]

    def _requests(self, history: int) -> int:
        """Requests of this history that are still to be sent."""
        reference = Cell(RECOMPUTE, history, UNTHROTTLED.name)
        total = 0
        if self._known(reference) is None:
            total = 1 + self.plan.repeats_of(reference)
        for bandwidth in self.plan.bandwidths:
            for cell in self._missing(history, bandwidth):
                total += len(self.prompts.conversations) + 1 + self.plan.repeats_of(cell)
        return total

    # ---- one history -----------------------------------------------------------

    def _measure_history(self, history: int) -> None:
        """`recompute` first, because the balanced rate follows from it; it stays up, and is
        asked again among the others, so that its figure spans the same stretch of time."""
        reference = self._series(Cell(RECOMPUTE, history, UNTHROTTLED.name), None)
        known = self._known(reference.cell)
        with self._live([reference]):
            if known is None:
                self._rounds([reference], None)
                known = self._put(reference, [])
                if reference.failure:
                    return
            reference.samples = [Answer(**sample) for sample in known["samples"]]
            for bandwidth in self.plan.bandwidths:
                rate = bandwidth.rate(known["balanced"])
                missing = self._missing(history, bandwidth)
                alive = self.plan.alive or self._fitting(history)
                for first in range(0, len(missing), alive):
                    group = missing[first : first + alive]
                    self._measure([self._series(cell, rate) for cell in group], reference)
                    if reference.failure is None:
                        self._put(reference, [])
                    else:  # what the file has of it stays
                        self._console.print(f"recompute was not asked again: {reference.failure}")

    def _fitting(self, history: int) -> int:
        """Servers for which there is memory now, each with its pool and two kept histories."""
        each = SERVER_BYTES + 3 * self._raw_bytes(history)
        return max(1, int((psutil.virtual_memory().available - SPARE_BYTES) / each))

    def _measure(self, group: Sequence[Series], reference: Series) -> None:
        with self._live(group):
            for past in self.prompts.conversations:
                ids = past[: group[0].cell.history]
                self._each(group, lambda one, ids=ids: one.peer.ask(ids, self.plan.answer))
            self._rounds(group, reference)
            outputs = [sample.output for sample in reference.samples]
            for one in group:
                self._put(one, outputs)

    def _rounds(self, group: Sequence[Series], reference: Series | None) -> None:
        """Every conversation was computed, the first was evicted. Round 0 warms up."""
        history, answer = group[0].cell.history, self.plan.answer

        def ask(one: Series, number: int) -> Answer:
            if number:
                one.peer.leave_memory()
            given = one.peer.ask(self.prompts.of(number, history), answer)
            problem = given.problem(one.cell.policy, one.peer.shape)
            if problem:
                raise OSError(problem)
            return given

        def warm_up(one: Series) -> None:
            ask(one, 0)
            one.before = one.peer.krul()

        self._each(group, warm_up)
        for number in range(1, 1 + max(one.repeats for one in group)):
            first = number % len(group)  # nobody always follows the same neighbour
            order = [s for s in [*group[first:], *group[:first]] if number <= s.repeats]
            self._each(order, lambda one, n=number: one.samples.append(ask(one, n)))
            if reference is not None and number == 1 + self.plan.repeats // 2:
                again = 1 + len(reference.samples)
                self._each([reference], lambda one, n=again: one.samples.append(ask(one, n)))

    # ---- servers ---------------------------------------------------------------

    def _series(self, cell: Cell, rate: float | None) -> Series:
        plan = self.plan
        shape = Shape(cell.history, plan.turn, plan.answer)
        peer = Peer(
            cell.policy,
            plan.model,
            shape,
            plan.dtype,
            bandwidth=rate,
            recompute=plan.recompute,
            profile=plan.profile,
            plugin=self._plugin,
        )
        return Series(peer, cell, rate, plan.repeats_of(cell))

    @contextmanager
    def _live(self, group: Sequence[Series]) -> Iterator[None]:
        """Servers up, as many starting at a time as there are cores; down in the end."""

        def start(one: Series) -> None:
            try:
                one.peer.start()
            except (ServerFailedError, OSError) as error:
                one.failure = str(error)

        what = f"{group[0].cell.history} tokens, {group[0].cell.bandwidth}: starting servers"
        self._bar.update(self._task, description=what)
        with ExitStack() as stack:
            for one in group:
                stack.callback(one.peer.stop)
            with ThreadPoolExecutor(os.cpu_count()) as starters:
                try:
                    list(starters.map(start, group))
                except BaseException:  # Ctrl-C: the pool would wait until they are up
                    for one in group:
                        one.peer.stop()
                    raise
            yield

    def _each(self, group: Sequence[Series], action: Callable[[Series], Any]) -> None:
        """One request of every peer that has not failed."""
        for one in group:
            if one.failure is None:
                cell = one.cell
                what = f"{cell.history} tokens, {cell.bandwidth}: {cell.policy}"
                self._bar.update(self._task, description=what)
                try:
                    action(one)
                except OSError as error:  # requests' errors are
                    one.failure = str(error)
            self._bar.advance(self._task, one.cell.history)

    # ---- rows ------------------------------------------------------------------

    def _raw_bytes(self, history: int) -> int:
        return Shape(history, self.plan.turn, self.plan.answer).pages * self._token_bytes

    def _put(self, one: Series, reference: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The cell's row, in the file and on the console."""
        row: dict[str, Any] = {
            "policy": one.cell.policy,
            "history": one.cell.history,
            "bandwidth": one.rate,
            "bandwidth_name": one.cell.bandwidth,
        }
        try:
            if one.failure is None:
                row |= self._figures(one, reference)
        except OSError as error:
            one.failure = str(error)
        if one.failure is None:
            said = f"{row['ttft_p50']:.2f} s ({row['ttft_min']:.2f} - {row['ttft_max']:.2f})"
        else:
            self.failures += 1
            row["error"] = one.failure
            said = f"[red]error:[/] {one.failure}"
        self.results.put(row)
        self._console.print(
            f"{one.cell.history:5} {one.cell.bandwidth:12} {one.cell.policy:13} {said}",
            highlight=False,
        )
        return row

    def _figures(self, one: Series, reference: Sequence[Sequence[int]]) -> dict[str, Any]:
        history, policy, samples = one.cell.history, one.cell.policy, one.samples
        raw = self._raw_bytes(history)
        stored: float = raw if policy in HICACHE else 0
        bubbles = None
        if policy in KRUL:
            after, before = one.peer.krul(), one.before
            # Of all that is stored (both histories, short turns), one history's share.
            stored = before["stored_bytes"] / before["stored_tokens"] * one.peer.shape.pages
            if "restore" in after:
                ours, theirs = (block["restore"]["bubble_seconds"] for block in (after, before))
                bubbles = {name: (ours[name] - theirs[name]) / len(samples) for name in ours}
        computed = statistics.median(sample.recomputed for sample in samples)
        row = {
            **times([sample.ttft for sample in samples]),
            "stored_bytes": round(stored),
            "raw_bytes": raw,
            "restored_tokens": statistics.median(s.host + s.storage for s in samples),
            "recomputed_tokens": history if policy == RECOMPUTE else computed,
            "bubble_s": bubbles,
            "agreement": agreement([sample.output for sample in samples], reference),
            "samples": [vars(sample) for sample in samples],
        }
        if policy == RECOMPUTE:  # later samples leave the rate as it is
            first = [sample.ttft for sample in samples[: one.repeats]]
            row["balanced"] = raw / statistics.median(first)
        return row
