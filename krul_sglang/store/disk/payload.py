"""An opened segment file: its header checked, its payload read as far as it is asked for."""

from __future__ import annotations

import stat
import threading
import weakref
from collections.abc import Callable, Sequence

import numpy as np
from zlib_ng.zlib_ng import crc32

from krul_sglang.codec.base import CodecError
from krul_sglang.store.disk.calls import Calls
from krul_sglang.store.disk.entry import EntryName, Namespace, as_ids
from krul_sglang.store.disk.header import name_of, read_head

READ_BYTES = 8 << 20
"""Most bytes asked of the system at once."""
HEAD_BYTES = 8192
"""Read of a file first: the whole head of a conversation of up to some 3,000 tokens."""


class ForeignEntryError(Exception):
    """A sound file, but of another namespace or conversation than was asked for: a miss."""


class UnreadableError(CodecError):
    """The device failed: of the bytes themselves nothing is known."""


class DiskPayload:
    """A payload's bytes, in private memory. Thread-safe.

    The descriptor keeps the file's bytes alive when another process removes the file. Nothing
    is mapped: a file that shrinks is a :class:`CodecError`, not a signal.

    entry: what the header says. size: bytes of the payload. view: all ``size`` bytes, read-only;
    anything where nothing has been fetched yet. fetched: how many have.
    """

    def __init__(self, name: EntryName, fd: int, calls: Calls) -> None:
        """Takes ``fd`` over, also where it raises: :class:`CodecError` for a damaged file or
        one that is not what its name says, OSError where the device fails."""
        self.name = name
        self._fd = fd
        self._calls = calls
        self._lock = threading.Lock()
        self._close = weakref.finalize(self, calls.close, fd)
        self.fetched = 0
        try:
            status = calls.stat_open(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size != name.size:
                raise CodecError(f"a file of {status.st_size} bytes, named as {name.size}")
            self.entry, self._offset = read_head(_reader(calls, fd, name.size), name.size)
            self._check_name()
            self.size = self.entry.payload_bytes
            # Not cleared: that takes half as long as reading it from the page cache.
            self._buffer = np.empty(self.size, np.uint8)
        except MemoryError as error:
            self.close()
            raise CodecError(f"no memory for {name.size} bytes") from error
        except BaseException:
            self.close()
            raise
        self.view = self._buffer.data.toreadonly()

    def _check_name(self) -> None:
        """What the digests of the name stand for is compared by whoever asks, see :meth:`match`."""
        entry, name = self.entry, self.name
        found = (entry.fingerprint, entry.start, entry.tokens, entry.exact_tokens)
        if found != (name.fingerprint, name.start, name.tokens, name.exact_tokens):
            raise CodecError("header and name disagree")

    def match(self, namespace: Namespace, ids: Sequence[int] | np.ndarray) -> int:
        """How many leading tokens of the run ``ids`` (from position 0) continue like it.

        Raises :class:`ForeignEntryError` where the namespace or any token before the run differs,
        :class:`CodecError` where that is because the file is not what its name says.
        """
        entry, wanted = self.entry, as_ids(ids)[: len(self.entry.ids)]
        same = entry.ids[: len(wanted)] == wanted
        common = len(wanted) if same.all() else int(np.argmin(same))
        if entry.namespace == namespace and common > entry.start:
            return common - entry.start
        self.check_name()
        raise ForeignEntryError("another namespace or conversation")

    def check_name(self) -> None:
        """Raises :class:`CodecError` where the header's tokens are not those that the digests
        in the name are of."""
        if name_of(self.entry, self._offset) != self.name:
            raise CodecError("the header's tokens are not those its name stands for")

    def touch(self, ns: int) -> None:
        """Say that the file was used at ``ns``. Raises OSError."""
        self._calls.set_time(self._fd, ns)

    def fetch(self, upto: int) -> None:
        """Read on until the payload's first ``upto`` bytes are in :attr:`view`.

        Raises :class:`CodecError` where the file turns out short, and of it
        :class:`UnreadableError` where the device fails.
        """
        with self._lock:
            upto = min(upto, self.size)
            if upto <= self.fetched:
                return
            if not self._close.alive:
                raise CodecError("the file has been closed")
            buffer = self._buffer.data
            try:
                part = buffer[self.fetched : upto]
                _read(self._calls, self._fd, part, self._offset + self.fetched)
            except OSError as error:
                raise UnreadableError(f"reading failed: {error}") from error
            self.fetched = upto

    def check(self) -> None:
        """Read all of it without keeping it.

        Raises :class:`CodecError` where the payload's checksum or what the name stands for
        differs, OSError where the device fails.
        """
        self.check_name()
        buffer = memoryview(bytearray(min(self.size, READ_BYTES)))
        crc = 0
        for offset in range(0, self.size, READ_BYTES):
            part = buffer[: self.size - offset]
            _read(self._calls, self._fd, part, self._offset + offset)
            crc = crc32(part, crc)
        if crc != self.entry.payload_crc:
            raise CodecError("payload checksum differs")

    def close(self) -> None:
        """Close the file; what has been fetched stays readable."""
        with self._lock:
            self._close()


def namespace_of(fd: int, calls: Calls) -> Namespace:
    """Whose KV an open file holds. Raises :class:`CodecError` where its header is damaged or of
    a later format, OSError where the device fails."""
    size = calls.stat_open(fd).st_size
    return read_head(_reader(calls, fd, size), size)[0].namespace


def _reader(calls: Calls, fd: int, size: int) -> Callable[[int, int], bytes]:
    """Bytes of an open file of ``size``; of its beginning, after one read for all of it."""
    beginning = _bytes(calls, fd, 0, min(size, HEAD_BYTES))

    def read(offset: int, length: int) -> bytes:
        if offset + length <= len(beginning):
            return beginning[offset : offset + length]
        return _bytes(calls, fd, offset, length)

    return read


def _bytes(calls: Calls, fd: int, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    _read(calls, fd, memoryview(buffer), offset)
    return bytes(buffer)


def _read(calls: Calls, fd: int, into: memoryview, offset: int) -> None:
    done = 0
    while done < len(into):
        count = calls.read(fd, into[done : done + READ_BYTES], offset + done)
        if count <= 0:
            raise CodecError("the file ends early")
        done += count
