"""The storage boundary: what of a history is not stored, as it would be computed anew anyway.

The paper stores ``c (1 - r) N`` of a history of N tokens, r being the share that a restore
recomputes. Here r is not calibrated but seen: the share ``p`` of their history that recent
restores loaded. The boundary lies at the upper confidence bound of the next p,

    mean(p) + Z * std(p) * sqrt(1 + 1 / n)

of the last n restores and one of the planner's blocks further, so that it takes nothing a
restore is likely to want. A restore that loaded all there was of a history cut short, that
block included, might have loaded more: it counts as one that wanted everything, so a boundary
that has become wrong is given up within a few restores.
"""

from __future__ import annotations

import math
from collections import deque

from krul_sglang.restore.planner import block

RECENT = 32
"""Restores that are looked back on."""
MARGIN = 16
"""Tokens that it lies behind what restores load, at least: a history cut just there would be loaded
whole, which says that more was wanted."""
LEAST = 8
"""Restores below which everything is stored."""
Z = 2.0
"""Standard deviations that the next restore may lie above the mean."""


class Boundary:
    """Learns from restores how much of a history is ever loaded."""

    def __init__(self) -> None:
        self._shares: deque[float] = deque(maxlen=RECENT)

    def observe(self, loaded: int, stored: int, history: int) -> None:
        """A restore took the first ``loaded`` tokens of a ``history`` of which the first
        ``stored`` were to be had."""
        if history > 0:
            cut_short = loaded >= stored < history
            self._shares.append(1.0 if cut_short else loaded / history)

    @property
    def share(self) -> float:
        """Upper confidence bound of the share that the next restore loads; 1 while too few
        have been seen."""
        n = len(self._shares)
        if n < LEAST:
            return 1.0
        # Not statistics.stdev: that takes a tenth of a millisecond, and every finish asks.
        mean = math.fsum(self._shares) / n
        spread = math.sqrt(math.fsum((share - mean) ** 2 for share in self._shares) / (n - 1))
        return min(1.0, mean + Z * spread * math.sqrt(1 + 1 / n))

    def of(self, history: int) -> int:
        """Position from which a history of that many tokens is not stored."""
        step = max(MARGIN, block(history))
        return min(history, math.ceil(self.share * history / step + 1) * step)
