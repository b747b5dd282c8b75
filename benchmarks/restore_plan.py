"""What benchmarks/restore.py is asked for, and the prompts of its rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restore_cells import Bandwidth, Cell

WARM_UP = 2
"""Rounds of a cell that are not measured; of policies that do not plan, only of the first cell."""


@dataclass(frozen=True)
class Prompts:
    """Token ids: two conversations as long as any history, and new turns."""

    conversations: Sequence[Sequence[int]]
    turns: Sequence[Sequence[int]]

    def of(self, number: int, history: int) -> list[int]:
        """The prompt of a round. Turns do not repeat, as a server keeps them."""
        return [*self.past(number, history), *self.turns[number % len(self.turns)]]

    def past(self, number: int, history: int) -> Sequence[int]:
        """Its conversation. They alternate, so that each was just evicted."""
        return self.conversations[number % len(self.conversations)][:history]


@dataclass(frozen=True)
class Plan:
    """What is asked for. dtype: of model and KV; recompute: --krul-recompute of the policies
    that may; turn, answer: tokens; alive: servers side by side besides `recompute`, None for what
    fits into memory."""

    model: Path
    dtype: str
    profile: Path | None
    recompute: str
    longest: int
    """Tokens of the longest history the model takes."""
    histories: Sequence[int]
    bandwidths: Sequence[Bandwidth]
    policies: Sequence[str]
    repeats: int
    turn: int
    answer: int
    alive: int | None
    p99_cells: Sequence[Cell]
    p99_repeats: int

    def repeats_of(self, cell: Cell) -> int:
        """How often a cell is measured."""
        return self.p99_repeats if cell in self.p99_cells else self.repeats

    @property
    def turns(self) -> int:
        """Rounds that a server is asked at most."""
        p99 = {cell.bandwidth for cell in self.p99_cells}
        longest = (self.p99_repeats if b.name in p99 else self.repeats for b in self.bandwidths)
        return sum(WARM_UP + max(self.repeats, count) for count in longest)

    def settings(self) -> dict[str, Any]:
        """What all cells of a file have in common."""
        names = ("dtype", "recompute", "repeats", "turn", "answer")
        shared = {name: getattr(self, name) for name in names}
        return {"model": self.model.name, "warm_up": WARM_UP} | shared
