"""The directory's contents in memory: who continues whom, and who was used least recently."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from krul_sglang.store.disk.entry import EntryName

ENTRY_BYTES = 1000
"""What an entry costs in host memory, about (measured: docs/format.md)."""


class _Branch:
    """Entries that begin at the same tokens: where they stop, and how many of them there."""

    def __init__(self) -> None:
        self.names: set[EntryName] = set()
        self.stops: dict[int, int] = {}

    def add(self, name: EntryName) -> None:
        self.names.add(name)
        self.stops[name.stop] = self.stops.get(name.stop, 0) + 1

    def remove(self, name: EntryName) -> None:
        self.names.remove(name)
        self.stops[name.stop] -= 1
        if not self.stops[name.stop]:
            del self.stops[name.stop]


class Index:
    """Not thread-safe: whoever owns it locks. ``used`` is the footprint of all entries.

    An entry is dispensable when none continues it, or when another covers the same tokens.
    """

    def __init__(self) -> None:
        self.used = 0
        self._recency: dict[EntryName, int] = {}
        # By fingerprint and digest. Most entries have one child, which then stands for itself.
        self._children: dict[tuple[bytes, bytes], EntryName | _Branch] = {}
        self._ending: dict[tuple[bytes, bytes], tuple[EntryName, ...]] = {}
        # Every dispensable entry with its present recency, and some that are not so any more.
        # Empty until something is to be evicted: opening a large directory is to be quick.
        self._queue: list[tuple[int, EntryName]] = []

    def __len__(self) -> int:
        return len(self._recency)

    def __contains__(self, name: EntryName) -> bool:
        return name in self._recency

    def __iter__(self) -> Iterator[EntryName]:
        return iter(self._recency)

    def recency(self, name: EntryName) -> int:
        """When it was last used (ns)."""
        return self._recency[name]

    def add(self, name: EntryName, ns: int) -> None:
        """Take an entry in, used last at ``ns``; of a known one, the time only."""
        if name in self._recency:
            self.touch(name, ns)
            return
        self._recency[name] = ns
        self.used += name.footprint
        key = (name.fingerprint, name.end)
        ending = self._ending.get(key, ())
        self._ending[key] = (*ending, name)
        self._adopt(name)
        if self._queue:
            for other in (*ending, name):
                self._offer(other)

    def _adopt(self, name: EntryName) -> None:
        key = (name.fingerprint, name.parent)
        siblings = self._children.get(key)
        if siblings is None:
            self._children[key] = name
            return
        if not isinstance(siblings, _Branch):
            only, siblings = siblings, _Branch()
            siblings.add(only)
            self._children[key] = siblings
        siblings.add(name)

    def touch(self, name: EntryName, ns: int) -> None:
        """Say that it was used at ``ns``."""
        if self._recency[name] != ns:
            self._recency[name] = ns
            self._offer(name)

    def remove(self, name: EntryName) -> None:
        """Let an entry go; an unknown one is fine."""
        if self._recency.pop(name, None) is None:
            return
        self.used -= name.footprint
        key = (name.fingerprint, name.end)
        ending = tuple(other for other in self._ending[key] if other != name)
        if ending:
            self._ending[key] = ending
        else:
            del self._ending[key]
        key = (name.fingerprint, name.parent)
        siblings = self._children[key]
        if isinstance(siblings, _Branch):
            siblings.remove(name)
        if not isinstance(siblings, _Branch) or not siblings.names:
            del self._children[key]
            for parent in self._ending.get(key, ()):
                self._offer(parent)

    def _offer(self, name: EntryName) -> None:
        if self._queue and self._is_dispensable(name):
            heapq.heappush(self._queue, (self._recency[name], name))
            if len(self._queue) > 2 * len(self._recency) + 1024:
                self._queue.clear()

    def _is_dispensable(self, name: EntryName) -> bool:
        return (name.fingerprint, name.end) not in self._children or len(self._alike(name)) > 1

    def _alike(self, name: EntryName) -> tuple[EntryName, ...]:
        return self._ending[name.fingerprint, name.end]

    def oldest(self, keep: tuple[bytes, bytes] | None = None) -> EntryName | None:
        """The least recently used dispensable entry, None when there is no entry.

        keep: fingerprint and digest of an end that is about to be continued, so that no entry
        is removed for the sake of its own continuation.
        """
        if not self._queue:
            dispensable = filter(self._is_dispensable, self._recency)
            self._queue = [(self._recency[name], name) for name in dispensable]
            heapq.heapify(self._queue)
        kept = []
        found = None
        while self._queue and found is None:
            ns, name = self._queue[0]
            if self._recency.get(name) != ns or not self._is_dispensable(name):
                heapq.heappop(self._queue)
            elif (name.fingerprint, name.end) == keep and len(self._alike(name)) == 1:
                kept.append(heapq.heappop(self._queue))
            else:
                found = name
        for item in kept:
            heapq.heappush(self._queue, item)
        if found is None and not kept and self._recency:
            # Names that continue each other in a circle: nothing we wrote.
            found = min(self._recency, key=self._recency.__getitem__)
        return found

    # ---- lookup ----------------------------------------------------------------

    def beginning(self, fingerprint: bytes, parent: bytes, start: int) -> list[EntryName]:
        """Entries whose run begins behind the tokens of digest ``parent``."""
        found = self._children.get((fingerprint, parent))
        names = found.names if isinstance(found, _Branch) else {found} if found else set()
        return [name for name in names if name.start == start]

    def stops(self, fingerprint: bytes, parent: bytes) -> list[int]:
        """The positions where those entries end, each once."""
        found = self._children.get((fingerprint, parent))
        if isinstance(found, _Branch):
            return list(found.stops)
        return [found.stop] if found else []

    def ending(self, fingerprint: bytes, end: bytes, stop: int) -> list[EntryName]:
        """Entries whose run ends with the tokens of digest ``end``."""
        return [n for n in self._ending.get((fingerprint, end), ()) if n.stop == stop]
