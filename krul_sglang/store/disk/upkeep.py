"""What an operator may ask of a directory, also while servers use it.

A server takes what disappears here for a miss, and learns of it when it next looks.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from krul_sglang.codec.base import CodecError
from krul_sglang.store.disk.calls import Calls
from krul_sglang.store.disk.catalog import Catalog, remove_abandoned
from krul_sglang.store.disk.directory import QUARANTINE, Directory
from krul_sglang.store.disk.entry import EntryName, Namespace
from krul_sglang.store.disk.header import FutureVersionError
from krul_sglang.store.disk.lease import Holder, holders
from krul_sglang.store.disk.payload import DiskPayload, namespace_of
from krul_sglang.store.disk.quarantine import quarantine, quarantined, trim

_NO_LIMIT = 1 << 62


class Verdict(Enum):
    """How an entry was found."""

    SOUND = "sound"
    DAMAGED = "damaged"
    """It is in quarantine now."""
    FUTURE = "of a later format"
    UNREADABLE = "unreadable"
    """The device failed; the file was left where it is."""


@dataclass(frozen=True)
class Checked:
    """One entry that was verified: why it is not sound, and how far the whole has come.

    done, total: bytes of the entries checked so far, and of all that were there at the start.
    """

    name: EntryName
    verdict: Verdict
    reason: str
    done: int
    total: int


@dataclass(frozen=True)
class Collected:
    """What :func:`gc` removed (files of dead writers: abandoned), and what is left."""

    evicted: int
    evicted_bytes: int
    abandoned: int
    damaged: int
    entries: int
    used: int


def in_use(root: str | os.PathLike[str]) -> list[Holder]:
    """The processes that use a directory now. Raises OSError."""
    return holders(Directory(root, Calls()))


def verify(root: str | os.PathLike[str], calls: Calls | None = None) -> Iterator[Checked]:
    """Read and check every byte of every entry; damaged ones are quarantined. Raises OSError
    where the root cannot be listed."""
    directory = Directory(root, calls or Calls())
    names = list(_entries(directory))
    total, done = sum(name.size for name in names), 0
    for name in names:
        done += name.size
        with contextlib.suppress(FileNotFoundError):
            verdict, reason = _verdict(directory, name)
            if verdict is Verdict.DAMAGED:
                with contextlib.suppress(OSError):
                    quarantine(directory, name)
            yield Checked(name, verdict, reason, done, total)


def _entries(directory: Directory) -> Iterator[EntryName]:
    for fingerprint, shard, _ in directory.shards():
        found = directory.list_shard(fingerprint, shard)
        yield from sorted(found.names)
        yield from found.damaged


def _verdict(directory: Directory, name: EntryName) -> tuple[Verdict, str]:
    try:
        payload = DiskPayload(name, directory.open_entry(name), directory.calls)
        try:
            payload.check()
        finally:
            payload.close()
    except FutureVersionError as error:
        return Verdict.FUTURE, str(error)
    except CodecError as error:
        return Verdict.DAMAGED, str(error)
    except FileNotFoundError:
        raise
    except OSError as error:
        return Verdict.UNREADABLE, str(error)
    return Verdict.SOUND, ""


def gc(
    root: str | os.PathLike[str],
    limit: int | None = None,
    unused_for: float | None = None,
    calls: Calls | None = None,
) -> Collected:
    """Evict down to ``limit`` bytes and whatever was not used for ``unused_for`` seconds; remove
    what dead writers left, and empty directories. Raises OSError."""
    directory = Directory(root, calls or Calls())
    catalog = Catalog(directory, _NO_LIMIT if limit is None else limit)
    abandoned = remove_abandoned(directory, catalog.refresh())
    if unused_for is not None:
        catalog.evict_unused(time.time_ns() - int(unused_for * 1e9))
    catalog.make_room(0)
    trim(directory)
    for fingerprint, shard, _ in list(directory.shards()):
        directory.remove_if_empty(fingerprint, shard)
    return Collected(
        evicted=catalog.evicted,
        evicted_bytes=catalog.evicted_bytes,
        abandoned=abandoned,
        damaged=catalog.damaged,
        entries=len(catalog.index),
        used=catalog.used,
    )


def forget(
    root: str | os.PathLike[str], namespace: Namespace, calls: Calls | None = None
) -> tuple[int, int]:
    """Remove every entry of a tenant, of any fingerprint; how many, and their bytes.

    namespace: a part that is None matches any, so that a salt alone names all adapters that were
    used with it; at least one part must be given (ValueError). Entries and quarantined files
    whose header cannot be read go too: they might be the tenant's. What a server holds in memory
    stays, and it may store that again. Raises OSError.
    """
    if namespace == Namespace():
        raise ValueError("an extra key or a cache salt is needed: nothing else names a tenant")
    directory = Directory(root, calls or Calls())
    remove_abandoned(directory, Catalog(directory, _NO_LIMIT).refresh())
    count = nbytes = 0
    for name in list(_entries(directory)):
        with contextlib.suppress(FileNotFoundError):
            if _may_be_of(namespace, directory, directory.open_entry(name)):
                directory.remove(name)
                count, nbytes = count + 1, nbytes + name.size
    for file, size in quarantined(directory):
        with contextlib.suppress(FileNotFoundError), directory.at(QUARANTINE) as fd:
            if _may_be_of(namespace, directory, directory.calls.open_file(file, fd)):
                directory.calls.remove(file, fd)
                count, nbytes = count + 1, nbytes + size
    return count, nbytes


def _may_be_of(namespace: Namespace, directory: Directory, fd: int) -> bool:
    try:
        found = namespace_of(fd, directory.calls)
        return all(part in (None, own) for part, own in zip(namespace, found, strict=True))
    except CodecError:
        return True
    finally:
        directory.calls.close(fd)
