"""Leases: which processes use a directory, told by locks that die with their holders.

A lease is a file ``ROOT/v1/leases/<id>`` on which its owner holds an exclusive ``flock``.
Unlike a process id, a lock can be asked about from another container, is never taken over by
a later process and does not outlive a reboot. Temporary files carry the id of their writer's
lease, so whoever opens the directory knows which of them nobody will finish.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import socket
import time
from typing import NamedTuple

from krul_sglang.store.disk.directory import LEASES, TEMPORARY, Directory

_ID = re.compile("[0-9a-f]{16}")
_DRAFT = re.compile(rf"{re.escape(TEMPORARY)}([0-9a-f]{{16}})-[0-9]+")
_MAX_NOTE = 4096


class Holder(NamedTuple):
    """A process that uses the directory, as it says itself.

    started: seconds since the epoch. fingerprint: in hexadecimal. Zeros and blanks where the
    note cannot be read.
    """

    id: str
    pid: int = 0
    host: str = ""
    started: float = 0.0
    fingerprint: str = ""


class Lease:
    """Held from construction to :meth:`close`. Raises OSError where no file can be locked."""

    def __init__(self, directory: Directory, fingerprint: bytes) -> None:
        self._directory = directory
        calls = directory.calls
        note = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.time()}
        text = json.dumps({**note, "fingerprint": fingerprint.hex()}).encode()
        while True:
            self.id = secrets.token_hex(8)
            with directory.at(LEASES, create=True) as fd:
                self._fd = calls.create(self.id, fd)
            try:
                calls.lock(self._fd, fcntl.LOCK_EX)
                # Whoever looked before the lock was there has taken the file for stale.
                if self.is_intact():
                    calls.write(self._fd, [memoryview(text)])
                    return
            except BaseException:
                self.close()
                raise
            calls.close(self._fd)

    def is_intact(self) -> bool:
        """Whether others can still see it: not when the directory was deleted under us."""
        return self._directory.calls.stat_open(self._fd).st_nlink > 0

    def close(self) -> None:
        """Give it up."""
        with contextlib.suppress(OSError), self._directory.at(LEASES) as fd:
            self._directory.calls.remove(self.id, fd)
        self._directory.calls.close(self._fd)


def holders(directory: Directory) -> list[Holder]:
    """Processes that use the directory now. Removes leases whose owner is dead."""
    found = []
    try:
        with directory.at(LEASES) as fd:
            for file in sorted(directory.calls.list_directory(fd)):
                if _ID.fullmatch(file) and (holder := _holder(directory, file, fd)):
                    found.append(holder)
    except FileNotFoundError:
        pass
    return found


def _holder(directory: Directory, file: str, leases: int) -> Holder | None:
    calls = directory.calls
    try:
        fd = calls.open_file(file, leases)
    except OSError as error:
        # Not ours to read, so perhaps somebody's: only what is surely stale may go.
        return None if error.errno in (errno.ENOENT, errno.ELOOP) else Holder(file)
    try:
        try:
            calls.lock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return _note(file, directory, fd)
        with contextlib.suppress(OSError):
            calls.remove(file, leases)  # while locked: an owner about to lock it sees it gone
        return None
    finally:
        calls.close(fd)


def _note(file: str, directory: Directory, fd: int) -> Holder:
    buffer = memoryview(bytearray(_MAX_NOTE))
    try:
        note = json.loads(bytes(buffer[: directory.calls.read(fd, buffer, 0)]))
        kinds = {"pid": int, "host": str, "started": float, "fingerprint": str}
        if all(type(note[name]) is kind for name, kind in kinds.items()):
            return Holder(file, **{name: note[name] for name in kinds})
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        pass
    return Holder(file)


def writer_of(file: str) -> str | None:
    """The lease id that a temporary file's name carries."""
    match = _DRAFT.fullmatch(file)
    return match[1] if match else None
