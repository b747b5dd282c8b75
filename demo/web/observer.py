"""One thread that asks the server how it stands, for all visitors together."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from web.client import Client, Facts, ServerDownError, ServerError

WATCHED, UNWATCHED = 1.0, 10.0
"""Seconds between two looks while somebody looks at the page, and while nobody does."""
SAMPLES = 900


@dataclass(frozen=True)
class Sample:
    """Bytes at one time (seconds of :func:`time.monotonic`): of each tier, waiting to be encoded,
    and what all sealed segments would take raw."""

    at: float
    tiers: Mapping[str, int]
    staging: int
    raw: int


@dataclass(frozen=True)
class Sight:
    """What was last seen. problem: empty, or one sentence; then the rest is older."""

    facts: Facts | None = None
    krul: Mapping[str, Any] = field(default_factory=dict)
    lines: Sequence[Mapping[str, Any]] = ()
    problem: str = ""
    down: bool = False
    version: int = 0
    """Grows with every successful look."""


class Observer:
    """``with Observer(client) as observer: observer.sight``."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.sight = Sight(problem="Looking for the server.", down=True)
        self.history: deque[Sample] = deque(maxlen=SAMPLES)
        self._watched = 0.0
        self._wake = threading.Event()
        self._closed = False
        self._look_lock = threading.Lock()
        self._thread = threading.Thread(target=self._look_forever, name="observer", daemon=True)

    def __enter__(self) -> Observer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._wake.set()
        self._thread.join(timeout=5)

    def touch(self) -> None:
        """Somebody looks at the page."""
        idle = time.monotonic() - self._watched > UNWATCHED
        self._watched = time.monotonic()
        if idle:
            self._wake.set()

    def look(self) -> Sight:
        """Ask now, and return what is there; never raises."""
        with self._look_lock:
            before = self.sight
            facts = before.facts
            try:
                if before.down or facts is None:  # it may be another server now
                    facts = self.client.facts()
                krul, lines = self.client.krul(), self.client.conversations()
                self.sight = Sight(facts, krul, lines, "", False, before.version + 1)
                self.history.append(_sample(krul))
            except ServerError as error:
                down = isinstance(error, ServerDownError)
                self.sight = Sight(
                    facts, before.krul, before.lines, str(error), down, before.version
                )
            return self.sight

    def _look_forever(self) -> None:
        while not self._closed:
            self.look()
            watched = time.monotonic() - self._watched < UNWATCHED
            self._wake.wait(WATCHED if watched else UNWATCHED)
            self._wake.clear()


def _sample(krul: Mapping[str, Any]) -> Sample:
    tiers = {name: int(tier["bytes"]) for name, tier in krul.get("tiers", {}).items()}
    staging = int(krul.get("memory", {}).get("staging", 0))
    return Sample(time.monotonic(), tiers, staging, int(krul.get("raw_bytes", 0)))
