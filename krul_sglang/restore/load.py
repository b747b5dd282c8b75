"""Load stored tokens layer by layer into a sink: what is opened, and what is read together.

Short neighbours that their codec can join are decoded as one; the
:class:`~krul_sglang.restore.pipeline.Pipeline` carries the rest side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from krul_sglang.codec.base import CodecError, Part
from krul_sglang.restore.pipeline import MEMORY, Link, Load, Piece, Pipeline, Sink, Stream

if TYPE_CHECKING:
    from krul_sglang.store.memory import MemoryStore
    from krul_sglang.store.slots import SlotRun

# As long as the longest segment: enough for the arithmetic, and threads share what is left.
BATCH_TOKENS = 1024


RAW = "raw"
"""Stands for the codec of a segment that is not encoded yet."""


@dataclass(frozen=True)
class LoadOutcome:
    """What one load did. ``lost`` holds ids of the segments that could not be read."""

    tokens: int
    stored_bytes: int
    lost: tuple[int, ...]

    @property
    def ok(self) -> bool:
        """Whether every token reached the sink."""
        return not self.lost


@dataclass(frozen=True)
class Opened:
    """Runs of slots whose segments were opened; ``lost`` names those that could not be."""

    tokens: int
    pieces: Sequence[Piece]
    lost: tuple[int, ...]


def _layer_bytes(piece: Piece) -> list[int]:
    """The piece's share of its segment's bytes, by layer."""
    reader, lo, hi = piece.part
    whole = max(1, reader.tokens)
    return [nbytes * (hi - lo) // whole for nbytes in reader.layer_bytes()]


def _batches(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Pieces that are decoded in one go: neighbours in the sink that their codec can join."""
    batch: list[Piece] = []
    end = tokens = 0
    for one in pieces:
        key, size = one.part.reader.batch_key, one.part.hi - one.part.lo
        joins = (
            batch
            and key is not None
            and key == batch[0].part.reader.batch_key
            and type(one.part.reader) is type(batch[0].part.reader)
            and one.tier == batch[0].tier
            and one.offset == end
            and tokens + size <= BATCH_TOKENS
        )
        if batch and not joins:
            yield batch
            batch, tokens = [], 0
        batch.append(one)
        tokens += size
        end = one.offset + size
    if batch:
        yield batch


class Loader:
    """Reads runs of slots from a store; each tier at most ``bandwidth`` bytes a second if given."""

    def __init__(self, store: MemoryStore, threads: int, bandwidth: float | None = None) -> None:
        self._store = store
        links = [] if bandwidth is None else [Link(MEMORY, bandwidth)]
        if store.disk is not None:
            links.append(Link(store.disk.tier, bandwidth))
        self._pipeline = Pipeline(store.spec.layers, threads, links)

    def open(self, runs: Sequence[SlotRun]) -> Opened:
        """Open the segments of ``runs``: headers and sizes are checked, nothing is read."""
        pieces: list[Piece] = []
        lost: list[int] = []
        total = 0
        for run in runs:
            try:
                segment = self._store.get(run.segment)
                if segment is None:
                    raise CodecError(f"segment {run.segment} is gone")
                part = Part(self._store.open(segment), run.lo, run.hi)
                pieces.append(Piece(run.segment, total, part, segment.codec or RAW))
            except CodecError:
                lost.append(run.segment)
            total += run.tokens
        return Opened(total, pieces, tuple(dict.fromkeys(lost)))

    def start(self, opened: Opened, sink: Sink, urgent: bool = True) -> Load:
        """Begin to write all tokens of ``opened``, in order from token 0 of the sink; after all
        other loads if it is not urgent.

        Never raises for bad bytes: the segments that failed are in ``Load.failed``, and the
        sink's tokens are then undefined. The sink is called from several threads.
        """
        load = self._pipeline.new_load(opened.tokens, sink, urgent)
        streams = []
        for batch in _batches(opened.pieces):
            layers = zip(*map(_layer_bytes, batch), strict=True)
            streams.append(Stream(load, batch, [sum(layer) for layer in layers]))
        self._pipeline.submit(load, streams)
        return load

    def redirect(self, load: Load, sink: Sink) -> None:
        """From now on ``load`` is urgent and writes to ``sink``; when this returns, nothing
        more is written to the old one."""
        self._pipeline.redirect(load, sink)

    def load(self, runs: Sequence[SlotRun], sink: Sink) -> LoadOutcome:
        """Open ``runs``, write all their tokens and wait for it. A segment that cannot be
        opened leaves the others unread."""
        opened = self.open(runs)
        if opened.lost:
            return LoadOutcome(opened.tokens, 0, opened.lost)
        load = self.start(opened, sink)
        load.wait()
        return LoadOutcome(opened.tokens, load.stored_bytes, tuple(dict.fromkeys(load.failed)))

    def close(self) -> None:
        """Stop the threads; loads under way are cancelled."""
        self._pipeline.close()
