"""The rounds of benchmarks/restore.py: servers side by side, asked in turns, at one bandwidth after
the other."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import hicache_cpu
import krul_link
import psutil
from restore_cells import UNTHROTTLED, Bandwidth, Cell, Results, agreement, times
from restore_peers import (
    HICACHE,
    KRUL,
    PAGE,
    RECOMPUTE,
    Answer,
    Peer,
    Shape,
    may_recompute,
    token_bytes,
)
from restore_plan import WARM_UP, Plan, Prompts
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from server_plugin import as_plugin

from krul_sglang.live_server import ServerFailedError

SERVER_BYTES = 2.4e9
"""What a server of a small model takes of the machine's memory, without any KV."""
SPARE_BYTES = 1e9


@dataclass
class Series:
    """A peer and its samples of one cell. rate: bytes a second."""

    peer: Peer
    cell: Cell
    rate: float | None
    repeats: int
    samples: list[Answer] = field(default_factory=list)
    outputs: dict[int, list[int]] = field(default_factory=dict)
    """By number of the round."""
    before: dict[str, Any] = field(default_factory=dict)
    """The krul block when the rounds began."""
    after: dict[str, Any] = field(default_factory=dict)
    """And when they had ended."""


class Benchmark:
    """Carries out a plan. ``failures`` counts the cells that are errors."""

    def __init__(self, plan: Plan, results: Results, prompts: Prompts, console: Console) -> None:
        self.plan = plan
        self.results = results
        self.prompts = prompts
        self.failures = 0
        self._console = console
        self._plugins: dict[str, dict[str, str]] = {}
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
        with as_plugin(hicache_cpu) as hicache, as_plugin(krul_link) as krul, self._bar:
            self._plugins = dict.fromkeys(HICACHE, hicache) | dict.fromkeys(KRUL, krul)
            for history, count in todo.items():
                if count:
                    self._measure_history(history)

    # ---- what is left to do ----------------------------------------------------

    def _known(self, cell: Cell) -> dict[str, Any] | None:
        """The cell's row, if it was measured as often as it is asked for, beside `recompute`."""
        row = self.results.find(cell)
        if row is None or row["repeats"] < self.plan.repeats_of(cell):
            return None
        return None if row["agreement"] is None and cell.policy != RECOMPUTE else row

    def _missing(self, policy: str, history: int) -> dict[Bandwidth, Cell]:
        if policy == RECOMPUTE:
            return {}
        cells = {b: Cell(policy, history, b.name) for b in self.plan.bandwidths}
        return {b: cell for b, cell in cells.items() if self._known(cell) is None}

    def _requests(self, history: int) -> int:
        """Requests of this history that are still to be sent, nearly."""
        reference = Cell(RECOMPUTE, history, UNTHROTTLED.name)
        total = 0
        if self._known(reference) is None:
            total = WARM_UP + self.plan.repeats_of(reference)
        asked_again = set()
        for policy in self.plan.policies:
            missing = self._missing(policy, history)
            asked_again |= set(missing)
            total += len(self.prompts.conversations) * bool(missing)
            for nth, cell in enumerate(missing.values()):
                warms_up = nth == 0 or may_recompute(policy)
                total += WARM_UP * warms_up + self.plan.repeats_of(cell)
        return total + self.plan.repeats * len(asked_again)

    # ---- one history -----------------------------------------------------------

    def _measure_history(self, history: int) -> None:
        """`recompute` first, because the balanced rate follows from it; it stays up, and is
        asked again with the others, so that its figure spans the same stretch of time."""
        reference = self._series(self._peer(RECOMPUTE, history), UNTHROTTLED, None)
        known = self._known(reference.cell)
        with self._live([reference.peer]):
            if known is None:
                self._rounds([reference], None, 0)
                known = self._put(reference)
                if reference.peer.failure:
                    return
            else:
                self._each_series([reference], "warming up", lambda one: self._ask(one, 1))
            reference.samples = [Answer(**sample) for sample in known["samples"]]
            policies = [p for p in self.plan.policies if self._missing(p, history)]
            alive = self.plan.alive or self._fitting(history)
            for first in range(0, len(policies), alive):
                peers = [self._peer(policy, history) for policy in policies[first : first + alive]]
                self._measure(peers, reference, known["balanced"])

    def _fitting(self, history: int) -> int:
        """Servers for which there is memory now, each with its pool and all that is kept."""
        shape = self._shape(history)
        each = SERVER_BYTES + (shape.pool + shape.kept) * self._token_bytes
        return max(1, int((psutil.virtual_memory().available - SPARE_BYTES) / each))

    def _measure(self, peers: Sequence[Peer], reference: Series, balanced: float) -> None:
        """The peers side by side, at one bandwidth after the other."""
        history = reference.cell.history
        begin = 0
        left = list(peers)
        with self._live(peers):
            for number in range(len(self.prompts.conversations)):
                what = f"{history} tokens: storing a conversation"
                self._each(peers, what, lambda peer, n=number: self._pass_by(peer, n))
            for bandwidth in self.plan.bandwidths:
                rate = bandwidth.rate(balanced)
                missing = (p for p in left if bandwidth in self._missing(p.policy, history))
                series = [self._series(peer, bandwidth, rate) for peer in missing]
                if series:
                    begin = self._rounds(series, reference, begin)
                    for one in series:
                        self._put(one, reference.outputs)
                    # What failed has one error; its other cells stay to be measured.
                    left = [peer for peer in left if peer.failure is None]
                    if reference.peer.failure is None:
                        self._put(reference)
                    else:  # what the file has of it stays; cells without it are measured again
                        self.failures += 1
                        said = f"recompute was not asked again: {reference.peer.failure}"
                        self._console.print(said)

    def _rounds(self, group: Sequence[Series], reference: Series | None, begin: int) -> int:
        """Rounds from number ``begin`` on, of which the first :data:`WARM_UP` are not measured;
        returns the number after the last."""
        what = f"{group[0].cell.history} tokens, {group[0].cell.bandwidth}"
        self._each_series(group, what, lambda one: one.peer.throttle(one.rate))
        warming = [s for s in group if s.peer.kept is None or may_recompute(s.peer.policy)]
        for number in range(begin, begin + WARM_UP):
            self._each_series(warming, what, lambda one, n=number: self._ask(one, n))

        def look(one: Series) -> None:
            self._evict(one.peer, begin)
            one.before = one.peer.krul()
            if one.peer.kept is None:
                one.peer.kept = one.before

        def measure(one: Series, number: int) -> None:
            given = self._ask(one, number)
            one.samples.append(given)
            one.outputs[number] = given.output

        begin += WARM_UP
        self._each_series(group, what, look)
        end = begin + max(one.repeats for one in group)
        for number in range(begin, end):
            first = number % len(group)  # nobody always follows the same neighbour
            order = [*group[first:], *group[:first]]
            if reference is not None:
                order.insert(number % (len(order) + 1), reference)
            asked = [s for s in order if number - begin < s.repeats]
            self._each_series(asked, what, lambda one, n=number: measure(one, n))
        self._each_series(group, what, lambda one: setattr(one, "after", one.peer.krul()))
        return end

    def _ask(self, one: Series, number: int) -> Answer:
        """Raises OSError when the answer is no measurement of the policy."""
        peer, history = one.peer, one.cell.history
        self._evict(peer, number)
        peer.leave_memory()
        given = self._send(peer, number, self.prompts.of(number, history))
        problem = given.problem(peer.policy, peer.shape)
        if problem:
            raise OSError(problem)
        return given

    def _evict(self, peer: Peer, number: int) -> None:
        """See to it that the conversation of a round is not on the device: the last one is."""
        turns = len(self.prompts.conversations)
        if peer.asked is not None and peer.asked % turns == number % turns:
            self._pass_by(peer, number + 1)
        if may_recompute(peer.policy):  # a head of few tokens finds room beside the other one
            peer.leave_device()

    def _pass_by(self, peer: Peer, number: int) -> None:
        """Ask the conversation of a round without a turn."""
        self._send(peer, number, self.prompts.past(number, peer.shape.history))

    def _send(self, peer: Peer, number: int, ids: Sequence[int]) -> Answer:
        peer.asked = number
        given = peer.ask(ids, self.plan.answer)
        # The answer's last token is sampled, its KV never computed.
        peer.cached = (len(ids) + self.plan.answer - 1) // PAGE * PAGE
        self._bar.advance(self._task, peer.shape.history)
        return given

    # ---- servers ---------------------------------------------------------------

    def _peer(self, policy: str, history: int) -> Peer:
        plan = self.plan
        return Peer(
            policy,
            plan.model,
            self._shape(history),
            plan.dtype,
            recompute=plan.recompute,
            profile=plan.profile,
            plugin=self._plugins.get(policy, {}),
        )

    def _shape(self, history: int) -> Shape:
        return Shape(history, self.plan.turn, self.plan.answer, self.plan.turns)

    def _series(self, peer: Peer, bandwidth: Bandwidth, rate: float | None) -> Series:
        cell = Cell(peer.policy, peer.shape.history, bandwidth.name)
        return Series(peer, cell, rate, self.plan.repeats_of(cell))

    @contextmanager
    def _live(self, peers: Sequence[Peer]) -> Iterator[None]:
        """Servers up, as many starting at a time as there are cores; down in the end."""

        def start(peer: Peer) -> None:
            try:
                peer.start()
            except (ServerFailedError, OSError) as error:
                peer.failure = str(error)

        def end() -> None:
            with ThreadPoolExecutor(len(peers)) as enders:
                list(enders.map(Peer.stop, peers))

        what = f"{peers[0].shape.history} tokens: starting servers"
        self._bar.update(self._task, description=what)
        starters = ThreadPoolExecutor(os.cpu_count())
        starts = [starters.submit(start, peer) for peer in peers]
        try:
            for begun in starts:
                begun.result()
            yield
        finally:
            starters.shutdown(wait=False, cancel_futures=True)
            end()
            while late := [begun for begun in starts if not begun.done()]:  # Ctrl-C: just begun
                wait(late, timeout=0.2)
                end()

    def _each(self, peers: Sequence[Peer], what: str, action: Callable[[Peer], Any]) -> None:
        """One request of every peer that has not failed."""
        for peer in peers:
            if peer.failure is None:
                self._bar.update(self._task, description=f"{what}: {peer.policy}")
                try:
                    action(peer)
                except OSError as error:  # requests' errors are
                    peer.failure = str(error)
                    peer.stop()  # it would take cores from the others

    def _each_series(
        self, group: Sequence[Series], what: str, action: Callable[[Series], Any]
    ) -> None:
        of = {one.peer: one for one in group}
        self._each(list(of), what, lambda peer: action(of[peer]))

    # ---- rows ------------------------------------------------------------------

    def _raw_bytes(self, history: int) -> int:
        return history // PAGE * PAGE * self._token_bytes

    def _put(self, one: Series, reference: Mapping[int, list[int]] | None = None) -> dict[str, Any]:
        """The cell's row, in the file and on the console. reference: `recompute`'s outputs by
        number of the round."""
        row: dict[str, Any] = {
            "policy": one.cell.policy,
            "history": one.cell.history,
            "bandwidth": one.rate,
            "bandwidth_name": one.cell.bandwidth,
        }
        failure = one.peer.failure
        if failure is None:
            row |= self._figures(one, reference or {})
            said = f"{row['ttft_p50']:.2f} s ({row['ttft_min']:.2f} - {row['ttft_max']:.2f})"
        else:
            self.failures += 1
            row["error"] = failure
            said = f"[red]error:[/] {failure.splitlines()[0]}"  # the file has the rest
        if failure is None or self.results.find(one.cell) is None:
            self.results.put(row)
        self._console.print(
            f"{one.cell.history:5} {one.cell.bandwidth:12} {one.cell.policy:13} {said}",
            highlight=False,
        )
        return row

    def _figures(self, one: Series, reference: Mapping[int, list[int]]) -> dict[str, Any]:
        history, policy, samples = one.cell.history, one.cell.policy, one.samples
        raw = self._raw_bytes(history)
        stored: float = raw if policy in HICACHE else 0
        bubbles = None
        if policy in KRUL:
            after, before, kept = one.after, one.before, one.peer.kept
            # Of all that is stored (both histories, short turns), one history's share.
            stored = kept["stored_bytes"] / kept["stored_tokens"] * one.peer.shape.pages
            if "restore" in after:
                ours, theirs = (block["restore"]["bubble_seconds"] for block in (after, before))
                bubbles = {name: (ours[name] - theirs[name]) / len(samples) for name in ours}
        computed = statistics.median(sample.recomputed for sample in samples)
        asked = [number for number in one.outputs if number in reference]
        row = {
            **times([sample.ttft for sample in samples]),
            "stored_bytes": round(stored),
            "raw_bytes": raw,
            "restored_tokens": statistics.median(s.host + s.storage for s in samples),
            "recomputed_tokens": history if policy == RECOMPUTE else computed,
            "bubble_s": bubbles,
            "agreement": agreement([one.outputs[n] for n in asked], [reference[n] for n in asked]),
            "samples": [vars(sample) for sample in samples],
        }
        if policy == RECOMPUTE:  # later samples leave the rate as it is
            first = [sample.ttft for sample in samples[: one.repeats]]
            row["balanced"] = raw / statistics.median(first)
        return row
