"""The disk behind the memory tier: what is sealed is written in the background, and read again
when memory let go of it, or after a restart.

Writing is behind everything else: a segment is served from memory until its file is in place,
and one that cannot be written stays a segment in memory. Reading goes through private memory,
in few large pieces, as far as the layers that are asked for.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import weakref
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

from krul_sglang.codec.base import Codec, CodecError, Payload, SegmentReader
from krul_sglang.codec.frames import header_end
from krul_sglang.store.disk.entry import EntryName
from krul_sglang.store.disk.payload import DiskPayload, UnreadableError
from krul_sglang.store.disk.publishing import REFRESH_SECONDS, Outcome
from krul_sglang.store.disk.tier import DiskTier
from krul_sglang.store.watch import StalledError, Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from krul_sglang.store.disk.entry import Namespace
    from krul_sglang.store.memory import MemoryStore
    from krul_sglang.store.segment import Origin, Segment

logger = logging.getLogger(__name__)

HEAD_BYTES = 64 << 10
"""Read when a file is opened; nearly always the payload's header and more."""
AHEAD_BYTES = 1 << 20
"""Fewest bytes that are read at a time later."""
WARN_SECONDS = 60.0
"""Between two warnings that the disk does not answer."""


class FileSource:
    """A payload that is read as its layers are asked for."""

    tier = "disk"

    def __init__(
        self,
        payload: DiskPayload,
        ends: Sequence[int],
        whole: Callable[[memoryview], None],
        unreadable: Callable[[UnreadableError], None],
        watch: Watch,
    ) -> None:
        """ends: by layer, how many bytes are needed to read it. whole: given all of them when
        they are to be kept. unreadable: told when the device fails. watch: told while the disk
        is asked."""
        self._payload, self._ends, self._whole, self._watch = payload, ends, whole, watch
        self._unreadable = unreadable

    def fetch(self, layer: int) -> None:
        """See :class:`~krul_sglang.codec.base.Source`."""
        payload, upto = self._payload, self._ends[layer]
        if payload.fetched < upto:
            try:
                with self._watch.around():
                    payload.fetch(max(upto, payload.fetched + AHEAD_BYTES))
            except UnreadableError as error:
                self._unreadable(error)
                raise

    def keep(self) -> None:
        """See :class:`~krul_sglang.codec.base.Source`."""
        if self._payload.fetched == self._payload.size:
            self._whole(self._payload.view)


class Durable:
    """A disk tier as :class:`~krul_sglang.store.memory.MemoryStore` uses it. Thread-safe."""

    tier = FileSource.tier

    def __init__(self, disk: DiskTier) -> None:
        self.disk = disk
        self.watch = Watch()
        self._store: MemoryStore
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # Entries that could not be read, as the disk did not answer, say: not to be set aside.
        self._spared: set[EntryName] = set()
        self._unwritten = self._jobs = 0
        self._abandoned = False
        self._idle = threading.Condition()
        self._writer: threading.Thread | None = None
        self._warned = self._looked = -WARN_SECONDS

    def serve(self, store: MemoryStore) -> None:
        """The memory tier in front; to be called once, before anything else."""
        self._store = store

    # ---- writing ---------------------------------------------------------------

    def write(self, segment: Segment, payload: Payload, origin: Origin) -> None:
        """Write a sealed segment in the background; the store is told of it (``written``)."""
        with self._idle:
            self._unwritten += 1
        self._later(partial(self._write, segment, payload, origin))

    def _later(self, job: Callable[[], None]) -> None:
        with self._idle:
            self._jobs += 1
            if self._writer is None:
                self._writer = threading.Thread(
                    target=self._write_forever, name="krul-write", daemon=True
                )
                self._writer.start()
        self._queue.put(job)

    def abandon(self) -> None:
        """Write nothing more, and close the directory; what is being written may still end."""
        self._abandoned = True
        self._stop()

    def _stop(self) -> None:
        self._queue.put(None)
        self.watch.close()
        self.disk.close()

    def _write_forever(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                job()
            except Exception:
                logger.exception("the disk tier failed at something it was to do later")
            del job
            with self._idle:
                self._jobs -= 1
                self._idle.notify_all()

    def _write(self, segment: Segment, payload: Payload, origin: Origin) -> None:
        name = None
        try:
            # Nobody names it any more: not worth the writing.
            if segment.live_tokens and not self._abandoned:
                name = self._publish(segment, payload, origin)
        finally:
            self._store.written(segment, name)
            with self._idle:
                self._unwritten -= 1

    def _publish(self, segment: Segment, payload: Payload, origin: Origin) -> EntryName | None:
        done = self.disk.publish(
            origin.namespace,
            origin.ids,
            segment.start,
            payload,
            codec=segment.codec,
            exact_tokens=origin.exact_tokens,
            raw_bytes=segment.raw_bytes,
        )
        return done.name if done.outcome in (Outcome.STORED, Outcome.PRESENT) else None

    @property
    def unwritten(self) -> int:
        """Segments that wait to be written."""
        return self._unwritten

    def wait_written(self, timeout: float) -> bool:
        """Wait until nothing waits to be written or set aside; False after ``timeout`` seconds."""
        with self._idle:
            return self._idle.wait_for(lambda: self._jobs == 0, timeout)

    # ---- reading ---------------------------------------------------------------

    def look(
        self, name: EntryName, namespace: Namespace, ids: Sequence[int] | np.ndarray
    ) -> tuple[DiskPayload, int] | None:
        """See :meth:`~krul_sglang.store.disk.tier.DiskTier.open`; a disk that does not answer
        is a miss too."""
        try:
            return self.watch.call(lambda: self.disk.open(name, namespace, ids))
        except StalledError:
            self._warn()
            return None

    def open(
        self, segment_id: int, name: EntryName, codec_for: Callable[[str], Codec]
    ) -> SegmentReader:
        """A reader whose source brings the bytes. Raises :class:`CodecError`, also where the
        disk does not answer."""
        try:
            return self.watch.call(lambda: self._open(segment_id, name, codec_for))
        except StalledError:
            self._warn()
            self._spared.add(name)
            raise CodecError(f"{name.file} cannot be read: the disk does not answer") from None

    def _warn(self) -> None:
        now = time.monotonic()
        if now - self._warned > WARN_SECONDS:
            self._warned = now
            logger.warning(
                "disk tier %s: reading takes more than %.0f s; what lies there is computed anew "
                "until it answers",
                self.disk.root,
                self.watch.seconds,
            )

    def _open(
        self, segment_id: int, name: EntryName, codec_for: Callable[[str], Codec]
    ) -> SegmentReader:
        payload = self.disk.reopen(name)
        if payload is None:
            self._spared.add(name)  # the tier has dealt with it
            raise CodecError(f"{name.file} cannot be read")
        ledger = self._store.ledger
        ledger.add("loading", payload.size)
        counted = weakref.finalize(payload, ledger.add, "loading", -payload.size)
        try:
            codec = codec_for(payload.entry.codec)
        except ValueError as error:
            raise CodecError(f"{name.file}: {error}") from error
        try:
            payload.fetch(HEAD_BYTES if codec.in_order else payload.size)
            payload.fetch(header_end(payload.view))
        except UnreadableError as error:
            self._unreadable(name, error)
            raise
        reader = codec.open(payload.view)
        ends = list(accumulate(reader.layer_bytes()))
        reader.source = FileSource(
            payload,
            ends,
            lambda view: self._store.promote(segment_id, view, codec.name, counted),
            partial(self._unreadable, name),
            self.watch,
        )
        return reader

    def _unreadable(self, name: EntryName, error: UnreadableError) -> None:
        self._spared.add(name)
        self.disk.unreadable(name, error)

    def look_around(self) -> None:
        """Something was not found: learn in the background what others stored, so that the next
        request finds it. Once a second at most."""
        now = time.monotonic()
        if now - self._looked >= REFRESH_SECONDS and not self._abandoned:
            self._looked = now
            self._later(partial(self.disk.refresh, REFRESH_SECONDS))

    def holds(self, name: EntryName) -> bool:
        """Whether a file is there, as far as is known without looking."""
        return self.disk.holds(name)

    def used(self, name: EntryName) -> None:
        """What a file holds was read in memory: it is not to be the first to go. Soon."""
        self._later(lambda: self.disk.use(name))

    def set_aside(self, name: EntryName) -> None:
        """An entry turned out to be damaged; it is moved out of the way in the background."""
        if name in self._spared:
            self._spared.discard(name)
        elif not self._abandoned:
            self._later(lambda: self.disk.quarantine(name, "could not be restored"))

    def close(self) -> None:
        """Finish what is being written (10 s at most) and close the directory."""
        self.wait_written(10)
        self._stop()
