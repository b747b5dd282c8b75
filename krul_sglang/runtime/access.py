"""How long ago a node of the tree was used, in seconds.

SGLang orders its nodes by a counter, not by time. The clock notes from time to time where
the counter stands; a node's own count then says when it was used.
"""

from __future__ import annotations

import time
from bisect import bisect_right

from sglang.srt.mem_cache.unified_cache.components.base import get_and_increase_time_counter

EVERY = 1.0
"""Seconds between two notes at least: what an age may be off by."""
NOTES = 4096
"""Notes that are kept. When they are that many every second one goes, so that old ages become
coarser, not unknown."""


class AccessClock:
    """Call :meth:`note` before the tree is used. Scheduler thread only."""

    def __init__(self) -> None:
        self._counts = [float(get_and_increase_time_counter())]
        self._times = [time.monotonic()]

    def note(self) -> None:
        """Whatever the tree counts from here on happens now."""
        now = time.monotonic()
        if now - self._times[-1] < EVERY:
            return
        if len(self._counts) == NOTES:
            del self._counts[1::2], self._times[1::2]
        self._counts.append(float(get_and_increase_time_counter()))
        self._times.append(now)

    def age(self, count: float) -> float:
        """Seconds since a node with this ``last_access_time`` was used."""
        last = max(0, bisect_right(self._counts, count) - 1)
        return time.monotonic() - self._times[last]
