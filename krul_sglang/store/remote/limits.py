"""What a reply may cost: seconds and bytes, however the server behaves.

The client's own timeout is for each piece of a reply: a server that sends a byte now and then
would hold it for ever, and one that sends on and on would fill the memory. So its sockets
count both, for the exchange that the calling thread is in.
"""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection


class _Allowance(threading.local):
    deadline = math.inf
    nbytes = math.inf


_ALLOWED = _Allowance()


@contextlib.contextmanager
def limited(seconds: float, nbytes: float) -> Iterator[None]:
    """Inside, this thread's sockets end with an OSError after ``seconds``, or when they
    received more than ``nbytes``."""
    _ALLOWED.deadline, _ALLOWED.nbytes = time.monotonic() + seconds, nbytes
    try:
        yield
    finally:
        _ALLOWED.deadline = _ALLOWED.nbytes = math.inf


class _Socket:
    """A socket that counts against the calling thread's allowance."""

    def __init__(self, inner: socket.socket) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _narrow(self) -> None:
        left = _ALLOWED.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the reply took too long")
        usual = self._inner.gettimeout()
        if usual != 0 and left < (math.inf if usual is None else usual):
            self._inner.settimeout(left)

    def _count(self, nbytes: int) -> None:
        _ALLOWED.nbytes -= nbytes
        if _ALLOWED.nbytes < 0:
            raise ConnectionAbortedError("the reply is longer than it may be")

    def recv(self, size: int, flags: int = 0) -> bytes:
        self._narrow()
        found = self._inner.recv(size, flags)
        if not flags:
            self._count(len(found))
        return found

    def recv_into(self, buffer: Any, *args: Any) -> int:
        self._narrow()
        count = self._inner.recv_into(buffer, *args)
        self._count(count)
        return count

    def sendall(self, content: Any, *args: Any) -> None:
        self._narrow()
        self._inner.sendall(content, *args)


class _Limited:
    def _connect(self) -> Any:
        return _Socket(super()._connect())  # type: ignore[misc]


class LimitedConnection(_Limited, Connection):
    """TCP."""


class LimitedSSLConnection(_Limited, SSLConnection):
    """TCP with TLS."""


class LimitedUnixConnection(_Limited, UnixDomainSocketConnection):
    """A socket on this machine."""


CONNECTIONS = {
    "redis": LimitedConnection,
    "rediss": LimitedSSLConnection,
    "unix": LimitedUnixConnection,
}
