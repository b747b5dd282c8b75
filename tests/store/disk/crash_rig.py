"""The crash child as tests use it, and what must hold of the directory it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from disk_kit import FINGERPRINT, Piece, assert_agrees, files, look, unfinished

from krul_sglang.store.disk.tier import DiskTier

CHILD = Path(__file__).parent / "crash_child.py"


class Crasher:
    """A process that forks writers and sees to their end."""

    def __init__(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(CHILD.parent)},
        )

    def run(self, **task: Any) -> dict[str, Any]:
        """``killed``: whether the writer was; ``said``: its calls, where it came through."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps(task, default=str) + "\n")
        self._child.stdin.flush()
        answer = json.loads(self._child.stdout.readline())
        assert isinstance(answer["said"], list), answer["said"]
        return answer

    def close(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait(10)


def acknowledged(journal: Path) -> list[Piece]:
    """Pieces of the journal, without a last line that was cut short."""
    if not journal.exists():
        return []
    whole, _, _ = journal.read_text().rpartition("\n")
    return [Piece(*map(int, line.split())) for line in whole.splitlines()]


def inspect(root: Path, pieces: list[Piece], limit: int) -> tuple[int, int]:
    """Open what a killed writer left and check all that must hold; returns how many pieces are
    there, exact, and how many are a miss."""
    tier = DiskTier(root, FINGERPRINT, limit)
    try:
        assert not unfinished(root), "what a dead writer began is still there"
        leases = [path.name for path in (root / "v1" / "leases").iterdir()]
        assert len(leases) == 1, "its lease is still there"
        assert tier.used <= limit
        assert_agrees(tier, root)
        exact = 0
        for piece in pieces:
            found = look(tier, piece)
            assert found in (None, piece.payload), f"wrong bytes of {piece}"
            exact += found is not None
        assert tier.totals()["damaged"] == 0, "a killed writer leaves whole files or none"
        assert len(files(root)) == len(tier)
        return exact, len(pieces) - exact
    finally:
        tier.close()
