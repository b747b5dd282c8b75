"""One line at INFO for each burst of evictions and for each restore, for operators to read and
to search: ``krul evict`` or ``krul restore``, then ``name=value`` pairs.

Lines are written between two steps of the scheduler, never while something waits. Evictions come
in bursts, as few tokens at a time as a decoding step needs, so a line covers all of a burst, and
tells what became of its segments. Restores are one line a forward pass, at most
:data:`RESTORE_LINES` a second: what comes faster is summed up in the next line.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from krul_sglang.restore.pipeline import MEMORY
from krul_sglang.store.segment import SegmentState
from krul_sglang.store.slots import slot_runs

if TYPE_CHECKING:
    import torch

    from krul_sglang.restore.trace import RestoreTrace
    from krul_sglang.runtime.state import Counters
    from krul_sglang.store.memory import MemoryStore

logger = logging.getLogger(__name__)

QUIET_SECONDS = 1.0
"""A burst is over when nothing was evicted for so long,"""
BURST_SECONDS = 10.0
"""or when it has lasted so long."""
SEAL_SECONDS = 5.0
"""How much longer a line waits for the burst's segments to be encoded."""
RESTORE_LINES = 10


@dataclass
class _Evictions:
    """A burst. ids: slot ids of what was stored, int64, one tensor a node."""

    began: float
    last: float
    calls: int = 0
    seconds: float = 0.0
    ids: list[torch.Tensor] = field(default_factory=list)


@dataclass
class _Restores:
    """Passes that share a line."""

    passes: int = 0
    requests: int = 0
    tokens: int = 0
    recomputed: int = 0
    new: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    expected: float = 0.0
    wait: float = 0.0
    load_idle: float = 0.0
    compute_idle: float = 0.0
    failed: int = 0
    tiers: set[str] = field(default_factory=set)
    codecs: set[str] = field(default_factory=set)


class Journal:
    """One rank's lines. Scheduler thread only."""

    def __init__(
        self,
        store: MemoryStore,
        counters: Counters,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._counters = counters
        self._clock = clock
        self._evictions: _Evictions | None = None
        self._restores: _Restores | None = None
        self._restored_at = float("-inf")
        self._dropped = self._unstored = 0

    # ---- what happens ----------------------------------------------------------

    def stored(self, ids: torch.Tensor) -> None:
        """A node left the device for the store, under these slot ids (int64 ``[n]``)."""
        self._burst().ids.append(ids)

    def evicted(self, seconds: float) -> None:
        """The cache was asked to evict, and that took so long."""
        counters = self._counters
        burst = self._evictions
        if burst is None and self._lost(counters) == (0, 0):
            return  # nothing was to be evicted
        burst = self._burst()
        burst.calls += 1
        burst.seconds += seconds

    def restored(self, trace: RestoreTrace, loads: Iterable[Any]) -> None:
        """A forward pass and the :class:`~krul_sglang.restore.pipeline.Load`s it waited for."""
        one = self._restores = self._restores or _Restores()
        one.passes += 1
        one.tokens += trace.tokens
        one.recomputed += trace.recomputed
        one.new += trace.new
        one.nbytes += trace.stored_bytes
        one.seconds += trace.makespan
        one.expected += trace.predicted or 0.0
        one.wait += trace.wait_seconds
        bubbles = trace.bubbles
        one.load_idle += bubbles["load"]
        one.compute_idle += bubbles["compute"]
        one.failed += trace.failed
        for load in loads:
            one.requests += 1
            one.codecs.update(load.tokens_of)
            one.tiers.update(load.tiers)

    def _burst(self) -> _Evictions:
        now = self._clock()
        if self._evictions is None:
            self._evictions = _Evictions(now, now)
        self._evictions.last = now
        return self._evictions

    def _lost(self, counters: Counters) -> tuple[int, int]:
        """Tokens dropped, and left out by plan, since the last line."""
        return counters.dropped_tokens - self._dropped, counters.unstored_tokens - self._unstored

    # ---- what is written -------------------------------------------------------

    def step(self) -> None:
        """Between two steps of the scheduler: write the lines that are due."""
        if self._restores is not None:
            self._write_restores()
        if self._evictions is not None:
            self._write_evictions(self._evictions)

    def _write_restores(self) -> None:
        now, one = self._clock(), self._restores
        if one is None or now - self._restored_at < 1 / RESTORE_LINES:
            return
        self._restores, self._restored_at = None, now
        logger.info(
            "krul restore tokens=%d requests=%d passes=%d recomputed=%d new=%d bytes=%d ms=%.1f "
            "expected_ms=%.1f wait_ms=%.1f load_idle_ms=%.1f compute_idle_ms=%.1f tier=%s "
            "codec=%s failed=%d",
            one.tokens,
            one.requests,
            one.passes,
            one.recomputed,
            one.new,
            one.nbytes,
            1e3 * one.seconds,
            1e3 * one.expected,
            1e3 * one.wait,
            1e3 * one.load_idle,
            1e3 * one.compute_idle,
            _names(one.tiers),
            _names(one.codecs),
            one.failed,
        )

    def _write_evictions(self, burst: _Evictions) -> None:
        now = self._clock()
        if now - burst.last < QUIET_SECONDS and now - burst.began < BURST_SECONDS:
            return
        if not logger.isEnabledFor(logging.INFO):
            self._evictions = None
            return
        runs = [run for ids in burst.ids for run in slot_runs(ids)]
        segments = {run.segment: self._store.get(run.segment) for run in runs}
        here = [segment for segment in segments.values() if segment is not None]
        waiting = [one for one in here if one.state is SegmentState.STAGED and one.waiting]
        if waiting and now - burst.last < QUIET_SECONDS + SEAL_SECONDS:
            return
        self._evictions = None
        dropped, unstored = self._lost(self._counters)
        self._dropped, self._unstored = (
            self._counters.dropped_tokens,
            self._counters.unstored_tokens,
        )
        sealed = [one for one in here if one.state is SegmentState.SEALED]
        raw, kept = sum(s.raw_bytes for s in sealed), sum(s.stored_bytes for s in sealed)
        tiers = {MEMORY for one in here if not one.is_on_disk_only}
        tiers |= {"disk" for one in here if one.file is not None}
        logger.info(
            "krul evict tokens=%d segments=%d evictions=%d raw_bytes=%d bytes=%d ratio=%.2f "
            "ms=%.1f tier=%s codec=%s waiting=%d gone=%d dropped=%d unstored=%d",
            sum(run.tokens for run in runs),
            len(segments),
            burst.calls,
            raw,
            kept,
            raw / kept if kept else 0.0,
            1e3 * burst.seconds,
            _names(tiers),
            _names({one.codec for one in sealed}),
            len(waiting),
            len(segments) - len(here),
            dropped,
            unstored,
        )


def _names(found: set[str]) -> str:
    return "+".join(sorted(found)) or "none"
