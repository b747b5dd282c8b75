"""Row 6: several processes on one directory: one winner, no torn read, owners who know of
each other."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from disk_kit import FINGERPRINT, Piece, assert_agrees, files, look, store, unfinished
from owner_child import WRITERS, versions

from krul_sglang.store.disk.digest import fingerprint_of
from krul_sglang.store.disk.lease import holders
from krul_sglang.store.disk.tier import DiskTier
from krul_sglang.store.disk.upkeep import Verdict, gc, in_use, verify

pytestmark = pytest.mark.process

CHILD = Path(__file__).parent / "owner_child.py"


def start(**task: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(CHILD), json.dumps(task, default=str)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(CHILD.parent)},
    )


def together(root: Path, limit: int, seconds: float, counts) -> None:
    tasks = [
        {"root": root, "limit": limit, "seconds": seconds, "writer": w} for w in range(WRITERS)
    ]
    children = [start(**task) for task in tasks]
    saw: Counter[str] = Counter()
    for child in children:
        out, _ = child.communicate(timeout=120 + seconds)
        assert child.returncode == 0
        saw.update(json.loads(out))
    assert saw["read"] > 50
    assert saw["stored"] > 50
    bad = ("wrong", "torn", "damaged", "failed", "unreadable", "foreign")
    assert {name: saw[name] for name in bad} == dict.fromkeys(bad, 0)
    assert not unfinished(root)
    tier = DiskTier(root, FINGERPRINT, limit)
    assert_agrees(tier, root)
    assert tier.used <= limit
    assert len(in_use(root)) == 1, "the others have given their leases up"
    for talk in range(4):
        for index in range(2):
            piece = Piece(talk, index, 20_000)
            assert look(tier, piece) in (None, *versions(piece))
    assert all(checked.verdict is Verdict.SOUND for checked in verify(root))
    tier.close()
    counts(processes=WRITERS, **{name: saw[name] for name in ("stored", "present", "read", "miss")})
    counts(torn_reads=saw["torn"], wrong_bytes=saw["wrong"])


@pytest.mark.parametrize("limit", [1 << 30, 80_000], ids=["same keys", "evict while reading"])
def test_eight_processes(root, counts, limit) -> None:
    together(root, limit, 3, counts)


@pytest.mark.long
@pytest.mark.parametrize("limit", [1 << 30, 80_000], ids=["same keys", "evict while reading"])
def test_eight_processes_for_a_minute(root, counts, limit) -> None:
    together(root, limit, 60, counts)


def test_what_is_read_outlives_its_file(open_tier, root) -> None:
    tier = open_tier()
    piece = Piece(1, size=50_000)
    name = store(tier, piece)
    opened = tier.open(name, piece.namespace, piece.ids)
    assert opened is not None
    opened[0].fetch(1000)
    assert gc(root, limit=0).evicted == 1
    assert not files(root)
    opened[0].fetch(opened[0].size)
    assert bytes(opened[0].view) == piece.payload


def test_two_owners_share(open_tier, root) -> None:
    """The second is not refused: it reads what the first stored, and the other way round."""
    first, second = open_tier(), open_tier()
    assert len(in_use(root)) == 2
    store(first, Piece(1))
    second.refresh()
    assert look(second, Piece(1)) == Piece(1).payload
    store(second, Piece(2))
    first.refresh()
    assert look(first, Piece(2)) == Piece(2).payload
    assert_agrees(first, root)
    assert_agrees(second, root)


def test_owners_of_other_fingerprints_share_the_budget_only(open_tier, root) -> None:
    first = open_tier(100_000)
    second = open_tier(100_000, fingerprint_of({"model": "another"}))
    for talk in range(4):
        store(first, Piece(talk, size=20_000))
    second.refresh()
    assert all(look(second, Piece(talk, size=20_000)) is None for talk in range(4))
    store(second, Piece(9, size=20_000))
    assert second.used <= 100_000
    assert_agrees(second, root)
    first.refresh()
    assert look(first, Piece(0, size=20_000)) is None, "the oldest of all made way"


def test_what_was_used_by_another_process_stays(open_tier) -> None:
    first, second = open_tier(40_000), open_tier(40_000)
    for talk in range(4):
        store(first, Piece(talk, size=5000))
    second.refresh()
    assert look(second, Piece(0, size=5000)) is not None
    store(first, Piece(9, size=10_000))
    assert look(first, Piece(0, size=5000)) is not None
    assert look(first, Piece(1, size=5000)) is None


def test_a_writer_that_lives_keeps_its_unfinished_file(open_tier, root) -> None:
    """And once it is dead, whoever opens the directory next removes it."""
    child = start(root=root, limit=1 << 30, hold=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "holding\n"
        tier = open_tier()
        assert len(unfinished(root)) == 1
        assert {holder.pid for holder in in_use(root)} == {child.pid, os.getpid()}
        assert gc(root).abandoned == 0
        assert len(unfinished(root)) == 1
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait(10)
    assert len(unfinished(root)) == 1
    assert look(tier, Piece(50)) is None
    open_tier()
    assert not unfinished(root)
    assert {holder.pid for holder in in_use(root)} == {os.getpid()}
    assert len(holders(tier._directory)) == 2


def test_a_directory_that_is_deleted_under_a_tier_is_made_anew(open_tier, root) -> None:
    tier = open_tier()
    store(tier, Piece(1))
    shutil.rmtree(root)
    assert look(tier, Piece(1)) is None
    store(tier, Piece(2))
    assert_agrees(tier, root)
    assert len(in_use(root)) == 1, "others see its lease again"
    time.sleep(0.11)  # past the time in which a listing may be racy
    assert_agrees(tier, root)
