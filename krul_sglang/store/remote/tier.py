"""The remote tier as a store uses it: both halves, what they count and how they are."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from krul_sglang.codec.base import Payload
from krul_sglang.store.ledger import Ledger
from krul_sglang.store.remote.address import parse_address
from krul_sglang.store.remote.backoff import Backoff
from krul_sglang.store.remote.client import Client
from krul_sglang.store.remote.pull import Pull, Stage
from krul_sglang.store.remote.reading import Reader
from krul_sglang.store.remote.stats import RemoteStats
from krul_sglang.store.remote.writing import Writer
from krul_sglang.store.segment import Origin, Segment

CLOSE_SECONDS = 5.0


class RemoteTier:
    """Entries of one fingerprint on a server that others use too. Thread-safe.

    Whatever the server does, nothing here raises or waits for it: what is not there in time
    is a miss.
    """

    tier = "remote"

    def __init__(
        self, url: str, fingerprint: bytes, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Asks the server once whether it is well, a second at most, and warns where it is not.

        url: as ``--krul-remote`` takes it; raises ValueError. clock: seconds, for the pauses
        after a failure.
        """
        self.address = parse_address(url)
        where = f"remote tier {self.address.shown}"
        self.stats = RemoteStats()
        self._reach = Backoff(f"{where}: the connection", clock)
        self._room = Backoff(f"{where}: storing", clock)
        self._client = Client(self.address)
        ttl = self.address.ttl
        self._reader = Reader(self._client, fingerprint, ttl, self._reach, self.stats)
        self._writer = Writer(
            self._client, fingerprint, ttl, self._reader, self._reach, self._room, self.stats
        )
        self._reader.ping()

    def serve(self, ledger: Ledger) -> None:
        """The ledger that what waits to be sent is accounted in; to be called once, first."""
        self._writer.serve(ledger)

    @property
    def degraded(self) -> str:
        """Why nothing is asked or sent; empty while all is well."""
        return self._reach.reason or self._room.reason

    @property
    def may_ask(self) -> bool:
        """Whether the server answered when last asked anything."""
        return not self._reach.reason

    # ---- writing ---------------------------------------------------------------

    def offer(self, segment: Segment, payload: Payload, origin: Origin) -> None:
        """Send a sealed segment in the background, if there is room in the queue."""
        self._writer.offer(segment, payload, origin)

    @property
    def unsent(self) -> int:
        """Segments that wait to be sent."""
        return self._writer.unsent

    def wait_sent(self, timeout: float) -> bool:
        """Wait until nothing waits to be sent; False after ``timeout`` seconds."""
        return self._writer.wait_sent(timeout)

    # ---- reading ---------------------------------------------------------------

    def look(self, pull: Pull) -> None:
        """Ask which entries there are; the pull comes to :attr:`Stage.FOUND`, or is over."""
        self._reader.take(pull)

    def fetch(self, pull: Pull) -> None:
        """Bring what was found; the pull is over when all of it is there, or its time is."""
        pull.fetching()
        if pull.stage is Stage.FETCHING:
            self._reader.take(pull)

    # ---- life ------------------------------------------------------------------

    def totals(self) -> dict[str, Any]:
        """What /server_info shows."""
        return {
            "url": self.address.shown,
            **self.stats.totals(),
            "waiting": self.unsent,
            "degraded": self.degraded,
        }

    def close(self) -> None:
        """Send what waits, if the server is well (a few seconds at most), and stop."""
        if not self.degraded:
            self.wait_sent(CLOSE_SECONDS)
        self.abandon()

    def abandon(self) -> None:
        """Neither send nor bring anything more. What is stored there stays."""
        self._writer.close()
        self._reader.close()
        self._client.close()
