"""When a server that failed is tried again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds until it is tried again; doubled with each failure in a row."""


class Backoff:
    """Thread-safe. One warning when it begins to fail, one when it works again."""

    def __init__(self, what: str, clock: Callable[[], float]) -> None:
        """what: begins the warnings, such as ``remote tier HOST: reading``. clock: seconds."""
        self._what = what
        self._clock = clock
        self._lock = threading.Lock()
        self._wait = FIRST_WAIT
        self._retry_at = 0.0
        self.reason = ""
        """Why it fails; empty while all is well."""

    @property
    def seconds_left(self) -> float:
        """Until it is worth another try; 0 while all is well."""
        with self._lock:
            return max(0.0, self._retry_at - self._clock()) if self.reason else 0.0

    def failed(self, reason: str) -> None:
        """A try failed."""
        with self._lock:
            first, self.reason = not self.reason, reason
            if first:
                self._wait = FIRST_WAIT
            self._retry_at = self._clock() + self._wait
            self._wait = min(2 * self._wait, LONGEST_WAIT)
        if first:
            logger.warning("%s fails (%s); served without it until it works", self._what, reason)

    def succeeded(self) -> None:
        """A try went well."""
        with self._lock:
            degraded, self.reason = self.reason, ""
        if degraded:
            logger.warning("%s works again", self._what)
