"""What a store counts: totals since start, and what it holds now."""

from __future__ import annotations

from dataclasses import dataclass

from krul_sglang.store.segment import Segment, SegmentState


@dataclass
class StoreStats:
    """Totals since start; mutated under the store's lock."""

    encode_seconds: float = 0.0
    encoded_segments: int = 0
    encoded_raw_bytes: int = 0
    encoded_bytes: int = 0
    fallbacks: int = 0
    lost_segments: int = 0
    """Damaged, or not readable when they were wanted."""
    gone_segments: int = 0
    """That only the disk had, and that made way there for others."""
    demoted_segments: int = 0
    """Let go of in memory, as the disk has them."""
    promoted_segments: int = 0
    """Read from the disk and kept in memory since."""


@dataclass
class Held:
    """What the store holds now, kept up to date so that reading it costs nothing.

    raw_bytes and stored_bytes cover sealed segments only: their quotient is the ratio.
    """

    segments: int = 0
    sealed_segments: int = 0
    lossy_segments: int = 0
    stored_tokens: int = 0
    raw_bytes: int = 0
    stored_bytes: int = 0

    def count(self, segment: Segment, sign: int) -> None:
        """Add (1) or take away (-1) a segment in the state it is in."""
        if segment.state is SegmentState.LOST:
            return
        self.segments += sign
        self.lossy_segments += sign * (not segment.exact)
        self.stored_tokens += sign * segment.live_tokens
        if segment.state is SegmentState.SEALED:
            self.sealed_segments += sign
            self.raw_bytes += sign * segment.raw_bytes
            self.stored_bytes += sign * segment.stored_bytes
