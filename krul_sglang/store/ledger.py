"""One ledger for all host memory Krul holds on this rank."""

from __future__ import annotations

import threading

KINDS = ("tier", "staging", "prefetch", "loading", "remote", "index", "profile", "taps")


class Ledger:
    """Counts bytes by kind against one limit. Thread-safe.

    tier: sealed payloads. staging: raw runs waiting to be encoded, and what was measured of
    them. prefetch: rows decoded for requests that wait in the queue. loading:
    sealed payloads on their way from the disk. remote: those that wait to be sent to the
    remote tier, or came from it and have yet to join the tree. index: the tree's slot
    ids and the segments' own records. profile: the model's calibrated maps. taps: buffers
    for sampled queries where they are in host memory, and a byte a token of the pool and
    layer for the attention it drew.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._bytes = dict.fromkeys(KINDS, 0)
        self._peak = 0
        self._lock = threading.Lock()

    def add(self, kind: str, nbytes: int) -> None:
        """Account ``nbytes`` (negative to release) to ``kind``."""
        with self._lock:
            self._bytes[kind] += nbytes
            assert self._bytes[kind] >= 0, f"ledger of {kind} went below zero"
            self._peak = max(self._peak, sum(self._bytes.values()))

    def move(self, source: str, target: str, released: int, taken: int) -> None:
        """Release ``released`` bytes of one kind and take ``taken`` of another, at once."""
        with self._lock:
            self._bytes[source] -= released
            self._bytes[target] += taken
            assert self._bytes[source] >= 0, f"ledger of {source} went below zero"
            self._peak = max(self._peak, sum(self._bytes.values()))

    @property
    def used(self) -> int:
        """Bytes held now, all kinds."""
        with self._lock:
            return sum(self._bytes.values())

    def snapshot(self) -> dict[str, int]:
        """Bytes by kind, with ``limit`` and ``peak``."""
        with self._lock:
            return {**self._bytes, "limit": self.limit, "peak": self._peak}
