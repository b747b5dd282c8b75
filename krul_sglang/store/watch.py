"""A device that does not answer is noticed, and not asked again until it does.

A read from a disk that hangs (a network file system whose server is gone, a dying drive) cannot
be interrupted. It is made on a thread that may hang, and whoever asked goes on without it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

PATIENCE = 2.0
"""Seconds after which a call counts as hanging."""

T = TypeVar("T")


class StalledError(Exception):
    """The device does not answer."""


class Watch:
    """Thread-safe. ``seconds``: after which a call counts as hanging."""

    def __init__(self, seconds: float = PATIENCE) -> None:
        self.seconds = seconds
        self._lock = threading.Lock()
        self._under_way: dict[object, float] = {}
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def stalled(self) -> bool:
        """Whether any call has been under way for too long."""
        with self._lock:
            oldest = min(self._under_way.values(), default=None)
        return oldest is not None and time.monotonic() - oldest > self.seconds

    @contextmanager
    def around(self) -> Iterator[None]:
        """What is inside may hang; others learn of it."""
        key = object()
        with self._lock:
            self._under_way[key] = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                del self._under_way[key]

    def call(self, function: Callable[[], T]) -> T:
        """What ``function`` returns or raises, called on another thread. Raises
        :class:`StalledError` when that takes too long, and at once while any call hangs."""
        if self.stalled:
            raise StalledError
        one = _Call(function)
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="krul-open", daemon=True)
                self._thread.start()
        self._calls.put(one)
        if not one.done.wait(self.seconds):
            one.unwanted = True
            raise StalledError
        error, one.error = one.error, None
        if error is None:
            return one.result
        try:
            raise error
        finally:
            # Its traceback names this frame and the call: in a circle they would outlive both,
            # with whatever file was open.
            del error

    def _run(self) -> None:
        while (one := self._calls.get()) is not None:
            if not one.unwanted:
                with self.around():
                    one.run()
            del one

    def close(self) -> None:
        """End the thread, as soon as it can."""
        self._calls.put(None)


class _Call:
    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self.done = threading.Event()
        self.unwanted = False
        self.result: Any = None
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.result = self._function()
        except Exception as error:
            self.error = error
        self.done.set()
