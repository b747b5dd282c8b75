"""The longest way through stored entries along one conversation."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from krul_sglang.store.disk.digest import RollingDigest
from krul_sglang.store.disk.entry import EntryName, Namespace
from krul_sglang.store.disk.index import Index


class StoredPath(NamedTuple):
    """Entries that follow each other along a conversation.

    names: in order, without gaps. stop: position behind the last of them. digest: of the
    conversation up to there, so entries that begin there can be asked for.
    """

    names: tuple[EntryName, ...]
    stop: int
    digest: bytes


def longest_path(
    index: Index,
    fingerprint: bytes,
    namespace: Namespace,
    ids: Sequence[int] | np.ndarray,
    starts: Iterable[int],
    usable: Callable[[EntryName], bool],
) -> StoredPath | None:
    """The path from one of ``starts`` that reaches furthest along ``ids``, None if there is none.

    usable: entries it may contain. Of entries over the same tokens the smallest is taken; of
    paths to the same position the one with the latest start. One pass over ``ids``, and a
    digest at every position where something may end.
    """
    rolling = RollingDigest(namespace, ids)
    total = len(ids)
    waiting = sorted({start for start in starts if 0 <= start <= total})
    begins = set(waiting)
    origin: dict[int, int] = {}  # of each position that is reached, the path's start
    reached_by: dict[int, EntryName] = {}
    digests: dict[int, bytes] = {}
    seen: set[int] = set(waiting)
    while waiting:
        position = heapq.heappop(waiting)
        digest = rolling.at(position)
        if position in begins:
            origin[position] = position
        else:
            arrived = [
                (-origin[name.start], name.size, name)
                for name in index.ending(fingerprint, digest, position)
                # The parent too: the end's digest alone would do, were all names honest.
                if digests.get(name.start) == name.parent and usable(name)
            ]
            if not arrived:
                continue
            least = min(arrived)
            origin[position], reached_by[position] = -least[0], least[2]
        digests[position] = digest
        for stop in index.stops(fingerprint, digest):
            if position < stop <= total and stop not in seen:
                seen.add(stop)
                heapq.heappush(waiting, stop)
    if not reached_by:
        return None
    stop = position = max(reached_by)
    names: list[EntryName] = []
    while (name := reached_by.get(position)) is not None:
        names.append(name)
        position = name.start
    return StoredPath(tuple(reversed(names)), stop, digests[stop])
