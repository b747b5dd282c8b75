"""Publishing: a sealed segment becomes a file that others find, or nothing of it is there.

A draft is written beside the entries under a lease that shows that somebody works on it, and
renamed when it is whole; what is promised of it is in docs/format.md.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from functools import partial

from zlib_ng.zlib_ng import crc32

from krul_sglang.codec.base import Payload
from krul_sglang.store.disk.catalog import Catalog
from krul_sglang.store.disk.directory import Directory
from krul_sglang.store.disk.entry import Entry, EntryName
from krul_sglang.store.disk.header import name_of, pack_head, with_checksum
from krul_sglang.store.disk.health import Health
from krul_sglang.store.disk.lease import Lease

REFRESH_SECONDS = 1.0
"""How old what we know of other processes' files may be when room is made."""
CLOSE_SECONDS = 10.0
SUMMED_BESIDE = 1 << 20
"""Bytes from which on a payload's checksum is taken by another thread while it is written: of
16 MiB it takes a third of the time that the page cache does, a thread 0.05 ms."""


class Outcome(Enum):
    """What became of a segment that was to be published."""

    STORED = "stored"
    PRESENT = "present"
    """The same run is stored already, with as many exact tokens at least."""
    NO_ROOM = "no room"
    """Larger than the budget, or only what it continues could make way for it."""
    DEGRADED = "degraded"
    """Not tried: the disk failed a moment ago, or the tier is closed."""
    FAILED = "failed"


@dataclass(frozen=True)
class Publication:
    """An outcome, the entry where it is stored, and why where it is not."""

    outcome: Outcome
    name: EntryName | None = None
    reason: str = ""


class Publisher:
    """Writes the entries of one process below a directory. Thread-safe."""

    def __init__(
        self, directory: Directory, catalog: Catalog, health: Health, fingerprint: bytes
    ) -> None:
        self._directory, self._catalog, self._health = directory, catalog, health
        self._fingerprint = fingerprint
        self._lease: Lease | None = None
        self._leasing = threading.Lock()
        self._idle = threading.Condition()
        self._publishing = 0
        self._drafts = 0
        self._summing = ThreadPoolExecutor(1, "krul-checksum")
        self._closed = False

    def publish(self, entry: Entry, payload: Payload) -> Publication:
        """Store a payload as an entry whose checksum nobody has taken yet.

        When this returns STORED the file is in place. Raises nothing for what the disk does.
        """
        head = pack_head(entry)
        name = name_of(entry, len(head))
        with self._idle:
            if self._closed:
                return Publication(Outcome.DEGRADED, reason="the tier is closed")
            self._publishing += 1
        try:
            return self._publish(name, head, payload)
        except OSError as error:
            self._health.failed(error)
            return Publication(Outcome.FAILED, reason=error.strerror or str(error))
        finally:
            with self._idle:
                self._publishing -= 1
                self._idle.notify_all()

    def _publish(self, name: EntryName, head: bytes, payload: Payload) -> Publication:
        present = self._present(name)
        if present is not None:
            self._catalog.use(present)
            return Publication(Outcome.PRESENT, present)
        if not self._health.may_write():
            return Publication(Outcome.DEGRADED, reason=self._health.reason)
        self._catalog.refresh(REFRESH_SECONDS)
        if not self._catalog.reserve(name):
            reason = f"{name.footprint} bytes do not fit in {self._catalog.limit}"
            return Publication(Outcome.NO_ROOM, reason=reason)
        try:
            self._write(name, head, payload)
        finally:
            self._catalog.release(name)
        self._health.succeeded()
        return Publication(Outcome.STORED, name)

    def _present(self, name: EntryName) -> EntryName | None:
        """An entry, still in place, that makes ``name`` needless."""
        catalog = self._catalog
        with catalog.lock:
            covering = catalog.index.ending(self._fingerprint, name.end, name.stop)
        for other in covering:
            alike = other.start == name.start and other.exact_tokens >= name.exact_tokens
            if alike and self._directory.recency(other) is not None:
                return other
        return None

    def _write(self, name: EntryName, head: bytes, payload: Payload) -> None:
        checksum = self._checksum(payload)
        for retry in (True, False):
            with self._idle:
                self._drafts += 1
                draft = self._drafts
            ns = self._catalog.tick()
            try:
                self._directory.write(
                    name,
                    lambda: with_checksum(head, checksum()),
                    payload,
                    self.lease(),
                    draft,
                    ns,
                )
            except FileNotFoundError:
                # Somebody removed a directory under us, perhaps because it was empty.
                if retry:
                    continue
                raise
            self._catalog.add(name, ns)
            return

    def _checksum(self, payload: Payload) -> Callable[[], int]:
        if len(payload) >= SUMMED_BESIDE:
            # Closed meanwhile, or the process ends: then by whoever writes.
            with contextlib.suppress(RuntimeError):
                return self._summing.submit(crc32, payload).result
        return partial(crc32, payload)

    def lease(self) -> str:
        """The id of a lease that others can see. Raises OSError where there can be none."""
        with self._leasing:
            if self._lease is not None and not self._lease.is_intact():
                self._lease.close()
                self._lease = None
            if self._lease is None:
                self._lease = Lease(self._directory, self._fingerprint)
            return self._lease.id

    def close(self) -> None:
        """Wait for writes under way (10 s at most) and give the lease up."""
        with self._idle:
            self._closed = True
            self._idle.wait_for(lambda: self._publishing == 0, timeout=CLOSE_SECONDS)
        self._summing.shutdown(wait=False)
        with self._leasing:
            if self._lease is not None:
                self._lease.close()
                self._lease = None
