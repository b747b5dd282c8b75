"""Opening a large directory: names and times are all that is looked at, once each."""

from __future__ import annotations

import os
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from disk_kit import FINGERPRINT, PLENTY, WatchedCalls

from krul_sglang.store.disk.entry import EntryName
from krul_sglang.store.disk.index import ENTRY_BYTES
from krul_sglang.store.disk.tier import DiskTier

ENTRIES = 3000
TURNS = 5
LONG_AGO = 1_600_000_000


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of :data:`TURNS` segments each; files of the right size and no contents."""
    root = tmp_path_factory.mktemp("large") / "tier"
    for talk in range(ENTRIES // TURNS):
        parent = os.urandom(16)
        for turn in range(TURNS):
            end = os.urandom(16)
            name = EntryName(FINGERPRINT, parent, 100 * turn, 100, 100, end, 5000 + talk)
            path = root / "v1" / FINGERPRINT.hex() / name.shard / name.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(0o600)
            os.truncate(path, name.size)
            parent = end
    for shard in (root / "v1" / FINGERPRINT.hex()).iterdir():
        os.utime(shard, (0, LONG_AGO))  # what has just changed is looked at again
    return root


def test_no_entry_is_opened(large) -> None:
    """The files hold nothing, so what was read of them would be damaged, too."""

    def rule(name: str, number: int, arguments: tuple[Any, ...]) -> None:
        assert name != "open_file" or not arguments[0].endswith(".krul")

    calls = WatchedCalls(rule)
    tier = DiskTier(large, FINGERPRINT, PLENTY, calls=calls)
    assert len(tier) == ENTRIES
    assert tier.used == sum(name.footprint for name in tier.names())
    assert tier.totals()["damaged"] == 0
    made, shards = Counter(calls.made), 256
    assert made["read"] == 1, "the note in its own lease"
    assert made["stat"] <= ENTRIES + shards, "each entry and shard once"
    assert made["list_directory"] <= shards + 4
    assert sum(made.values()) < 2 * ENTRIES + 12 * shards
    tier.close()


def test_what_is_known_is_not_looked_at_again(large) -> None:
    calls = WatchedCalls(lambda *_: None)
    tier = DiskTier(large, FINGERPRINT, PLENTY, calls=calls)
    tier.refresh()
    calls.made.clear()
    tier.refresh()
    made = Counter(calls.made)
    assert made["stat"] <= 256, "the shards, none of which changed"
    assert made["list_directory"] <= 2
    tier.close()


def test_memory_of_an_entry_is_what_is_said(large) -> None:
    tracemalloc.start()
    tier = DiskTier(large, FINGERPRINT, PLENTY)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert 0.6 * ENTRY_BYTES < held / ENTRIES < ENTRY_BYTES
    assert tier.index_bytes == ENTRIES * ENTRY_BYTES
    tier.close()
