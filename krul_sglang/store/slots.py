"""Virtual host slot ids: how a tree node names its stored tokens.

The prefix tree keeps one int64 per stored token and slices those arrays when it
splits a node. An id therefore carries the segment and the token's offset in it,
``segment << 24 | offset``: every slice of a node's ids still says exactly which
stored tokens it is, whatever the tree does to the node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

OFFSET_BITS = 24
MAX_SEGMENT_TOKENS = 1 << OFFSET_BITS


@dataclass(frozen=True)
class SlotRun:
    """Tokens ``[lo, hi)`` of one segment, contiguous in a node's ids."""

    segment: int
    lo: int
    hi: int

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.hi - self.lo


def slot_ids(segment: int, tokens: int) -> torch.Tensor:
    """The ids of a whole new segment, int64 ``[tokens]``."""
    import torch

    if not 0 < tokens <= MAX_SEGMENT_TOKENS:
        raise ValueError(f"a segment holds 1 to {MAX_SEGMENT_TOKENS} tokens, not {tokens}")
    base = segment << OFFSET_BITS
    return torch.arange(base, base + tokens, dtype=torch.int64)


def slot_runs(ids: torch.Tensor) -> list[SlotRun]:
    """Split ids (int64 ``[n]``) into maximal runs, in order."""
    import torch

    if ids.numel() == 0:
        return []
    # Consecutive ids never cross segments: no segment is filled to the last offset bit
    # except the largest possible one, whose successor id belongs to the next segment.
    breaks = (ids[1:] != ids[:-1] + 1) | ((ids[1:] >> OFFSET_BITS) != (ids[:-1] >> OFFSET_BITS))
    starts = [0, *(torch.nonzero(breaks).flatten() + 1).tolist()]
    ends = [*starts[1:], ids.numel()]
    runs = []
    for start, end in zip(starts, ends, strict=True):
        first = int(ids[start])
        lo = first & (MAX_SEGMENT_TOKENS - 1)
        runs.append(SlotRun(first >> OFFSET_BITS, lo, lo + end - start))
    return runs
