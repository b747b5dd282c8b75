"""Where segment files lie, and how one is put there, found and taken away.

``ROOT/v1/<fingerprint>/<shard>/<name>.krul``, beside them ``ROOT/v1/leases`` and
``ROOT/v1/quarantine``. Nothing is kept open between calls and nothing remembered, so whatever
other processes do to the directory, the next call sees it.

A file is complete or absent: it is written under a temporary name that carries its writer's
lease and renamed when whole. That withstands the death of any process at any moment. Without
``durable`` nothing is fsynced: after a power loss a file may be missing, short or damaged,
which its size and checksums tell.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from krul_sglang.codec.base import Payload
from krul_sglang.store.disk.calls import Calls
from krul_sglang.store.disk.entry import MAX_FINGERPRINT, MIN_FINGERPRINT, EntryName

LAYOUT = "v1"
LEASES = "leases"
QUARANTINE = "quarantine"
TEMPORARY = ".tmp-"
_HEX = frozenset("0123456789abcdef")


@dataclass
class Shard:
    """What one listing of a shard found.

    entries: recency (mtime, ns) of entries that were not known before. names: all entries.
    damaged: files whose size is not what their name says. temporary: unfinished files.
    """

    names: set[EntryName] = field(default_factory=set)
    entries: dict[EntryName, int] = field(default_factory=dict)
    damaged: list[EntryName] = field(default_factory=list)
    temporary: list[str] = field(default_factory=list)


class Directory:
    """One root. Thread-safe: it has no state. All methods raise OSError."""

    def __init__(self, root: str | os.PathLike[str], calls: Calls, durable: bool = False) -> None:
        self.root = os.fspath(root)
        self.calls = calls
        self._durable = durable

    @contextlib.contextmanager
    def at(self, *parts: str, create: bool = False) -> Iterator[int]:
        """A descriptor of ``ROOT/v1/parts...``, closed at the end."""
        fd = self.calls.open_root(self.root, create)
        try:
            for part in (LAYOUT, *parts):
                parent, fd = fd, self._child(part, fd, create)
                self.calls.close(parent)
            yield fd
        finally:
            self.calls.close(fd)

    def _child(self, name: str, parent: int, create: bool) -> int:
        try:
            return self.calls.open_directory(name, parent)
        except FileNotFoundError:
            if not create:
                raise
        with contextlib.suppress(FileExistsError):
            self.calls.make_directory(name, parent)
            if self._durable:
                self.calls.sync(parent)
        return self.calls.open_directory(name, parent)

    def _of(self, name: EntryName, create: bool = False) -> contextlib.AbstractContextManager[int]:
        return self.at(name.fingerprint.hex(), name.shard, create=create)

    # ---- finding ---------------------------------------------------------------

    def shards(self) -> Iterator[tuple[bytes, str, int]]:
        """Fingerprint, name and mtime (ns) of every shard there is."""
        for part in self._listed():
            if not _is_fingerprint(part):
                continue
            # One that is another user's, or a link, is not ours to look into.
            foreign = (FileNotFoundError, NotADirectoryError, PermissionError)
            with contextlib.suppress(*foreign), self.at(part) as fd:
                for shard in sorted(self.calls.list_directory(fd)):
                    if len(shard) != 2 or not _HEX.issuperset(shard):
                        continue
                    with contextlib.suppress(FileNotFoundError):
                        found = self.calls.stat(shard, fd)
                        if stat.S_ISDIR(found.st_mode):
                            yield bytes.fromhex(part), shard, found.st_mtime_ns

    def _listed(self) -> list[str]:
        try:
            with self.at() as fd:
                return sorted(self.calls.list_directory(fd))
        except FileNotFoundError:
            return []

    def list_shard(
        self, fingerprint: bytes, shard: str, known: Collection[EntryName] = ()
    ) -> Shard:
        """What lies in a shard; ``known`` entries are not looked at again."""
        found = Shard()
        with contextlib.ExitStack() as stack:
            try:
                fd = stack.enter_context(self.at(fingerprint.hex(), shard))
            except FileNotFoundError:
                return found
            number = int(shard, 16)
            for file in self.calls.list_directory(fd):
                name = EntryName.parse(fingerprint, file)
                if name is None:
                    if file.startswith(TEMPORARY):
                        found.temporary.append(file)
                    continue
                if name.end[0] != number:
                    continue
                if not known or name not in known:
                    try:
                        status = self.calls.stat(file, fd)
                    except FileNotFoundError:
                        continue
                    if not stat.S_ISREG(status.st_mode):
                        continue
                    if status.st_size != name.size:
                        found.damaged.append(name)
                        continue
                    found.entries[name] = status.st_mtime_ns
                found.names.add(name)
        return found

    def recency(self, name: EntryName) -> int | None:
        """When it was last used (ns), None when it is gone or not what its name says."""
        try:
            with self._of(name) as fd:
                found = self.calls.stat(name.file, fd)
        except FileNotFoundError:
            return None
        sound = stat.S_ISREG(found.st_mode) and found.st_size == name.size
        return found.st_mtime_ns if sound else None

    # ---- changing --------------------------------------------------------------

    def write(
        self,
        name: EntryName,
        head: Callable[[], bytes],
        payload: Payload,
        owner: str,
        number: int,
        ns: int,
    ) -> None:
        """Put a file in place, used last at ``ns``. A file of that name is replaced.

        ``head`` is asked for when the payload has been written: it carries the payload's checksum.
        ``owner`` is the lease that says the writer lives, ``number`` tells its files apart.
        Leaves no temporary file behind when it fails.
        """
        draft = f"{TEMPORARY}{owner}-{number}"
        with self._of(name, create=True) as directory:
            fd = self.calls.create(draft, directory)
            try:
                try:
                    self.calls.seek(fd, name.size - len(payload))
                    self._write_all(fd, payload)
                    self.calls.seek(fd, 0)
                    self._write_all(fd, head())
                    self.calls.set_time(fd, ns)
                    if self._durable:
                        self.calls.sync(fd)
                finally:
                    self.calls.close_written(fd)
                self.calls.replace(draft, name.file, directory, directory)
            except BaseException:
                with contextlib.suppress(OSError):
                    self.calls.remove(draft, directory)
                raise
            if self._durable:
                self.calls.sync(directory)

    def _write_all(self, fd: int, part: Payload) -> None:
        left = memoryview(part)
        while left:
            written = self.calls.write(fd, [left])
            if written <= 0:
                raise OSError(errno.EIO, "nothing was written")
            left = left[written:]

    def open_entry(self, name: EntryName) -> int:
        """A descriptor of the file, which the caller closes."""
        with self._of(name) as directory:
            return self.calls.open_file(name.file, directory)

    def touch(self, name: EntryName, ns: int) -> None:
        """Say that it was used at ``ns``."""
        with self._of(name) as directory:
            self.calls.set_time_of(name.file, directory, ns)

    def remove(self, name: EntryName) -> None:
        """Take a file away; one that is gone already is fine."""
        with contextlib.suppress(FileNotFoundError), self._of(name) as directory:
            self.calls.remove(name.file, directory)

    def remove_temporary(self, fingerprint: bytes, shard: str, file: str) -> None:
        """Remove an unfinished file whose writer is dead."""
        with contextlib.suppress(FileNotFoundError), self.at(fingerprint.hex(), shard) as fd:
            self.calls.remove(file, fd)

    def remove_if_empty(self, fingerprint: bytes, shard: str) -> None:
        """Remove a shard, and its fingerprint's directory, where nothing is left in it."""
        with contextlib.suppress(OSError):
            with self.at(fingerprint.hex()) as fd:
                self.calls.remove_directory(shard, fd)
            with self.at() as fd:
                self.calls.remove_directory(fingerprint.hex(), fd)


def _is_fingerprint(part: str) -> bool:
    size = range(2 * MIN_FINGERPRINT, 2 * MAX_FINGERPRINT + 1, 2)
    return len(part) in size and _HEX.issuperset(part)
