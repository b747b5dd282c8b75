"""One request's wait for the remote tier: what it may have, what has come, and until when."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from enum import Enum

import numpy as np

from krul_sglang.store.disk.entry import EntryName, Namespace
from krul_sglang.store.remote.arrival import Arrival

PATIENCE = 4.0
"""Fetching that takes this many times longer than expected is given up, as far as it came."""
LEAST_PATIENCE = 1.0
"""Seconds that it is given at least, if the request can wait as long. Also how long a request
waits to learn whether there is anything."""


class Stage(Enum):
    """How far a pull is."""

    LOOKING = "looking"
    """Which entries there are is being asked."""
    FOUND = "found"
    """The names are known; whoever waits has yet to make room and say so."""
    FETCHING = "fetching"
    OVER = "over"


class Pull:
    """Entries that continue a conversation. Thread-safe.

    namespace, ids: the conversation, int64 from position 0. starts: positions where an entry
    may begin. covered: tokens that are here already.
    arrivals: what has come, from the root side on, without gaps.
    nbytes, seconds: that came, and that fetching them took.
    """

    def __init__(
        self,
        namespace: Namespace,
        ids: np.ndarray,
        starts: Sequence[int],
        covered: int,
        *,
        worth: float,
        rate: float = 0.0,
        room: int = 1 << 62,
    ) -> None:
        """worth: seconds after which the tokens had better be computed. rate: seconds that a
        byte is expected to take, 0 where nothing is known. room: bytes that it may take."""
        self.namespace, self.ids = namespace, ids
        self.starts, self.covered = starts, covered
        self.room = room
        self.names: list[EntryName] = []
        self.arrivals: list[Arrival] = []
        self.nbytes, self.seconds = 0, 0.0
        self._rate = rate
        self._worth_until = time.monotonic() + worth
        self._deadline = time.monotonic() + min(worth, LEAST_PATIENCE)
        self._stage = Stage.LOOKING
        self._changed = threading.Condition()

    @property
    def stage(self) -> Stage:
        """Also over when its time is."""
        with self._changed:
            return Stage.OVER if self._is_over() else self._stage

    def _is_over(self) -> bool:
        return self._stage is Stage.OVER or time.monotonic() >= self._deadline

    @property
    def remaining(self) -> float:
        """Seconds until it is given up."""
        with self._changed:
            return max(0.0, self._deadline - time.monotonic())

    @property
    def wanted_bytes(self) -> int:
        """Of the entries that were found."""
        return sum(name.size for name in self.names)

    @property
    def is_worth_it(self) -> bool:
        """Whether what was found is expected to be here in time."""
        return self._rate * self.wanted_bytes < self.remaining

    def found(self, names: Sequence[EntryName]) -> None:
        """These entries there are, each beginning where the one before ends; none of them if
        not even the first has room."""
        with self._changed:
            size, kept = 0, []
            for name in names:
                size += name.size
                if size > self.room:
                    break
                kept.append(name)
            self.names = kept
            if self._stage is Stage.LOOKING and not self._is_over():
                self._stage = Stage.FOUND if kept else Stage.OVER
                self._deadline = self._worth_until
            self._changed.notify_all()

    def fetching(self) -> None:
        """Room was made: from here on it is in a hurry."""
        with self._changed:
            expected = self._rate * self.wanted_bytes
            patience = PATIENCE * expected + LEAST_PATIENCE if expected else math.inf
            self._deadline = min(self._deadline, time.monotonic() + patience)
            if self._stage is Stage.FOUND:
                self._stage = Stage.FETCHING

    def arrived(self, arrival: Arrival, seconds: float) -> bool:
        """The next entry is here; False where nobody waits any more."""
        with self._changed:
            if self._is_over():
                return False
            self.arrivals.append(arrival)
            self.nbytes += arrival.name.size
            self.seconds += seconds
            return True

    def end(self) -> None:
        """Nothing more will come."""
        with self._changed:
            self._stage = Stage.OVER
            self._changed.notify_all()

    def wait(self, *stages: Stage, timeout: float) -> bool:
        """Wait until it is at one of these stages; False after ``timeout`` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._stage in stages, timeout)
