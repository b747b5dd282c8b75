"""The memory tier: segments in host memory, encoded off the critical path.

The scheduler hands over raw rows (:meth:`MemoryStore.stage`) and goes on;
background workers encode them and swap the payloads in (the seal). Until then a
segment is served from its raw rows. The tree decides what leaves: the store only
drops a segment when the last token of it is released.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from krul_sglang.codec.base import Codec, CodecError, KVRun, KVSpec, Payload, SegmentReader
from krul_sglang.similarity.record import record_of
from krul_sglang.store.figures import Held, StoreStats
from krul_sglang.store.heap import return_freed_memory
from krul_sglang.store.ledger import Ledger
from krul_sglang.store.raw import RawReader
from krul_sglang.store.segment import Origin, Segment, SegmentState
from krul_sglang.store.slots import slot_ids, slot_runs
from krul_sglang.strategy.base import Strategy

if TYPE_CHECKING:
    import torch

    from krul_sglang.store.disk.entry import Entry, EntryName
    from krul_sglang.store.durable import Durable
    from krul_sglang.store.remote.tier import RemoteTier

logger = logging.getLogger(__name__)

# Share of the budget that raw rows may take while they wait to be encoded. Raw is
# several times the sealed size, so staging may not crowd out what is stored.
STAGING_SHARE = 4


class MemoryStore:
    """Segments by id, their bytes, and the workers that seal them. Thread-safe."""

    def __init__(
        self,
        spec: KVSpec,
        limit: int,
        codec_for: Callable[[str], Codec],
        fallback: str,
        workers: int = 1,
        disk: Durable | None = None,
        remote: RemoteTier | None = None,
    ) -> None:
        """``codec_for(name)`` gives a codec; ``fallback`` names the exact one used when
        another codec cannot encode a run; ``workers`` threads encode; ``disk`` is the tier
        behind this one, ``remote`` one that other machines share."""
        self.disk = disk
        if disk is not None:
            disk.serve(self)
        self.spec = spec
        self.ledger = Ledger(limit)
        self.remote = remote
        if remote is not None:
            remote.serve(self.ledger)
        self.stats = StoreStats()
        self._held = Held()
        self.lost_count = 0
        self._warned: set[tuple[str, str]] = set()
        self._codec_for = codec_for
        self._fallback = fallback
        self._segments: dict[int, Segment] = {}
        self._next_id = 1
        # Segments whose bytes may go at any time, as the disk has them; least recently used first.
        self._demotable: OrderedDict[int, Segment] = OrderedDict()
        self._lock = threading.Lock()
        self._drained = threading.Condition(self._lock)
        self._staged_bytes = 0
        self._queue: queue.SimpleQueue[Segment | None] = queue.SimpleQueue()
        self._worker_count = workers
        self._workers: list[threading.Thread] = []
        self._closed = False
        self._held_back = 0  # callers that hold the encoder back
        self._awaited = 0  # callers that wait for the encoder

    # ---- writing ---------------------------------------------------------------

    @property
    def names_origins(self) -> bool:
        """Whether a tier below needs to know whose tokens a segment's are."""
        return self.disk is not None or self.remote is not None

    @property
    def staging_limit(self) -> int:
        """Bytes of raw rows that may wait at once."""
        return self.ledger.limit // STAGING_SHARE

    def wait_for_staging(self, nbytes: int, timeout: float) -> bool:
        """Wait until ``nbytes`` more raw bytes fit; False when ``timeout`` seconds pass."""
        return self._wait_for_encoder(
            lambda: (
                self._closed
                or self._staged_bytes == 0
                or self._staged_bytes + nbytes <= self.staging_limit
            ),
            timeout,
        )

    def stage(
        self, run: KVRun, strategy: Strategy, exact: bool, origin: Origin | None = None
    ) -> tuple[Segment, torch.Tensor]:
        """Take a raw run over (its tensors must not change any more) and queue its encoding.

        origin: whose tokens they are, for the tiers below; None keeps them off those. Returns the
        segment
        and its slot ids, int64 ``[tokens]``.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the store is closed")
            segment = Segment(
                id=self._next_id,
                tokens=run.tokens,
                start=run.start,
                strategy=strategy,
                exact=exact,
                raw_bytes=run.nbytes,
                live_tokens=run.tokens,
                run=run,
                origin=origin if self.names_origins else None,
            )
            self._next_id += 1
            self._segments[segment.id] = segment
            self._held.count(segment, 1)
            self._staged_bytes += segment.raw_bytes
            self.ledger.add("staging", segment.staged_bytes)
            self.ledger.add("index", segment.index_bytes)
            if len(self._workers) < self._worker_count:
                worker = threading.Thread(target=self._seal_forever, name="krul-seal", daemon=True)
                self._workers.append(worker)
                worker.start()
        self._queue.put(segment)
        return segment, slot_ids(segment.id, segment.tokens)

    def _seal_forever(self) -> None:
        while (segment := self._queue.get()) is not None:
            try:
                self._seal(segment)
            except Exception:
                # The raw rows stay readable, so nothing is lost; the bytes stay
                # in staging and the operator sees them there.
                logger.exception("segment %d could not be encoded; kept raw", segment.id)
                with self._lock:
                    self._stop_waiting(segment)
            del segment
            if self._queue.empty():
                return_freed_memory()

    def _stop_waiting(self, segment: Segment) -> None:
        """Under the lock: whatever became of the segment, it is waited for no longer."""
        if segment.waiting:
            segment.waiting = False
            self._staged_bytes -= segment.raw_bytes
            self._drained.notify_all()

    def _seal(self, segment: Segment) -> None:
        run, strategy = segment.run, segment.strategy
        if run is None or strategy is None:  # released or lost while it waited
            return
        self._pace()
        began = time.perf_counter()
        name = strategy.codec
        try:
            payload = self._encoder(name).encode(run, strategy)
        except Exception as error:
            if name == self._fallback:
                raise
            first = (name, str(error)) not in self._warned
            logger.log(
                logging.WARNING if first else logging.DEBUG,
                "codec %s cannot encode segment %d (%s); such segments are stored losslessly",
                name,
                segment.id,
                error,
            )
            self._warned.add((name, str(error)))
            with self._lock:
                self.stats.fallbacks += 1
            name = self._fallback
            payload = self._encoder(name).encode(run, strategy)
        attention = record_of(strategy, run.tokens)
        seconds = time.perf_counter() - began
        with self._drained:
            self.stats.encode_seconds += seconds
            self.stats.encoded_segments += 1
            self.stats.encoded_raw_bytes += segment.raw_bytes
            self.stats.encoded_bytes += len(payload)
            if segment.run is None:  # released or lost meanwhile: already settled
                return
            self._held.count(segment, -1)
            self.ledger.move("staging", "tier", segment.staged_bytes, len(payload))
            self.ledger.add("index", attention.nbytes if attention is not None else 0)
            segment.payload = payload
            segment.sealed_bytes = len(payload)
            segment.codec = name
            segment.attention = attention
            segment.run = segment.strategy = None
            segment.state = SegmentState.SEALED
            self._held.count(segment, 1)
            self._stop_waiting(segment)
        self._hand_on(segment, payload)

    def _hand_on(self, segment: Segment, payload: Payload) -> None:
        """To the tiers below, each of which may be renounced meanwhile."""
        disk, remote, origin = self.disk, self.remote, segment.origin
        if origin is None:
            return
        if remote is not None:
            remote.offer(segment, payload, origin)
        if disk is not None:
            disk.write(segment, payload, origin)
        else:
            self.written(segment, None)

    def _encoder(self, name: str) -> Codec:
        codec = self._codec_for(name)
        codec.pace = self._pace
        return codec

    def wait_sealed(self, timeout: float) -> bool:
        """Wait until nothing waits to be encoded; False on timeout."""
        return self._wait_for_encoder(lambda: self._staged_bytes == 0, timeout)

    def _wait_for_encoder(self, ready: Callable[[], bool], timeout: float) -> bool:
        with self._drained:
            if ready():
                return True
            self._awaited += 1
            self._drained.notify_all()
            try:
                return self._drained.wait_for(ready, timeout)
            finally:
                self._awaited -= 1

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Encoding pauses inside, from the next layer on, for something more urgent. It goes on
        all the same while anyone waits for it."""
        with self._drained:
            self._held_back += 1
        try:
            yield
        finally:
            with self._drained:
                self._held_back -= 1
                self._drained.notify_all()

    def _pace(self) -> None:
        with self._drained:
            self._drained.wait_for(lambda: not self._held_back or self._awaited or self._closed)

    # ---- the disk behind -------------------------------------------------------

    def admit(self, segment_id: int, origin: Origin) -> None:
        """Let the tiers below have a segment that was kept off them until now."""
        with self._lock:
            segment = self._segments.get(segment_id)
            if segment is None or segment.state is SegmentState.LOST or not self.names_origins:
                return
            if segment.origin is not None or segment.file is not None:
                return
            segment.origin = origin
            self.ledger.add("index", segment.origin_bytes)
            payload = segment.payload
        if payload is not None:  # else it is handed on when it is sealed
            self._hand_on(segment, payload)

    def written(self, segment: Segment, file: EntryName | None) -> None:
        """The disk has the segment under that name, or will not have it (None)."""
        with self._drained:
            if self._segments.get(segment.id) is not segment:  # let go of meanwhile
                return
            self.ledger.add("index", -segment.origin_bytes)
            segment.origin = None
            if file is not None and segment.payload is not None:
                segment.file = file
                self._demotable[segment.id] = segment
            self._drained.notify_all()

    def demote(self, nbytes: int) -> int:
        """Let go of sealed bytes that the disk has, least recently used first, until ``nbytes``
        are free; returns how many were freed."""
        freed, disk = 0, self.disk
        with self._lock:
            while freed < nbytes and self._demotable:
                _, segment = self._demotable.popitem(last=False)
                if segment.file is None or disk is None or not disk.holds(segment.file):
                    segment.file = None  # it made way there: memory has the last copy
                    continue
                freed += segment.resident_bytes
                self.ledger.add("tier", -segment.resident_bytes)
                segment.payload = None
                self.stats.demoted_segments += 1
        return freed

    def make_room_to_read(self, segment_ids: Iterable[int]) -> bool:
        """Let go of others' bytes so that those of these segments that only the disk has fit;
        False if they cannot."""
        segments = [self._segments.get(segment) for segment in segment_ids]
        needed = sum(s.stored_bytes for s in segments if s is not None and s.is_on_disk_only)
        self.demote(self.ledger.used + needed - self.ledger.limit)
        return not needed or self.ledger.used + needed <= self.ledger.limit

    def promote(self, segment_id: int, payload: Payload, codec: str) -> None:
        """A segment's bytes were read from the disk: keep them where they fit. They may be of
        another codec than what was sealed here: the disk keeps one payload of a run."""
        with self._lock:
            segment = self._segments.get(segment_id)
            if segment is None or segment.file is None or segment.payload is not None:
                return
            if self.ledger.used + len(payload) > self.ledger.limit:
                return
            self._held.count(segment, -1)
            self.ledger.add("tier", len(payload))
            segment.payload, segment.codec, segment.sealed_bytes = payload, codec, len(payload)
            self._held.count(segment, 1)
            self._demotable[segment.id] = segment
            self.stats.promoted_segments += 1

    def adopt(
        self, file: EntryName, entry: Entry, lo: int, hi: int, payload: Payload | None = None
    ) -> torch.Tensor:
        """Take in tokens ``lo .. hi`` of a segment that lies on the disk, or whose ``payload``
        came from elsewhere; returns their slot ids, int64 ``[hi - lo]``."""
        disk = self.disk if payload is not None else None
        origin = None
        if disk is not None:
            origin = Origin(entry.namespace, entry.ids, entry.exact_tokens)
        with self._lock:
            segment = Segment(
                id=self._next_id,
                tokens=entry.tokens,
                start=entry.start,
                strategy=None,
                exact=entry.exact_tokens == entry.tokens,
                raw_bytes=entry.raw_bytes,
                live_tokens=hi - lo,
                state=SegmentState.SEALED,
                codec=entry.codec,
                sealed_bytes=entry.payload_bytes,
                payload=payload,
                file=file if payload is None else None,
                origin=origin,
                waiting=False,
            )
            self._next_id += 1
            self._segments[segment.id] = segment
            self._held.count(segment, 1)
            self.ledger.add("index", segment.index_bytes)
            self.ledger.add("tier", segment.resident_bytes)
        if disk is not None and payload is not None and origin is not None:
            disk.write(segment, payload, origin)
        return slot_ids(segment.id, segment.tokens)[lo:hi]

    # ---- reading ---------------------------------------------------------------

    def get(self, segment_id: int) -> Segment | None:
        """The segment, or None when it is gone."""
        return self._segments.get(segment_id)

    def open(self, segment: Segment) -> SegmentReader:
        """A reader over the segment's bytes. Raises :class:`CodecError` when lost or bad."""
        with self._lock:
            run, payload, file = segment.run, segment.payload, segment.file
            if segment.id in self._demotable:
                self._demotable.move_to_end(segment.id)
        if run is not None:
            return RawReader(run)
        if payload is not None:
            if file is not None and self.disk is not None:
                self.disk.used(file)
            reader = self._codec_for(segment.codec).open(payload)
        elif file is not None and self.disk is not None:
            reader = self.disk.open(segment.id, file, self._codec_for)
        else:
            raise CodecError(f"segment {segment.id} is lost")
        if reader.tokens != segment.tokens or reader.start != segment.start:
            raise CodecError(f"segment {segment.id} holds another run than its record says")
        return reader

    # ---- letting go ------------------------------------------------------------

    def _drop_bytes(self, segment: Segment) -> None:
        self.ledger.add("staging", -segment.staged_bytes)
        self._stop_waiting(segment)
        self.ledger.add("tier", -segment.resident_bytes)
        self._demotable.pop(segment.id, None)
        segment.run = segment.strategy = None
        segment.payload, segment.sealed_bytes = None, 0

    def is_gone(self, segment_id: int) -> bool:
        """Whether only the disk had a segment, and let it go since."""
        segment, disk = self._segments.get(segment_id), self.disk
        if segment is None or disk is None or segment.payload is not None or segment.file is None:
            return False
        return not disk.holds(segment.file)

    def mark_lost(self, segment_id: int, gone: bool = False) -> None:
        """Turn a damaged segment, or one that is gone, into a miss; its ids stay valid until
        released."""
        with self._lock:
            segment = self._segments.get(segment_id)
            if segment is None or segment.state is SegmentState.LOST:
                return
            self._held.count(segment, -1)
            # Where memory had a copy, it is that copy which is damaged, not the file.
            file = segment.file if segment.is_on_disk_only else None
            self._drop_bytes(segment)
            segment.state, segment.file = SegmentState.LOST, None
            self.lost_count += 1
            self.stats.lost_segments += not gone
            self.stats.gone_segments += gone
        if file is not None and not gone and self.disk is not None:
            self.disk.set_aside(file)

    def release(self, ids: torch.Tensor) -> None:
        """Give tokens back (int64 ``[n]``); a segment goes with its last token."""
        runs = slot_runs(ids)
        with self._lock:
            for run in runs:
                segment = self._segments[run.segment]
                self._held.count(segment, -1)
                segment.live_tokens -= run.tokens
                assert segment.live_tokens >= 0, f"segment {segment.id} released twice"
                if segment.live_tokens:
                    self._held.count(segment, 1)
                    continue
                self._drop_bytes(segment)
                self.ledger.add("index", -segment.index_bytes)
                if segment.state is SegmentState.LOST:
                    self.lost_count -= 1
                del self._segments[segment.id]

    def renounce(self) -> None:
        """Every segment is a miss from now on, sealed or not, and the disk is left alone."""
        with self._lock:
            for segment in self._segments.values():
                if segment.state is SegmentState.LOST:
                    continue
                self._held.count(segment, -1)
                self.ledger.add("index", -segment.origin_bytes)
                segment.origin = segment.file = None
                self._drop_bytes(segment)
                segment.state = SegmentState.LOST
                self.lost_count += 1
            disk, self.disk = self.disk, None
            remote, self.remote = self.remote, None
        if remote is not None:
            remote.abandon()
        if disk is not None:
            disk.abandon()

    def clear(self) -> None:
        """Drop everything. Ids handed out before are never handed out again."""
        with self._lock:
            for segment in self._segments.values():
                self._drop_bytes(segment)
                self.ledger.add("index", -segment.index_bytes)
            self._segments.clear()
            self._held = Held()
            self.lost_count = 0
        return_freed_memory()

    def close(self) -> None:
        """Drop everything and stop the worker."""
        self.clear()
        with self._drained:
            if self._closed:
                return
            self._closed = True
            self._drained.notify_all()
        for _ in self._workers:
            self._queue.put(None)
        for worker in self._workers:
            if worker is not threading.current_thread():
                worker.join(timeout=10)
        if self.disk is not None:
            self.disk.close()
        if self.remote is not None:
            self.remote.close()

    # ---- what is stored --------------------------------------------------------

    def totals(self) -> dict[str, int]:
        """Segments, tokens, raw-equivalent bytes and sealed bytes held now."""
        with self._lock:
            return dict(vars(self._held))
