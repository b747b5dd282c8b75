"""The index and the directory, kept in agreement while other processes change the directory.

Locks: ``lock`` guards the index and is never held during I/O, so that a slow disk does not hold
up lookups. ``_upkeep`` serializes what makes the two agree: refreshing, evicting, setting aside.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import time
from collections.abc import Callable

from krul_sglang.store.disk.directory import Directory
from krul_sglang.store.disk.entry import EntryName
from krul_sglang.store.disk.index import Index
from krul_sglang.store.disk.lease import holders, writer_of
from krul_sglang.store.disk.quarantine import quarantine

logger = logging.getLogger(__name__)

_RACY_NS = 100_000_000
"""A directory changed this shortly before it was listed may change again at the same mtime."""
_MAX_LOGGED = 10_000


class Catalog:
    """Every entry below one root. Thread-safe; :attr:`index` is to be used under :attr:`lock`."""

    def __init__(self, directory: Directory, limit: int) -> None:
        """limit: bytes that all entries may take, in whole blocks. Call :meth:`refresh` next."""
        self.directory = directory
        self.limit = limit
        self.index = Index()
        self.lock = threading.Lock()
        self.damaged = self.evicted = self.evicted_bytes = 0
        self._upkeep = threading.Lock()
        self._reserved = 0
        self._now = 0
        self._refreshed = 0.0
        # Of each shard: the mtime it was listed at (0: list it again), and what is known of it.
        self._shards: dict[tuple[bytes, str], tuple[int, set[EntryName]]] = {}
        self._hidden: set[EntryName] = set()  # of no use, and to be left where it is
        self._stuck: set[EntryName] = set()  # damaged, and to be set aside once the disk lets us
        self._logged: set[EntryName] = set()

    @property
    def used(self) -> int:
        """Bytes of all entries known and of those being written, in whole blocks."""
        with self.lock:
            return self.index.used + self._reserved

    def tick(self) -> int:
        """The time (ns), later than ever before, so that the order of uses is kept."""
        with self.lock:
            self._now = max(self._now + 1, time.time_ns())
            return self._now

    # ---- one entry -------------------------------------------------------------

    def add(self, name: EntryName, ns: int) -> None:
        """Take in an entry that was put in place, used last at ``ns``."""
        with self.lock:
            self._hidden.discard(name)
            self._stuck.discard(name)
            self.index.add(name, ns)
            self._shards.setdefault((name.fingerprint, name.shard), (0, set()))[1].add(name)

    def drop(self, name: EntryName, hide: bool = False) -> None:
        """Forget an entry that cannot be used now: the next refresh looks whether its file is
        there. ``hide`` one that stays and is of no use."""
        with self.lock:
            self._drop(name)
            if hide:
                self._hidden.add(name)
            elif (shard := self._shards.get((name.fingerprint, name.shard))) is not None:
                self._shards[name.fingerprint, name.shard] = (0, shard[1])

    def _drop(self, name: EntryName) -> None:
        self.index.remove(name)
        shard = self._shards.get((name.fingerprint, name.shard))
        if shard is not None:
            shard[1].discard(name)

    def use(self, name: EntryName, touch: Callable[[int], None] | None = None) -> None:
        """Make an entry the most recently used one, here and for other processes. ``touch`` sets
        the time (ns) of a file that is open, which is sooner done than by name."""
        ns = self.tick()
        with self.lock:
            if name in self.index:
                self.index.touch(name, ns)
        with contextlib.suppress(OSError):
            if touch is None:
                self.directory.touch(name, ns)
            else:
                touch(ns)

    def set_aside(self, name: EntryName, reason: str) -> None:
        """Move a damaged entry into quarantine. Counted and logged once."""
        with self._upkeep:
            self._set_aside(name, reason)

    def _set_aside(self, name: EntryName, reason: str) -> None:
        with self.lock:
            if name in self._stuck:
                return
            counts = name in self.index
            self._drop(name)
        self.log_once(name, f"is damaged ({reason}) and set aside")
        counts |= self._put_away(name)
        with self.lock:
            self.damaged += counts

    def _put_away(self, name: EntryName) -> bool:
        """Quarantine a file, or remove it where that cannot be; False where it is gone."""
        try:
            try:
                return quarantine(self.directory, name)
            except OSError:
                self.directory.remove(name)
        except OSError:
            with self.lock:
                self._stuck.add(name)
        return True

    def log_once(self, name: EntryName, text: str) -> None:
        """A warning about an entry, the first time only."""
        with self.lock:
            first = name not in self._logged
            if len(self._logged) >= _MAX_LOGGED:
                self._logged.clear()
            self._logged.add(name)
        if first:
            logger.warning("disk tier: entry %s %s", name.file, text)

    # ---- room ------------------------------------------------------------------

    def reserve(self, name: EntryName) -> bool:
        """Make room for an entry, which counts as used until :meth:`release`.

        False where only what it continues could make way. Raises OSError like :meth:`make_room`.
        """
        return self._make_room(name.footprint, name)

    def release(self, name: EntryName) -> None:
        """The entry that room was reserved for is in place, or will not be."""
        with self.lock:
            self._reserved -= name.footprint

    def make_room(self, nbytes: int) -> bool:
        """Evict until ``nbytes`` more fit, what nobody continues and was used least recently
        first; False if they cannot. Raises OSError where the disk does not let go of a file."""
        return self._make_room(nbytes, None)

    def evict_unused(self, since: int) -> None:
        """Evict what nobody used after ``since`` (ns). Raises OSError."""
        with self._upkeep:
            while True:
                with self.lock:
                    victim = self.index.oldest()
                    if victim is None or self.index.recency(victim) >= since:
                        return
                self._evict(victim)

    def _make_room(self, nbytes: int, reserve_for: EntryName | None) -> bool:
        if nbytes > self.limit:
            return False
        keep = reserve_for and (reserve_for.fingerprint, reserve_for.parent)
        with self._upkeep:
            while True:
                with self.lock:
                    if self.index.used + self._reserved + nbytes <= self.limit:
                        self._reserved += nbytes if reserve_for else 0
                        return True
                    victim = self.index.oldest(keep)
                if victim is None:
                    return False
                self._evict(victim)

    def _evict(self, victim: EntryName) -> None:
        """Remove an entry, unless another process has used it since we last looked."""
        with self.lock:
            known = self.index.recency(victim) if victim in self.index else 0
        ns = self.directory.recency(victim)
        if ns is not None and known < ns <= time.time_ns():
            with self.lock:
                if victim in self.index:
                    self.index.touch(victim, ns)
            return
        with contextlib.suppress(IsADirectoryError):  # nothing we put there
            self.directory.remove(victim)
        with self.lock:
            self._drop(victim)
            if ns is not None:
                self.evicted += 1
                self.evicted_bytes += victim.size

    # ---- what other processes did ----------------------------------------------

    def load(self) -> list[tuple[bytes, str, str]]:
        """The first :meth:`refresh`. So many new names would make Python's collector look through
        all that the process holds, several times, and find nothing that can go."""
        collecting = gc.isenabled()
        gc.disable()
        try:
            return self.refresh()
        finally:
            if collecting:
                gc.enable()

    def refresh(self, max_age: float = 0.0) -> list[tuple[bytes, str, str]]:
        """Learn what other processes stored and removed, unless that was done ``max_age`` seconds
        ago or less. Lists the shards that changed, and returns the unfinished files in them.
        Raises OSError where the root cannot be listed.
        """
        unfinished: list[tuple[bytes, str, str]] = []
        with self._upkeep:
            if self._refreshed and time.monotonic() - self._refreshed < max_age:
                return []
            self._refreshed = time.monotonic()
            with self.lock:
                gone = set(self._shards)
                stuck, self._stuck = self._stuck, set()
            for name in stuck:
                self._put_away(name)
            for fingerprint, shard, changed in self.directory.shards():
                key = fingerprint, shard
                gone.discard(key)
                if self._shards.get(key, (0,))[0] != changed:
                    unfinished += [(*key, file) for file in self._list(key, changed)]
            for key in gone:
                self._list(key, 0)
        return unfinished

    def _list(self, key: tuple[bytes, str], changed: int) -> list[str]:
        with self.lock:
            # What is published from here on is not in the listing and stays.
            known = set(self._shards[key][1]) if key in self._shards else set()
        now = time.time_ns()
        found = self.directory.list_shard(*key, known)
        with self.lock:
            for name in known - found.names:
                self._drop(name)
            names = self._shards[key][1] if key in self._shards else set()
            for name in (self._hidden | self._stuck).intersection(found.entries):
                del found.entries[name]
            for name, ns in found.entries.items():
                # A clock that was ahead once must not make an entry stay for ever.
                self.index.add(name, min(ns, now))
            names.update(found.entries)
            racy = now - changed < _RACY_NS
            self._shards[key] = (0 if racy else changed, names)
            if not names and not changed:
                del self._shards[key]
        for name in found.damaged:
            self._set_aside(name, "its size is not what its name says")
        return found.temporary


def remove_abandoned(directory: Directory, unfinished: list[tuple[bytes, str, str]]) -> int:
    """Remove those of the unfinished files whose writer is dead; how many there were.

    To be called with files seen earlier: a writer has its lease before its first file. Raises
    OSError.
    """
    alive = {holder.id for holder in holders(directory)}
    dead = 0
    for fingerprint, shard, file in unfinished:
        writer = writer_of(file)
        if writer is not None and writer not in alive:
            directory.remove_temporary(fingerprint, shard, file)
            dead += 1
    return dead
