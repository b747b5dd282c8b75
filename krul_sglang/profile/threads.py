"""How many threads to compute with while others use the machine, too.

The threads of one operation wait for the slowest of them. Where others keep the cores busy, that
one waits for a core, and many threads are slower than one: on two cores with three busy
processes, two threads did 0.7 rounds of the products below in a second, one thread 2.2. On the idle
machine two are nearly twice as fast.
"""

from __future__ import annotations

import time
from types import TracebackType

import torch

EVERY = 20.0
"""Seconds between two looks."""
PROBE = 0.2
"""Seconds a look takes for each number of threads: several of the system's time slices."""


class Threads:
    """Keeps torch at the fastest number of threads, at most as many as it had; they are given
    back at the end."""

    def __enter__(self) -> Threads:
        self.most = torch.get_num_threads()
        self._next = 0.0
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        torch.set_num_threads(self.most)

    def adapt(self) -> None:
        """Look again, unless that was done :data:`EVERY` seconds ago or less. Sets torch's number
        of threads."""
        if self.most == 1 or time.monotonic() < self._next:
            return
        counts = {1, self.most, max(1, self.most // 2)}
        torch.set_num_threads(max(sorted(counts, reverse=True), key=_speed))
        self._next = time.monotonic() + EVERY


def _speed(threads: int) -> float:
    """Products a second of the size that a small model's decoding consists of."""
    torch.set_num_threads(threads)
    x, weights = torch.ones(64, 576), torch.ones(1536, 576)
    done, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < PROBE:
        torch.nn.functional.linear(x, weights)
        done += 1
    return done / spent
