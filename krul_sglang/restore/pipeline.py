"""The restore pipeline: stored layers on their way to their rows, layer by layer.

Two stages: each tier's link brings its streams' bytes, then threads decode them and hand the
layer to the sink. Both take the lowest layer first, whichever load it belongs to, so that
a forward pass that waits for layer after layer finds them in its order, for all requests of
its batch alike; loads that no pass waits for yet come last. Decompression and copies release
the GIL.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from krul_sglang.codec.base import CodecError, Part, Source
from krul_sglang.restore.trace import LoadTrace

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

MEMORY = "memory"
"""The tier whose segments need no fetching."""

# Called as sink(layer, first, k, v): write tokens [first, first + len(k)) of a layer. What it
# returns (a CUDA event, or None) is kept for whoever reads the layer.
Sink = Callable[[int, int, "torch.Tensor", "torch.Tensor"], Any]


class Piece(NamedTuple):
    """Tokens of a segment, where in the sink they go, and who decodes them."""

    segment: int
    offset: int
    part: Part
    codec: str

    @property
    def tier(self) -> str:
        """The tier that holds the segment."""
        source = self.part.reader.source
        return MEMORY if source is None else source.tier


class Stream:
    """Pieces that follow each other and are decoded in one go, a layer at a time."""

    def __init__(self, load: Load, pieces: Sequence[Piece], bytes_of: Sequence[int]) -> None:
        """bytes_of: stored bytes that each layer needs beyond the layers below it."""
        self.load = load
        self.pieces = pieces
        self.bytes_of = bytes_of
        self.tier = pieces[0].tier
        self.fetched = 0
        self.decoded = 0
        self._layers: Iterator[tuple[torch.Tensor, torch.Tensor]] | None = None

    def fetch(self, layer: int) -> list[int]:
        """Bring the bytes of a layer; returns the segments that could not be read."""
        bad = []
        for piece in self.pieces:
            try:
                piece.part.reader.fetch(layer)
            except CodecError:
                bad.append(piece.segment)
            except Exception as error:
                logger.error("segment %d could not be fetched", piece.segment, exc_info=error)
                bad.append(piece.segment)
        return bad

    def decode(self, sink: Sink) -> Any:
        """Write the next layer. Raises :class:`CodecError` on damage, or whatever went wrong."""
        if self._layers is None:
            first = self.pieces[0].part.reader
            self._layers = first.layers_of([piece.part for piece in self.pieces])
        found = next(self._layers, None)
        if found is None:
            segment = self.pieces[0].segment
            raise CodecError(f"segment {segment} holds {self.decoded} layers")
        return sink(self.decoded, self.pieces[0].offset, *found)

    def damaged(self) -> list[int]:
        """Segments of this stream that cannot be read; all of them if each can alone."""
        segments = [piece.segment for piece in self.pieces]
        if len(segments) == 1:
            return segments
        return [piece.segment for piece in self.pieces if not _is_readable(piece.part)] or segments


def _is_readable(part: Part) -> bool:
    try:
        for _ in part.reader.layers(part.lo, part.hi):
            pass
    except Exception:
        return False
    return True


# A stream's place: those that nobody waits for last, then by layer, then as they came.
Queued = tuple[tuple[bool, int, int], Stream]


class Load:
    """One path being restored. Everything here may be asked from any thread."""

    def __init__(self, tokens: int, layers: int, sink: Sink, changed: threading.Condition) -> None:
        self.tokens = tokens
        self.tokens_of: dict[str, int] = {}
        """Tokens by codec."""
        self.tiers: set[str] = set()
        """Where they come from."""
        self.stored_bytes = 0
        self.trace = LoadTrace(layers)
        self.sources: list[Source] = []
        """Of segments that were not in memory."""
        self.failed: list[int] = []
        """Segments that could not be read."""
        self.cancelled = False
        self.urgent = True
        """Whether someone waits for it; loads that nobody waits for yet come after the others."""
        self._sinks = [sink]
        self._changed = changed
        self._layers = layers
        self._missing = [0] * layers  # streams that have yet to write the layer
        self._events: list[list[Any]] = [[] for _ in range(layers)]
        self._reached = 0  # layers that all streams have written
        self._writing = [0]  # threads that are inside each sink

    @property
    def over(self) -> bool:
        """Whether nothing more will be written."""
        with self._changed:
            return self._is_over()

    def _is_over(self) -> bool:
        ended = self._reached == self._layers or self.failed or self.cancelled
        return bool(ended) and not any(self._writing)

    @property
    def ok(self) -> bool:
        """Whether every layer has been written."""
        with self._changed:
            return self._reached == self._layers and not self.failed and not self.cancelled

    def wait_layer(self, layer: int, timeout: float | None = None) -> bool:
        """Wait until ``layer`` has been written, or never will be; False after ``timeout`` s."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._reached > layer or bool(self.failed) or self.cancelled, timeout
            )

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing more will be written; False after ``timeout`` seconds."""
        with self._changed:
            return self._changed.wait_for(self._is_over, timeout)

    def events(self, layer: int) -> list[Any]:
        """What the sink returned for a layer that has been written, without the Nones."""
        return self._events[layer]

    def cancel(self) -> None:
        """Nothing is written after this returns."""
        with self._changed:
            self.cancelled = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not any(self._writing))


@dataclass
class Link:
    """What brings a tier's bytes to memory. bandwidth: bytes a second that it is held to, None
    where nothing holds it."""

    tier: str
    bandwidth: float | None = None
    queue: list[Queued] = field(default_factory=list)


class Pipeline:
    """Threads that carry loads. Create, :meth:`submit` loads, :meth:`close`."""

    def __init__(self, layers: int, threads: int, links: Sequence[Link] = ()) -> None:
        """links: of the tiers that have one, a thread each."""
        self._layers = layers
        self.links = {link.tier: link for link in links}
        self._changed = threading.Condition()
        self._to_decode: list[Queued] = []
        # Whatever is not over is in a queue or in a thread's hands, which keeps it here.
        self._loads: weakref.WeakSet[Load] = weakref.WeakSet()
        self._order = 0
        self._closed = False
        self._threads: list[threading.Thread] = []
        self._wanted: list[tuple[str, Callable[[], None]]] = [
            (f"krul-load-{n}", self._decode_forever) for n in range(threads)
        ]
        for link in links:
            self._wanted.append((f"krul-load-{link.tier}", partial(self._fetch_forever, link)))

    def new_load(self, tokens: int, sink: Sink, urgent: bool = True) -> Load:
        """A load that :meth:`submit` takes."""
        load = Load(tokens, self._layers, sink, self._changed)
        load.urgent = urgent
        return load

    def redirect(self, load: Load, sink: Sink) -> None:
        """From now on ``load`` is urgent and writes to ``sink``; when this returns, no thread
        is inside the old one."""
        with self._changed:
            load.urgent = True
            load._sinks.append(sink)
            load._writing.append(0)
            for queue in (self._to_decode, *(link.queue for link in self.links.values())):
                queue[:] = [(self._place(queue, order, own), own) for (_, _, order), own in queue]
                heapq.heapify(queue)
            self._changed.wait_for(lambda: load._writing[-2] == 0)

    def submit(self, load: Load, streams: Sequence[Stream]) -> None:
        """Start a load; with no stream it is complete."""
        with self._changed:
            if self._closed:
                load.cancelled = True
                return
            load.trace.begin()
            load._missing = [len(streams)] * self._layers
            load.stored_bytes = sum(sum(stream.bytes_of) for stream in streams)
            for piece in (piece for stream in streams for piece in stream.pieces):
                if piece.part.reader.source is not None:
                    load.sources.append(piece.part.reader.source)
                size = piece.part.hi - piece.part.lo
                load.tiers.add(piece.tier)
                load.tokens_of[piece.codec] = load.tokens_of.get(piece.codec, 0) + size
            if not streams:
                load._reached = self._layers
                return
            self._loads.add(load)
            for stream in streams:
                link = self.links.get(stream.tier)
                if link is None:
                    stream.fetched = self._layers
                self._push(self._to_decode if link is None else link.queue, stream)
            self._start_threads()
            self._changed.notify_all()

    def _start_threads(self) -> None:
        while self._wanted:
            name, run = self._wanted.pop()
            thread = threading.Thread(target=run, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _push(self, queue: list[Queued], stream: Stream) -> None:
        self._order += 1
        heapq.heappush(queue, (self._place(queue, self._order, stream), stream))

    def _place(self, queue: list[Queued], order: int, stream: Stream) -> tuple[bool, int, int]:
        layer = stream.decoded if queue is self._to_decode else stream.fetched
        return not stream.load.urgent, layer, order

    # ---- the links -------------------------------------------------------------

    def _fetch_forever(self, link: Link) -> None:
        free = 0.0  # when the link has carried everything asked of it so far
        while (stream := self._next(link.queue)) is not None:
            load, layer = stream.load, stream.fetched
            if self._is_vain(load):
                del stream, load  # its bytes are not kept while this thread waits
                continue
            began = time.perf_counter()
            bad = stream.fetch(layer)
            if link.bandwidth is not None:
                free = max(free, began) + stream.bytes_of[layer] / link.bandwidth
            with self._changed:
                late = free - time.perf_counter()
                self._changed.wait_for(partial(self._is_vain, load), max(0.0, late))
                if self._closed:
                    return
                load.failed += bad
                if load.cancelled or load.failed:
                    free = time.perf_counter()
                    self._changed.notify_all()
                    del stream, load
                    continue
                ended = time.perf_counter()
                load.trace.fetched(layer, began, ended, stream.bytes_of[layer], link.tier)
                stream.fetched += 1
                if stream.fetched == stream.decoded + 1:
                    self._push(self._to_decode, stream)
                if stream.fetched < self._layers:
                    self._push(link.queue, stream)
                self._changed.notify_all()
            del stream, load

    def _is_vain(self, load: Load) -> bool:
        return self._closed or load.cancelled or bool(load.failed)

    def _next(self, queue: list[Queued]) -> Stream | None:
        with self._changed:
            self._changed.wait_for(lambda: queue or self._closed)
            return None if self._closed else heapq.heappop(queue)[1]

    # ---- decoding --------------------------------------------------------------

    def _decode_forever(self) -> None:
        while (stream := self._next(self._to_decode)) is not None:
            load = stream.load
            with self._changed:
                if load.cancelled or load.failed:
                    del stream, load
                    continue
                sink = len(load._sinks) - 1
                load._writing[sink] += 1
            event, error = None, None
            began = time.perf_counter()
            try:
                event = stream.decode(load._sinks[sink])
            except Exception as failure:
                error = failure
            ended = time.perf_counter()
            bad = [] if error is None else self._why(stream, error)
            with self._changed:
                load._writing[sink] -= 1
                if bad:
                    load.failed += bad
                else:
                    self._advance(stream, began, ended, event)
                self._changed.notify_all()
            del stream, load

    def _why(self, stream: Stream, error: Exception) -> list[int]:
        if not isinstance(error, CodecError):
            # Not a bad byte but a bug or no memory. It must not leave the thread: the load
            # would never end.
            segments = [piece.segment for piece in stream.pieces]
            logger.error("segments %s could not be loaded", segments, exc_info=error)
        return stream.damaged()

    def _advance(self, stream: Stream, began: float, ended: float, event: Any) -> None:
        """Under the lock: the stream's next layer is written."""
        load, layer = stream.load, stream.decoded
        load.trace.decoded(layer, began, ended, stream.pieces[0].codec)
        if event is not None:
            load._events[layer].append(event)
        load._missing[layer] -= 1
        while load._reached < self._layers and load._missing[load._reached] == 0:
            load._reached += 1
        stream.decoded += 1
        if stream.decoded < min(stream.fetched, self._layers):
            self._push(self._to_decode, stream)

    def close(self) -> None:
        """Stop the threads; loads under way are cancelled."""
        with self._changed:
            self._closed = True
            for load in self._loads:
                load.cancelled = load._reached < self._layers
            self._wanted.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=10)
