"""The disk tier: immutable segment files in a directory that several processes may share.

What is known in memory is what this process last saw. Every use checks the file itself: one
that vanished, is damaged or belongs to another conversation is a miss, counted and, where it
is damaged, logged once and set aside. Nothing here raises for what the disk does once the tier
is open.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from krul_sglang.codec.base import CodecError, Payload
from krul_sglang.store.disk.calls import Calls
from krul_sglang.store.disk.catalog import Catalog, remove_abandoned
from krul_sglang.store.disk.directory import Directory
from krul_sglang.store.disk.entry import Entry, EntryName, Namespace
from krul_sglang.store.disk.header import FutureVersionError
from krul_sglang.store.disk.health import Health
from krul_sglang.store.disk.index import ENTRY_BYTES
from krul_sglang.store.disk.lookup import StoredPath, longest_path
from krul_sglang.store.disk.payload import DiskPayload, ForeignEntryError
from krul_sglang.store.disk.publishing import (
    REFRESH_SECONDS,
    Outcome,
    Publication,
    Publisher,
)


@dataclass
class DiskStats:
    """Totals since the tier was opened.

    stored, present, no_room, degraded, failed: how publishing went, see :class:`Outcome`.
    opened, vanished, foreign, unreadable: how opening entries went, but for damaged ones.
    """

    stored: int = 0
    stored_bytes: int = 0
    present: int = 0
    no_room: int = 0
    degraded: int = 0
    failed: int = 0
    opened: int = 0
    vanished: int = 0
    foreign: int = 0
    unreadable: int = 0


class DiskTier:
    """Entries of one fingerprint in a directory shared with others. Thread-safe."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        fingerprint: bytes,
        limit: int,
        *,
        durable: bool = False,
        calls: Calls | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Opens ``root``, creating it if need be, and evicts down to ``limit`` bytes.

        limit: for the entries of all fingerprints below the root, in whole blocks.
        durable: fsync each file before it counts as stored.
        clock: seconds, for the pauses after a failed write.
        Raises OSError where there is no such directory and none can be made. One that cannot be
        written to is served as far as it goes.
        """
        self.fingerprint = fingerprint
        self.stats = DiskStats()
        self._directory = Directory(root, calls or Calls(), durable)
        self._catalog = Catalog(self._directory, limit)
        self._health = Health(self._directory.root, clock)
        self._publisher = Publisher(self._directory, self._catalog, self._health, fingerprint)
        self._counting = threading.Lock()
        self._directory.calls.close(self._directory.calls.open_root(self._directory.root, True))
        try:
            unfinished = self._catalog.load()
            self._publisher.lease()
            remove_abandoned(self._directory, unfinished)
            self._catalog.make_room(0)
        except OSError as error:
            self._health.failed(error)

    # ---- what is there ---------------------------------------------------------

    @property
    def root(self) -> str:
        """The directory, as it was given."""
        return self._directory.root

    @property
    def used(self) -> int:
        """Bytes of all entries known and of those being written, in whole blocks."""
        return self._catalog.used

    @property
    def index_bytes(self) -> int:
        """Host memory of what is known of the entries, about."""
        return ENTRY_BYTES * len(self._catalog.index)

    @property
    def degraded(self) -> str:
        """Why nothing can be written; empty while all is well."""
        return self._health.reason

    def __len__(self) -> int:
        return len(self._catalog.index)

    def holds(self, name: EntryName) -> bool:
        """Whether an entry is there, as far as is known: no file is looked at."""
        with self._catalog.lock:
            return name in self._catalog.index

    def use(self, name: EntryName) -> None:
        """Count a use of an entry that was not opened, as memory has it too."""
        self._catalog.use(name)

    def totals(self) -> dict[str, int]:
        """The counters, and what is held now."""
        catalog = self._catalog
        counters = {name: getattr(catalog, name) for name in _CATALOG_COUNTERS}
        held = {"entries": len(self), "used": self.used, "limit": catalog.limit}
        with self._counting:
            return {**asdict(self.stats), **counters, **held}

    def names(self) -> list[EntryName]:
        """Every entry known, of any fingerprint, the least recently used first."""
        with self._catalog.lock:
            return sorted(self._catalog.index, key=self._catalog.index.recency)

    def candidates(self, parent: bytes, start: int) -> list[EntryName]:
        """Entries that begin at ``start``, behind tokens of digest ``parent``."""
        with self._catalog.lock:
            return self._catalog.index.beginning(self.fingerprint, parent, start)

    def covering(self, end: bytes, stop: int) -> list[EntryName]:
        """Entries that end at ``stop``, with tokens of digest ``end``."""
        with self._catalog.lock:
            return self._catalog.index.ending(self.fingerprint, end, stop)

    def longest_path(
        self,
        namespace: Namespace,
        ids: Sequence[int] | np.ndarray,
        starts: Iterable[int] = (0,),
        usable: Callable[[EntryName], bool] = lambda name: True,
    ) -> StoredPath | None:
        """The entries that lead furthest along ``ids``; see :func:`.lookup.longest_path`.

        From memory alone: each has yet to be opened. ``usable`` is called under a lock."""
        catalog = self._catalog
        with catalog.lock:
            return longest_path(catalog.index, self.fingerprint, namespace, ids, starts, usable)

    # ---- reading ---------------------------------------------------------------

    def open(
        self, name: EntryName, namespace: Namespace, ids: Sequence[int] | np.ndarray
    ) -> tuple[DiskPayload, int] | None:
        """The payload of an entry, and how many leading tokens of its run ``ids`` agree with.

        ids: the conversation's tokens from position 0; all before the run and at least one of
        it must agree. None is a miss: gone, damaged, foreign or unreadable. Counts as a use.
        """
        payload = None
        try:
            payload = self._payload(name)
            matched = payload.match(namespace, ids)
        except (CodecError, ForeignEntryError, OSError) as error:
            if payload is not None:
                payload.close()
            self._miss(name, error)
            return None
        self._count("opened")
        self._catalog.use(name, payload.touch)
        return payload, matched

    def reopen(self, name: EntryName) -> DiskPayload | None:
        """The payload of an entry whose conversation was compared before, or that was published
        by the caller: its header must be the one the name was made from. None is a miss, as for
        :meth:`open`."""
        payload = None
        try:
            payload = self._payload(name)
            payload.check_name()
        except (CodecError, ForeignEntryError, OSError) as error:
            if payload is not None:
                payload.close()
            self._miss(name, error)
            return None
        self._count("opened")
        self._catalog.use(name, payload.touch)
        return payload

    def _payload(self, name: EntryName) -> DiskPayload:
        if name.fingerprint != self.fingerprint:
            raise ForeignEntryError("another fingerprint")
        return DiskPayload(name, self._directory.open_entry(name), self._directory.calls)

    def _miss(self, name: EntryName, error: Exception) -> None:
        if isinstance(error, ForeignEntryError):
            self._count("foreign")
        elif isinstance(error, FutureVersionError):
            self._count("foreign")
            self._catalog.log_once(name, f"is left alone: {error}")
            self._catalog.drop(name, hide=True)
        elif isinstance(error, CodecError):
            self.quarantine(name, str(error))
        elif isinstance(error, FileNotFoundError):
            self._count("vanished")
            self._catalog.drop(name)
        elif isinstance(error, OSError) and error.errno in (errno.ELOOP, errno.ENXIO):
            self.quarantine(name, "not a regular file")
        else:
            self.unreadable(name, error)

    def unreadable(self, name: EntryName, error: Exception) -> None:
        """The device failed at an entry, which stays where it is: a miss of this process's."""
        self._count("unreadable")
        self._catalog.log_once(name, f"cannot be read: {error}")
        self._catalog.drop(name)

    def _count(self, counter: str, by: int = 1) -> None:
        with self._counting:
            setattr(self.stats, counter, getattr(self.stats, counter) + by)

    def quarantine(self, name: EntryName, reason: str) -> None:
        """Set a damaged entry aside, so that nobody finds it again. Counted and logged once."""
        self._catalog.set_aside(name, reason)

    # ---- writing ---------------------------------------------------------------

    def publish(
        self,
        namespace: Namespace,
        ids: Sequence[int] | np.ndarray,
        start: int,
        payload: Payload,
        *,
        codec: str,
        exact_tokens: int,
        raw_bytes: int,
    ) -> Publication:
        """Store the sealed payload of tokens ``start .. len(ids)`` of a conversation.

        ids: all its tokens from position 0. When this returns STORED the file is in place.
        exact_tokens: how many leading tokens of the run are bit-exact. raw_bytes: of the KV.
        Raises ValueError for figures that cannot be, and nothing for what the disk does.
        """
        # The checksum is taken while the payload is written, and where it is at all.
        entry = Entry.of(
            self.fingerprint,
            namespace,
            ids,
            start,
            payload,
            codec=codec,
            exact_tokens=exact_tokens,
            raw_bytes=raw_bytes,
            payload_crc=0,
        )
        done = self._publisher.publish(entry, payload)
        self._count(done.outcome.name.lower())
        if done.outcome is Outcome.STORED and done.name is not None:
            self._count("stored_bytes", done.name.size)
        return done

    # ---- letting go ------------------------------------------------------------

    def make_room(self, nbytes: int) -> bool:
        """Evict the least recently used entries until ``nbytes`` more fit; False if they cannot.

        What nobody continues goes first. Other processes write meanwhile: the directory may
        exceed the limit by what they stored since each last looked (:data:`REFRESH_SECONDS`).
        """
        try:
            self._catalog.refresh(REFRESH_SECONDS)
            return self._catalog.make_room(nbytes)
        except OSError as error:
            self._health.failed(error)
            return False

    def refresh(self, max_age: float = 0.0) -> None:
        """Learn what other processes stored and removed, unless that was done ``max_age`` seconds
        ago or less."""
        try:
            self._catalog.refresh(max_age)
        except OSError as error:
            self._health.failed(error)

    def close(self) -> None:
        """Wait for writes under way (10 s at most) and give the lease up. Files stay."""
        self._publisher.close()


_CATALOG_COUNTERS = ("damaged", "evicted", "evicted_bytes")
