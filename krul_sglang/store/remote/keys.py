"""Under which keys entries lie, and how those that continue a conversation are found.

An entry's bytes lie under its file name. Where runs end is not known to whoever asks, so each
entry is also listed under a mark: the digest of the conversation up to the last of a fixed
series of positions that its run reaches. One round trip asks for the lists at all marks of a
conversation; what is listed there and agrees with it is put together like the disk's entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from krul_sglang.store.disk.digest import prefix_digests
from krul_sglang.store.disk.entry import EntryName, Namespace

LAYOUT = "krul:1"
GRAIN = 64
"""Tokens between marks, up to 128 of them; then the last doubling is cut into 64. Below the
first, every position is one: a list at position 0 would hold all conversations' openings."""
LISTED = 256
"""Entries that a mark lists at most, the newest. Only conversations that part and end between
two marks share a list."""


def mark_of(stop: int) -> int:
    """The mark that a run which ends at ``stop`` is listed under."""
    return stop if stop < GRAIN else stop - stop % _grain(stop)


def marks(lo: int, hi: int) -> Iterator[int]:
    """Marks of all runs that end behind ``lo`` and at ``hi`` at most, ascending."""
    position = mark_of(lo + 1)
    while position <= hi:
        yield position
        position += 1 if position < GRAIN else _grain(position)


def _grain(position: int) -> int:
    return max(GRAIN, 1 << position.bit_length() - 1 >> 6)


class Keys:
    """Keys of one fingerprint and namespace."""

    def __init__(self, fingerprint: bytes, namespace: Namespace) -> None:
        self._namespace = namespace
        (whose,) = prefix_digests(namespace, [], [0])
        # Whose it is has a place of its own, so that one tenant's keys can be told by pattern.
        self._prefix = f"{LAYOUT}:{fingerprint.hex()}:{whose.hex()}"

    def entry(self, name: EntryName) -> str:
        """Where an entry's bytes are."""
        return f"{self._prefix}:kv:{name.file}"

    def lists(self, ids: Sequence[int] | np.ndarray, positions: Sequence[int]) -> list[str]:
        """Where the entries are listed whose mark is at each of the rising ``positions``."""
        found = prefix_digests(self._namespace, ids, positions)
        return [f"{self._prefix}:at:{digest.hex()}" for digest in found]

    def list_of(self, ids: Sequence[int] | np.ndarray, stop: int) -> str:
        """Where an entry that ends at ``stop`` is listed."""
        return self.lists(ids, [mark_of(stop)])[0]
