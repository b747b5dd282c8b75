"""A scheduler's queue, as far as waiting for the remote tier concerns it."""

from __future__ import annotations

import time

from tree_rig import Rig


class Queue:
    """A scheduler's queue, and its steps as far as they concern it."""

    def __init__(self, rig: Rig, *requests) -> None:
        self.rig, self.waiting_queue = rig, list(requests)
        self.held = 0
        """Steps in which something was set aside."""

    def step(self) -> list:
        """One step without a batch; returns the requests that it might have taken."""
        self.rig.cache.pulls.set_aside(self)
        free = list(self.waiting_queue)
        self.rig.cache.pulls.put_back(self, idle=True)
        self.held += len(free) < len(self.waiting_queue)
        return free

    def until_free(self, *requests, seconds: float = 20) -> float:
        """Step until all of them might be taken; returns the seconds it took."""
        began = time.monotonic()
        while not all(any(req is one for one in self.step()) for req in requests):
            assert time.monotonic() - began < seconds, "a request was held for ever"
        return time.monotonic() - began
