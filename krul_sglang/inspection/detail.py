"""What is stored of one conversation: its segments, its layers, and how alike these attend.

Everything here is a plain dict, list, number or string, as it goes through JSON.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from krul_sglang.codec.base import CodecError
from krul_sglang.codec.frames import shares
from krul_sglang.similarity.record import layer_matrix
from krul_sglang.store.segment import Segment, SegmentState

if TYPE_CHECKING:
    from krul_sglang.codec.base import Description, StoredLayer
    from krul_sglang.store.memory import MemoryStore
    from krul_sglang.store.slots import SlotRun


@dataclass(frozen=True)
class Piece:
    """``tokens`` of a segment, from position ``start`` of the sequence on."""

    segment: Segment
    start: int
    tokens: int

    @property
    def stored_bytes(self) -> int:
        """Its share of the sealed payload, 0 before sealing."""
        return round(self.segment.stored_bytes * self.tokens / self.segment.tokens)

    @property
    def raw_bytes(self) -> int:
        """What it takes uncompressed."""
        return round(self.segment.raw_bytes * self.tokens / self.segment.tokens)


def pieces_of(store: MemoryStore, runs: Sequence[SlotRun]) -> list[Piece]:
    """Which segments a conversation's stored tokens are in, first to last.

    A segment that the tree has divided between nodes is one piece again.
    """
    ends: dict[int, tuple[int, int]] = {}
    for run in runs:
        lo, tokens = ends.get(run.segment, (run.lo, 0))
        ends[run.segment] = min(lo, run.lo), tokens + run.tokens
    found = []
    for name, (lo, tokens) in ends.items():
        segment = store.get(name)
        if segment is not None:
            found.append(Piece(segment, segment.start + lo, tokens))
    return sorted(found, key=lambda piece: piece.start)


def summary(pieces: Sequence[Piece]) -> dict[str, Any]:
    """Bytes and codecs over all sealed pieces, and tokens in each other state."""
    sealed = [piece for piece in pieces if piece.segment.state is SegmentState.SEALED]
    stored = sum(piece.stored_bytes for piece in sealed)
    raw = sum(piece.raw_bytes for piece in sealed)

    def tokens_in(state: SegmentState) -> int:
        return sum(piece.tokens for piece in pieces if piece.segment.state is state)

    return {
        "segments": len(pieces),
        "stored_bytes": stored,
        "raw_bytes": raw,
        "ratio": _ratio(raw, stored),
        "codecs": sorted({piece.segment.codec for piece in sealed}),
        "waiting_tokens": tokens_in(SegmentState.STAGED),
        "lost_tokens": tokens_in(SegmentState.LOST),
    }


def detail(store: MemoryStore, pieces: Sequence[Piece]) -> dict[str, Any]:
    """Segment by segment and layer by layer.

    ``layers`` covers the sealed segments; what is not stored yet, lost or damaged is in
    ``segments`` only.
    """
    layers = [_Layer(n) for n in range(store.spec.layers)]
    rows, header_bytes = [], 0
    factors: tuple[float, ...] = ()
    for piece in pieces:
        row, found = _segment(store, piece)
        rows.append(row)
        if found is not None:
            header, *parts = shares(
                piece.stored_bytes, [found.header_bytes, *(one.nbytes for one in found.layers)]
            )
            header_bytes += header
            factors = found.factors or factors
            for layer, own, nbytes in zip(layers, found.layers, parts, strict=True):
                layer.add(own, nbytes, piece, found)
    return {
        "segments": rows,
        "header_bytes": header_bytes,
        "class_factors": list(factors),
        "classed_tokens": round(max(sum(layer.classes) for layer in layers)),
        "layers": [layer.row() for layer in layers],
        "similarity": _similarity(pieces),
    }


def _segment(store: MemoryStore, piece: Piece) -> tuple[dict[str, Any], Description | None]:
    """A row, and what its payload says where it is sealed and readable."""
    segment, state, found = piece.segment, piece.segment.state.value, None
    if segment.is_on_disk_only:
        state = "on disk"  # reading it would hold up whoever generates
    elif segment.state is SegmentState.SEALED:
        try:
            found = store.open(segment).describe()
        except CodecError:
            state = "damaged"
    row = {
        "start": piece.start,
        "tokens": piece.tokens,
        "state": state,
        "codec": segment.codec or None,
        "exact": segment.exact,
        "step": None if found is None else found.step,
        "stored_bytes": piece.stored_bytes,
        "raw_bytes": piece.raw_bytes,
        "ratio": _ratio(piece.raw_bytes, piece.stored_bytes),
    }
    return row, found


@dataclass
class _Layer:
    """Sums over segments. log_step and error are weighted by ``classed`` and ``measured``
    tokens; dropped counts tokens."""

    number: int
    nbytes: int = 0
    raw_bytes: int = 0
    in_shared_frame: bool = False
    references: set[int] = field(default_factory=set)
    tokens: float = 0.0
    dropped: float = 0.0
    log_step: float = 0.0
    error: float = 0.0
    measured: float = 0.0
    classes: list[float] = field(default_factory=list)

    def add(self, own: StoredLayer, nbytes: int, piece: Piece, found: Description) -> None:
        part = piece.tokens / piece.segment.tokens
        self.nbytes += nbytes
        self.raw_bytes += piece.raw_bytes // len(found.layers)
        self.in_shared_frame |= own.in_shared_frame
        if own.reference is not None:
            self.references.add(own.reference)
            self.tokens += piece.tokens
            self.dropped += piece.tokens * own.dropped
        classed = sum(own.classes) * part
        if classed and found.step is not None:
            if not self.classes:
                self.classes = [0.0] * len(own.classes)
            for c, count in enumerate(own.classes):
                self.classes[c] += count * part
                self.log_step += count * part * math.log(found.step * found.factors[c])
            if own.error is not None:
                self.error += own.error * classed
                self.measured += classed

    def row(self) -> dict[str, Any]:
        classed = sum(self.classes)
        return {
            "layer": self.number,
            "references": sorted(self.references),
            "dropped": round(self.dropped / self.tokens, 4) if self.tokens else 0.0,
            "step": math.exp(self.log_step / classed) if classed else None,
            "error": self.error / self.measured if self.measured else None,
            "stored_bytes": self.nbytes,
            "raw_bytes": self.raw_bytes,
            "ratio": _ratio(self.raw_bytes, self.nbytes),
            "in_shared_frame": self.in_shared_frame,
            "classes": [round(count / classed, 4) for count in self.classes] or None,
        }


def _similarity(pieces: Sequence[Piece]) -> dict[str, Any] | None:
    """How alike layers attend, None where nothing was measured."""
    records = [piece.segment.attention for piece in pieces]
    found = layer_matrix(record for record in records if record is not None)
    if found is None:
        return None
    values = [
        [None if math.isnan(value) else round(value, 4) for value in row]
        for row in found.values.tolist()
    ]
    return {
        "measure": found.measure,
        "tokens": found.tokens,
        "layers": list(found.layers),
        "matrix": values,
    }


def _ratio(raw: int, stored: int) -> float | None:
    return round(raw / stored, 3) if stored else None
