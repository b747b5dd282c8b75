"""The query rows of a conversation from which its attention is estimated.

Prefill and decode rows are kept apart (the Krul paper's token-wise heterogeneity): a prompt
arrives in one pass and would push out everything else, an answer comes a token at a time.
Of either only every ``stride``-th position is kept, the latest of those: 16 rows spread over
96 tokens tell as much as all 96 of them (docs/quality.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Ring:
    """Rows ``first .. first + size`` hold the latest ``size`` positions that ``stride`` divides."""

    first: int
    size: int
    stride: int

    @property
    def reach(self) -> int:
        """How many positions back the oldest row may lie."""
        return self.size * self.stride

    def row(self, position: Any) -> Any:
        """The row of a sampled position (an int or a tensor of them)."""
        return position // self.stride % self.size + self.first


PREFILL = Ring(0, 8, 4)
DECODE = Ring(8, 12, 8)
ROWS = PREFILL.size + DECODE.size


STRIDE = 2
"""Every second layer is sampled: its tokens matter about as much as those of the next one."""


@dataclass(frozen=True)
class QueryWindow:
    """Sampled queries of one conversation.

    q: ``[sampled layers, rows, heads, head_dim]``, post-RoPE, the pool's dtype and device.
    positions: int32 ``[rows]``, where in the conversation each row stands, on q's device;
        negative where there is no row.
    layers: the sampled layers, ascending.
    """

    q: torch.Tensor
    positions: torch.Tensor
    layers: Sequence[int]
