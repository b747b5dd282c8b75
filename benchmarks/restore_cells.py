"""Cells of benchmarks/restore.py: how they are named, what is computed from their samples, and
the JSON file that keeps them."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from krul_sglang.config import parse_rate

P99_REPEATS = 100
"""Fewest samples that have a 99th percentile."""


@dataclass(frozen=True)
class Bandwidth:
    """A rate as it is spelled. share: of the balanced rate; fixed: bytes a second; one of
    them, or neither for memory itself."""

    name: str
    share: float | None = None
    fixed: float | None = None

    @classmethod
    def parse(cls, text: str) -> Bandwidth:
        """Raises ValueError."""
        if text == "unthrottled":
            return cls(text)
        match = re.fullmatch(r"(?:([\d.]+)\*)?balanced(?:/([\d.]+))?", text)
        try:
            if match is None:
                return cls(text, fixed=parse_rate(text))
            times, part = (float(group or 1) for group in match.groups())
            if times > 0:
                return cls(text, share=times / part)
        except (ValueError, ZeroDivisionError):
            pass
        raise ValueError(
            f"bandwidth {text!r}: expected unthrottled, balanced, balanced/4, 4*balanced or a "
            "rate such as 16MB/s"
        )

    def rate(self, balanced: float) -> float | None:
        """Bytes a second."""
        return self.fixed if self.share is None else self.share * balanced


UNTHROTTLED = Bandwidth("unthrottled")


@dataclass(frozen=True)
class Cell:
    """One place in the table. history: tokens; bandwidth: its name."""

    policy: str
    history: int
    bandwidth: str

    @classmethod
    def parse(cls, text: str) -> Cell:
        """``predictive:1024:unthrottled``. Raises ValueError."""
        policy, history, bandwidth = [*text.split(":"), "", ""][:3]
        if not history.isdigit() or text.count(":") != 2:
            raise ValueError(f"cell {text!r}: expected POLICY:HISTORY:BANDWIDTH")
        return cls(policy, int(history), Bandwidth.parse(bandwidth).name)

    @classmethod
    def of(cls, row: dict[str, Any]) -> Cell:
        """The cell of a row in the file."""
        return cls(row["policy"], row["history"], row["bandwidth_name"])


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that ``percent`` of them do not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(percent / 100 * len(values)) - 1)]


def agreement(outputs: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> float | None:
    """Share of tokens equal to the reference's in the same place; answers are paired in order."""
    same = [
        a == b
        for ours, theirs in zip(outputs, reference, strict=False)
        for a, b in zip(ours, theirs, strict=True)
    ]
    return statistics.mean(same) if same else None


def times(seconds: Sequence[float]) -> dict[str, Any]:
    """What a row says about its samples' times; the 99th percentile only of enough of them."""
    return {
        "ttft_p50": statistics.median(seconds),
        "ttft_p99": percentile(seconds, 99) if len(seconds) >= P99_REPEATS else None,
        "ttft_min": min(seconds),
        "ttft_max": max(seconds),
        "repeats": len(seconds),
    }


class Results:
    """The file: every finished cell, and what they were measured with."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        """Continues ``path`` if it exists. Raises ValueError when it was made otherwise, or can't
        be written."""
        self._path = path
        self._draft = path.with_suffix(".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._draft.touch()
            self._draft.unlink()
        except OSError as error:
            raise ValueError(f"--json {path}: cannot be written: {error.strerror}") from None
        self.data: dict[str, Any] = {**facts, "rows": []}
        if not path.exists():
            return
        try:
            self.data = json.loads(path.read_text())
            made = {name: self.data[name] for name in facts}
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: not a result of this benchmark") from None
        for name, fact in facts.items():
            if made[name] != fact:
                raise ValueError(
                    f"{path}: made with other {name} ({made[name]}, now {fact}); name another file"
                )

    def find(self, cell: Cell) -> dict[str, Any] | None:
        """The row of a cell that was measured."""
        rows = (row for row in self.data["rows"] if "error" not in row)
        return next((row for row in rows if Cell.of(row) == cell), None)

    def put(self, row: dict[str, Any]) -> None:
        """Add or replace a row, and write the file."""
        others = [old for old in self.data["rows"] if Cell.of(old) != Cell.of(row)]
        self.data["rows"] = [*others, row]
        self._draft.write_text(json.dumps(self.data, indent=1) + "\n")
        self._draft.replace(self._path)
