"""Whether the disk takes writes: after a failure the tier waits, and tries again later."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds until a failed write is tried again; doubled with each failure in a row."""


class Health:
    """Thread-safe. ``clock`` gives seconds and never goes back."""

    def __init__(self, where: str, clock: Callable[[], float]) -> None:
        self._where = where
        self._clock = clock
        self._lock = threading.Lock()
        self._wait = FIRST_WAIT
        self._retry_at = 0.0
        self.reason = ""
        """Why nothing can be written; empty while all is well."""

    def may_write(self) -> bool:
        """Whether a write is worth trying. While degraded, one try each time the wait is over."""
        with self._lock:
            if not self.reason:
                return True
            if self._clock() < self._retry_at:
                return False
            self._retry_at = self._clock() + self._wait
            return True

    def failed(self, error: OSError) -> None:
        """A write failed; logged once until one succeeds."""
        with self._lock:
            first, self.reason = not self.reason, f"{error.strerror or error}"
            if first:
                self._wait = FIRST_WAIT
            self._retry_at = self._clock() + self._wait
            self._wait = min(2 * self._wait, LONGEST_WAIT)
        if first:
            logger.warning(
                "disk tier %s: writing failed (%s); nothing is stored there until it works again",
                self._where,
                error,
            )

    def succeeded(self) -> None:
        """A write went through."""
        with self._lock:
            degraded, self.reason = self.reason, ""
        if degraded:
            logger.warning("disk tier %s: writing works again", self._where)
