"""System calls of a disk tier that fail or hang where a test says so."""

from __future__ import annotations

import errno
import threading
from collections.abc import Sequence

from krul_sglang.store.disk.calls import Calls


class FaultyCalls(Calls):
    """``fail_read``, ``hang_read``: the how-manieth read from now on, from 0; ``hang_write``:
    whether the next write does. What hangs goes on when ``gate`` is set, and says that it hangs by
    setting ``at_gate``. ``error``: what a read that fails raises; None makes the file end there.
    reads: how many there were."""

    def __init__(self) -> None:
        self.reads = 0
        self.fail_read: int | None = None
        self.hang_read: int | None = None
        self.hang_write = False
        self.error: int | None = errno.EIO
        self.gate = threading.Event()
        self.at_gate = threading.Event()

    def arm(self, *, fail: int | None = None, hang: int | None = None) -> None:
        """Count reads anew, and let one of them go wrong."""
        self.reads, self.fail_read, self.hang_read = 0, fail, hang

    def read(self, fd: int, into: memoryview, offset: int) -> int:
        number, self.reads = self.reads, self.reads + 1
        if number == self.hang_read:
            self._hang()
        if self.fail_read is not None and number >= self.fail_read:
            if self.error is None:
                return 0
            raise OSError(self.error, "as asked")
        return super().read(fd, into, offset)

    def write(self, fd: int, parts: Sequence[memoryview]) -> int:
        if self.hang_write:
            self.hang_write = False
            self._hang()
        return super().write(fd, parts)

    def _hang(self) -> None:
        self.at_gate.set()
        self.gate.wait(30)
