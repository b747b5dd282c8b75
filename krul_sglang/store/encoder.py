"""The encoder behind a store: its threads, what waits for them, and what holds them back."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from krul_sglang.codec.base import Codec, KVRun, Payload
from krul_sglang.store.heap import return_freed_memory
from krul_sglang.store.segment import Segment
from krul_sglang.strategy.base import Strategy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoded:
    """What became of a run. codec: the one that wrote the payload; fell_back: whether it is
    another than the strategy's."""

    payload: Payload
    codec: str
    fell_back: bool
    seconds: float


class Encoder:
    """Background threads that seal segments. Thread-safe; its lock may be taken under the
    store's, never the other way round."""

    def __init__(
        self,
        seal: Callable[[Segment], None],
        codec_for: Callable[[str], Codec],
        fallback: str,
        threads: int,
    ) -> None:
        """``seal(segment)`` runs on a thread and settles the segment; ``codec_for(name)`` gives
        a codec; ``fallback`` names the exact one used when another cannot encode a run."""
        self._seal = seal
        self._codec_for = codec_for
        self._fallback = fallback
        self._warned: set[tuple[str, str]] = set()
        self._changed = threading.Condition()
        self._queue: queue.SimpleQueue[Segment | None] = queue.SimpleQueue()
        self._count = threads
        self._threads: list[threading.Thread] = []
        self._held_back = 0  # callers that hold it back
        self._awaited = 0  # callers that wait for it
        self.waiting_bytes = 0
        """Raw bytes that wait to be encoded."""
        self.closed = False

    def submit(self, segment: Segment) -> None:
        """Queue a segment's encoding."""
        with self._changed:
            self.waiting_bytes += segment.raw_bytes
            if len(self._threads) < self._count:
                thread = threading.Thread(target=self._run, name="krul-seal", daemon=True)
                self._threads.append(thread)
                thread.start()
        self._queue.put(segment)

    def settle(self, segment: Segment) -> None:
        """Whatever became of the segment, it is waited for no longer."""
        with self._changed:
            if segment.waiting:
                segment.waiting = False
                self.waiting_bytes -= segment.raw_bytes
                self._changed.notify_all()

    def _run(self) -> None:
        while (segment := self._queue.get()) is not None:
            try:
                self._seal(segment)
            except Exception:
                # The raw rows stay readable, so nothing is lost; the bytes stay
                # in staging and the operator sees them there.
                logger.exception("segment %d could not be encoded; kept raw", segment.id)
                self.settle(segment)
            del segment
            if self._queue.empty():
                return_freed_memory()

    # ---- encoding --------------------------------------------------------------

    def encode(self, segment_id: int, run: KVRun, strategy: Strategy) -> Encoded:
        """On a thread: the run's payload, by the strategy's codec or else the exact one.

        Raises what the exact one raises.
        """
        self._pace()
        began = time.perf_counter()
        name = strategy.codec
        try:
            payload = self._codec(name).encode(run, strategy)
        except Exception as error:
            if name == self._fallback:
                raise
            first = (name, str(error)) not in self._warned
            logger.log(
                logging.WARNING if first else logging.DEBUG,
                "codec %s cannot encode segment %d (%s); such segments are stored losslessly",
                name,
                segment_id,
                error,
            )
            self._warned.add((name, str(error)))
            name = self._fallback
            payload = self._codec(name).encode(run, strategy)
        return Encoded(payload, name, name != strategy.codec, time.perf_counter() - began)

    def _codec(self, name: str) -> Codec:
        codec = self._codec_for(name)
        codec.pace = self._pace
        return codec

    # ---- waiting and holding back ----------------------------------------------

    def wait_for_room(self, nbytes: int, limit: int, timeout: float) -> bool:
        """Wait until ``nbytes`` more may wait within ``limit`` (one run alone always may);
        False when ``timeout`` seconds pass."""
        return self._wait(
            lambda: self.closed or self.waiting_bytes == 0 or self.waiting_bytes + nbytes <= limit,
            timeout,
        )

    def wait_idle(self, timeout: float) -> bool:
        """Wait until nothing waits to be encoded; False on timeout."""
        return self._wait(lambda: self.waiting_bytes == 0, timeout)

    def _wait(self, ready: Callable[[], bool], timeout: float) -> bool:
        with self._changed:
            if ready():
                return True
            self._awaited += 1
            self._changed.notify_all()
            try:
                return self._changed.wait_for(ready, timeout)
            finally:
                self._awaited -= 1

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Encoding pauses inside, from the next layer on, for something more urgent. It goes on
        all the same while anyone waits for it."""
        with self._changed:
            self._held_back += 1
        try:
            yield
        finally:
            with self._changed:
                self._held_back -= 1
                self._changed.notify_all()

    def _pace(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._held_back or self._awaited or self.closed)

    def close(self) -> None:
        """Stop the threads; what still waits is not encoded any more."""
        with self._changed:
            if self.closed:
                return
            self.closed = True
            self._changed.notify_all()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=10)
