"""The disk tier: immutable segment files in a directory that several processes may share.

What is known in memory is what this process last saw. Every use checks the file itself: one
that vanished, is damaged or belongs to another conversation is a miss, counted and, where it
is damaged, logged once and set aside. Nothing here raises for what the disk does once the tier
is open.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from enum import Enum
from functools import partial

import numpy as np
from zlib_ng.zlib_ng import crc32

from krul_sglang.codec.base import CodecError, Payload
from krul_sglang.store.disk.calls import Calls
from krul_sglang.store.disk.catalog import Catalog, remove_abandoned
from krul_sglang.store.disk.directory import Directory
from krul_sglang.store.disk.entry import Entry, EntryName, Namespace
from krul_sglang.store.disk.header import FutureVersionError, name_of, pack_head, with_checksum
from krul_sglang.store.disk.health import Health
from krul_sglang.store.disk.index import ENTRY_BYTES
from krul_sglang.store.disk.lease import Lease
from krul_sglang.store.disk.lookup import StoredPath, longest_path
from krul_sglang.store.disk.payload import DiskPayload, ForeignEntryError

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
        self._lease: Lease | None = None
        self._leasing = threading.Lock()
        self._idle = threading.Condition()
        self._publishing = 0
        self._drafts = 0
        self._summing = ThreadPoolExecutor(1, "krul-checksum")
        self._closed = False
        self._directory.calls.close(self._directory.calls.open_root(self._directory.root, True))
        try:
            unfinished = self._catalog.load()
            self._leased()
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
        with self._idle:
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
        with self._idle:
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
        head = pack_head(entry)
        name = name_of(entry, len(head))
        with self._idle:
            if self._closed:
                return Publication(Outcome.DEGRADED, reason="the tier is closed")
            self._publishing += 1
        try:
            done = self._publish(name, head, payload)
        except OSError as error:
            self._health.failed(error)
            done = Publication(Outcome.FAILED, reason=error.strerror or str(error))
        finally:
            with self._idle:
                self._publishing -= 1
                self._idle.notify_all()
        self._count(done.outcome.name.lower())
        return done

    def _publish(self, name: EntryName, head: bytes, payload: Payload) -> Publication:
        present = self._present(name)
        if present is not None:
            self._catalog.use(present)
            return Publication(Outcome.PRESENT, present)
        if not self._health.may_write():
            return Publication(Outcome.DEGRADED, reason=self.degraded)
        self._catalog.refresh(REFRESH_SECONDS)
        if not self._catalog.reserve(name):
            reason = f"{name.footprint} bytes do not fit in {self._catalog.limit}"
            return Publication(Outcome.NO_ROOM, reason=reason)
        try:
            self._write(name, head, payload)
        finally:
            self._catalog.release(name)
        self._health.succeeded()
        self._count("stored_bytes", name.size)
        return Publication(Outcome.STORED, name)

    def _present(self, name: EntryName) -> EntryName | None:
        """An entry, still in place, that makes ``name`` needless."""
        for other in self.covering(name.end, name.stop):
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
                    self._leased(),
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

    def _leased(self) -> str:
        """The id of a lease that others can see. Raises OSError where there can be none."""
        with self._leasing:
            if self._lease is not None and not self._lease.is_intact():
                self._lease.close()
                self._lease = None
            if self._lease is None:
                self._lease = Lease(self._directory, self.fingerprint)
            return self._lease.id

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
        with self._idle:
            self._closed = True
            self._idle.wait_for(lambda: self._publishing == 0, timeout=CLOSE_SECONDS)
        self._summing.shutdown(wait=False)
        with self._leasing:
            if self._lease is not None:
                self._lease.close()
                self._lease = None


_CATALOG_COUNTERS = ("damaged", "evicted", "evicted_bytes")
