"""What a disk tier's directory holds, by conversation: from names and headers, no payload read.

A conversation is a way through entries that continue each other, to an end that none continues.
What two conversations share counts for both, and once in the total.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from krul_sglang.codec.base import CodecError
from krul_sglang.inspection.identity import namespace_hash
from krul_sglang.store.disk.calls import Calls
from krul_sglang.store.disk.directory import Directory
from krul_sglang.store.disk.entry import EntryName, Namespace
from krul_sglang.store.disk.payload import DiskPayload

End = tuple[bytes, bytes]
"""Fingerprint and digest of the tokens up to some position."""


@dataclass(frozen=True)
class Kept:
    """One entry. used: when it was used last, seconds since the epoch. ids_hash: of its
    conversation up to its end, see :mod:`krul_sglang.inspection.identity`."""

    name: EntryName
    namespace: Namespace
    codec: str
    raw_bytes: int
    used: float
    ids_hash: str


@dataclass(frozen=True)
class Conversation:
    """Entries in order. id: as a running server names it. missing: tokens before the first
    entry, which was removed: a request can use the rest only while the device holds those."""

    id: str
    entries: tuple[Kept, ...]

    @property
    def missing(self) -> int:
        """Tokens that lead to the first entry."""
        return self.entries[0].name.start

    @property
    def tokens(self) -> int:
        """Tokens of the conversation, as far as anything of it is stored."""
        return self.entries[-1].name.stop

    @property
    def used(self) -> float:
        """When any of it was used last, seconds since the epoch."""
        return max(one.used for one in self.entries)


class Survey(NamedTuple):
    """Everything in a directory. unread: entries whose header could not be read."""

    conversations: list[Conversation]
    entries: list[Kept]
    unread: int


def survey(root: Path, told: Callable[[int, int], None]) -> Survey:
    """The directory's conversations, those used last first. ``told`` is called with how many
    headers were read, of how many. Raises OSError where the root cannot be listed."""
    directory = Directory(root, Calls())
    found: list[tuple[EntryName, int]] = []
    for fingerprint, shard, _ in directory.shards():
        found += directory.list_shard(fingerprint, shard).entries.items()
    entries: list[Kept] = []
    unread = 0
    for done, (name, ns) in enumerate(found):
        told(done, len(found))
        try:
            entries.append(_kept(directory, name, ns / 1e9))
        except FileNotFoundError:
            continue
        except (CodecError, OSError):
            unread += 1
    return Survey(_conversations(entries), entries, unread)


def _kept(directory: Directory, name: EntryName, used: float) -> Kept:
    payload = DiskPayload(name, directory.open_entry(name), directory.calls)
    payload.close()
    entry = payload.entry
    digest = namespace_hash(entry.namespace.extra_key, entry.namespace.cache_salt)
    digest.update(entry.ids.data)
    return Kept(name, entry.namespace, entry.codec, entry.raw_bytes, used, digest.hexdigest())


def _conversations(entries: list[Kept]) -> list[Conversation]:
    ending: dict[End, list[Kept]] = defaultdict(list)
    for one in entries:
        ending[one.name.fingerprint, one.name.end].append(one)
    continued = {(one.name.fingerprint, one.name.parent) for one in entries}
    found = []
    for end, alike in ending.items():
        if end in continued:
            continue
        path = [_smallest(alike)]
        while path[-1].name.start:
            before = ending.get((end[0], path[-1].name.parent))
            # A name that leads back to a later position is none that was written honestly.
            if not before or _smallest(before).name.stop != path[-1].name.start:
                break
            path.append(_smallest(before))
        found.append(Conversation(path[0].ids_hash, tuple(reversed(path))))
    return sorted(found, key=lambda one: one.used, reverse=True)


def _smallest(alike: list[Kept]) -> Kept:
    """What a lookup takes of entries that end at the same token."""
    return min(alike, key=lambda one: (one.name.start, one.name.size))
