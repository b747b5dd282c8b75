"""What the remote tier counts."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, fields


@dataclass
class RemoteStats:
    """Totals since start. Thread-safe.

    sent, sent_bytes, present: entries that were stored there, or were stored already.
    unsent: that were not, as the queue was full or the server would not take them.
    asked, found: conversations that were asked for, and of which there was something.
    declined, no_room: of these, not fetched: it would have taken longer than computing the
    tokens, or memory had no room.
    pulled, pulled_bytes: entries that came. late: that came when nobody waited any more.
    vanished, damaged, foreign: that were listed and gone, not what was stored, or another's.
    failed: round trips that failed while somebody waited.
    """

    sent: int = 0
    sent_bytes: int = 0
    present: int = 0
    unsent: int = 0
    asked: int = 0
    found: int = 0
    declined: int = 0
    no_room: int = 0
    pulled: int = 0
    pulled_bytes: int = 0
    late: int = 0
    vanished: int = 0
    damaged: int = 0
    foreign: int = 0
    failed: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **counts: int) -> RemoteStats:
        """Add to counters by name; returns itself."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)
        return self

    def totals(self) -> dict[str, int]:
        """All counters."""
        with self._lock:
            return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "_lock"}
