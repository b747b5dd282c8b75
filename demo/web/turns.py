"""Where a turn's prompt tokens came from, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Turn:
    """One turn as the server accounts for it. Times in seconds, everything else in tokens.

    device, restored: prompt tokens whose KV was found in the pool, or in the store.
    lossy: how many of both came from lossy KV.
    recomputed: tokens that had been computed before and were computed again.
    new: tokens nobody had computed yet.
    recompute_ttft: what the same prompt took where nothing of it was found; None until measured.
    trace: what the restore did, as /krul/restores tells; None without one.
    """

    prompt: int
    device: int = 0
    restored: int = 0
    lossy: int = 0
    recomputed: int = 0
    new: int = 0
    ttft: float | None = None
    recompute_ttft: float | None = None
    measuring: bool = False
    answered: int = 0
    trace: Mapping[str, Any] | None = None

    @property
    def speedup(self) -> float | None:
        """How many times sooner the first token came than by recomputing."""
        return self.recompute_ttft / self.ttft if self.recompute_ttft and self.ttft else None


def shared_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading tokens two sequences have in common."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def account(turn: Turn, details: Mapping[str, int], known: int) -> None:
    """Fill in the sources from the server's ``cached_tokens_details``.

    known: leading tokens of the prompt that had been computed in an earlier turn.
    """
    turn.device = details.get("device", 0)
    turn.restored = details.get("host", 0) + details.get("storage", 0)
    turn.lossy = details.get("lossy", 0)
    found = turn.device + turn.restored
    turn.recomputed = max(0, known - found)
    turn.new = turn.prompt - found - turn.recomputed


def trace_of(turn: Turn, traces: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The newest trace that restored what this turn did; others' restores may be newer."""
    return next((one for one in traces if one["tokens"] == turn.restored > 0), None)
