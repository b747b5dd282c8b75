"""A segment: the stored KV of one token run, from gathered to sealed or lost."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from krul_sglang.codec.base import KVRun, Payload
from krul_sglang.similarity.record import AttentionRecord
from krul_sglang.strategy.base import Strategy

if TYPE_CHECKING:
    import numpy as np

    from krul_sglang.store.disk.entry import EntryName, Namespace


class SegmentState(Enum):
    """Where a segment's bytes are."""

    STAGED = "staged"
    """Raw rows in host memory, waiting to be encoded; readable as they are."""
    SEALED = "sealed"
    """Encoded; the payload is final."""
    LOST = "lost"
    """Damaged or missing: a miss for every reader, until the tree lets it go."""


# What a segment costs beside its bytes: this record, its dictionary entry and,
# in the tree, eight bytes of slot id a token (counted separately).
RECORD_BYTES = 1024
SLOT_BYTES = 8


@dataclass(frozen=True)
class Origin:
    """Whose tokens a segment holds, kept until the tiers below have it.

    ids: int64 ``[end]``, the conversation's token ids up to the segment's end.
    exact_tokens: leading tokens of the run that are exact.
    """

    namespace: Namespace
    ids: np.ndarray
    exact_tokens: int


@dataclass
class Segment:
    """Mutable record owned by the store.

    live_tokens: tokens some tree node still names; the segment goes when it is 0.
    waiting: whether the encoder has yet to settle it (it keeps its raw rows when it fails).
    strategy: how it is to be encoded, None once it is.
    codec: name of the codec that wrote ``payload`` (a strategy's codec may have
        been replaced by lossless when it could not handle the run).
    sealed_bytes: length of the payload, wherever it is. file: where on the disk it is.
    attention: how alike its layers attended, where that was measured.
    layer_bytes: int64 ``[layers]``, what each layer needs of the payload beyond those below it;
        None before the payload was opened here.
    """

    id: int
    tokens: int
    start: int
    strategy: Strategy | None
    exact: bool
    raw_bytes: int
    live_tokens: int
    state: SegmentState = SegmentState.STAGED
    run: KVRun | None = None
    payload: Payload | None = None
    sealed_bytes: int = 0
    file: EntryName | None = None
    origin: Origin | None = None
    codec: str = ""
    attention: AttentionRecord | None = None
    layer_bytes: np.ndarray | None = None
    waiting: bool = True

    @property
    def staged_bytes(self) -> int:
        """Bytes of its raw rows and of what was measured of them, 0 without rows."""
        if self.run is None or self.strategy is None:
            return 0
        return self.raw_bytes + self.strategy.nbytes

    @property
    def stored_bytes(self) -> int:
        """Bytes of the sealed payload, 0 before sealing."""
        return self.sealed_bytes

    @property
    def resident_bytes(self) -> int:
        """Bytes of the sealed payload that are in memory."""
        return len(self.payload) if self.payload is not None else 0

    @property
    def is_on_disk_only(self) -> bool:
        """Whether reading it takes the disk."""
        return self.payload is None and self.file is not None

    @property
    def origin_bytes(self) -> int:
        """Bytes of token ids kept for the disk."""
        return self.origin.ids.nbytes if self.origin is not None else 0

    @property
    def index_bytes(self) -> int:
        """Bytes of the record and of the tree's slot ids."""
        kept = sum(own.nbytes for own in (self.attention, self.layer_bytes) if own is not None)
        return RECORD_BYTES + SLOT_BYTES * self.tokens + kept + self.origin_bytes
