"""The memory tier: segments in host memory, encoded off the critical path.

The scheduler hands over raw rows (:meth:`MemoryStore.stage`) and goes on;
background threads (:mod:`.encoder`) seal them. Until then a segment is served from
its raw rows. The tree decides what leaves: the store only drops a segment when the
last token of it is released.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np

from krul_sglang.codec.base import Codec, CodecError, KVRun, KVSpec, Payload, SegmentReader
from krul_sglang.similarity.record import record_of
from krul_sglang.store.encoder import Encoder
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

# Share of the budget that raw rows may take while they wait to be encoded. Raw is
# several times the sealed size, so staging may not crowd out what is stored.
STAGING_SHARE = 4


class MemoryStore:
    """Segments by id and their bytes. Thread-safe."""

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
        self._codec_for = codec_for
        self._encoder = Encoder(self._seal, codec_for, fallback, workers)
        self._segments: dict[int, Segment] = {}
        self._next_id = 1
        # Segments whose bytes may go at any time, as the disk has them; least recently used first.
        self._demotable: OrderedDict[int, Segment] = OrderedDict()
        self._lock = threading.Lock()

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
        return self._encoder.wait_for_room(nbytes, self.staging_limit, timeout)

    def stage(
        self, run: KVRun, strategy: Strategy, exact: bool, origin: Origin | None = None
    ) -> tuple[Segment, torch.Tensor]:
        """Take a raw run over (its tensors must not change any more) and queue its encoding.

        origin: whose tokens they are, for the tiers below; None keeps them off those. Returns the
        segment and its slot ids, int64 ``[tokens]``.
        """
        with self._lock:
            if self._encoder.closed:
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
            self.ledger.add("staging", segment.staged_bytes)
            self.ledger.add("index", segment.index_bytes)
            self._encoder.submit(segment)
        return segment, slot_ids(segment.id, segment.tokens)

    def _seal(self, segment: Segment) -> None:
        run, strategy = segment.run, segment.strategy
        if run is None or strategy is None:  # released or lost while it waited
            return
        encoded = self._encoder.encode(segment.id, run, strategy)
        payload, attention = encoded.payload, record_of(strategy, run.tokens)
        reader = self._codec_for(encoded.codec).open(payload)  # or else the rows are kept
        with self._lock:
            self.stats.encode_seconds += encoded.seconds
            self.stats.encoded_segments += 1
            self.stats.encoded_raw_bytes += segment.raw_bytes
            self.stats.encoded_bytes += len(payload)
            self.stats.fallbacks += encoded.fell_back
            if segment.run is None:  # released or lost meanwhile: already settled
                return
            self._held.count(segment, -1)
            self.ledger.move("staging", "tier", segment.staged_bytes, len(payload))
            self.ledger.add("index", attention.nbytes if attention is not None else 0)
            segment.payload = payload
            segment.sealed_bytes = len(payload)
            segment.codec = encoded.codec
            segment.attention = attention
            self._learn_layers(segment, reader)
            segment.run = segment.strategy = None
            segment.state = SegmentState.SEALED
            self._held.count(segment, 1)
            self._encoder.settle(segment)
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

    def wait_sealed(self, timeout: float) -> bool:
        """Wait until nothing waits to be encoded; False on timeout."""
        return self._encoder.wait_idle(timeout)

    def held_back(self) -> AbstractContextManager[None]:
        """See :meth:`.Encoder.held_back`."""
        return self._encoder.held_back()

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
        with self._lock:
            if self._segments.get(segment.id) is not segment:  # let go of meanwhile
                return
            self.ledger.add("index", -segment.origin_bytes)
            segment.origin = None
            if file is not None and segment.payload is not None:
                segment.file = file
                self._demotable[segment.id] = segment

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

    def bytes_to_read(self, segment_ids: Iterable[int]) -> int:
        """What opening these segments brings into memory: those that only the disk has."""
        segments = [self._segments.get(segment) for segment in segment_ids]
        files = [s.file for s in segments if s is not None and s.is_on_disk_only]
        # The file's own size: it may hold another codec's payload than what was sealed here.
        return sum(file.size for file in files if file is not None)

    def make_room_to_read(self, segment_ids: Collection[int]) -> bool:
        """Let go of bytes so that those of these segments that only the disk has fit; False if
        they cannot. Others go first."""
        with self._lock:
            for segment in segment_ids:
                if segment in self._demotable:
                    self._demotable.move_to_end(segment)
        self.demote(self.ledger.used + self.bytes_to_read(segment_ids) - self.ledger.limit)
        # Counted anew: what of these had to go has to be read as well.
        needed = self.bytes_to_read(segment_ids)
        return not needed or self.ledger.used + needed <= self.ledger.limit

    def promote(
        self, segment_id: int, payload: Payload, codec: str, counted: weakref.finalize[..., Any]
    ) -> None:
        """A segment's bytes were read from the disk: keep them. They may be of another codec than
        what was sealed here: the disk keeps one payload of a run.

        counted: gives back what these bytes count as on their way; they count as stored from now
        on. There was room for them already, and no check of anybody else's comes in between.
        """
        with self._lock:
            segment = self._segments.get(segment_id)
            if segment is None or segment.file is None or segment.payload is not None:
                return
            if counted.detach() is None:
                return
            self._held.count(segment, -1)
            self.ledger.move("loading", "tier", len(payload), len(payload))
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
        with self._lock:
            # The file may hold another codec's payload than what was sealed here.
            if segment.id in self._segments and (payload is None or segment.layer_bytes is None):
                self._learn_layers(segment, reader)
        return reader

    def _learn_layers(self, segment: Segment, reader: SegmentReader) -> None:
        """Under the lock: its payload was opened."""
        before = segment.index_bytes
        segment.layer_bytes = np.array(reader.layer_bytes(), np.int64)
        self.ledger.add("index", segment.index_bytes - before)

    # ---- letting go ------------------------------------------------------------

    def _drop_bytes(self, segment: Segment) -> None:
        self.ledger.add("staging", -segment.staged_bytes)
        self._encoder.settle(segment)
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
        """Drop everything and stop the encoder."""
        self.clear()
        if self._encoder.closed:
            return
        self._encoder.close()
        if self.disk is not None:
            self.disk.close()
        if self.remote is not None:
            self.remote.close()

    # ---- what is stored --------------------------------------------------------

    def totals(self) -> dict[str, int]:
        """Segments, tokens, raw-equivalent bytes and sealed bytes held now."""
        with self._lock:
            return dict(vars(self._held))
