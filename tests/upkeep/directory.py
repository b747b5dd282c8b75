"""A disk tier's directory with conversations of two tenants, written by the tier itself."""

from __future__ import annotations

import os
import random
from pathlib import Path

from krul_sglang.store.disk.entry import Namespace
from krul_sglang.store.disk.publishing import Outcome
from krul_sglang.store.disk.tier import DiskTier

MODEL = bytes(range(16))
OURS, THEIRS = Namespace(), Namespace(cache_salt="theirs")
ADAPTER = Namespace(extra_key="adapter", cache_salt="theirs")
RAW = 1000
"""Bytes of KV a token stands for."""
HOUR = 3_600_000_000_000


def fill(root: Path, *spaces: Namespace, limit: int = 1 << 30) -> list[Path]:
    """Three entries that continue each other in each namespace; their files, oldest use first."""
    tier = DiskTier(root, MODEL, limit)
    for number, space in enumerate(spaces):
        ids = range(1000 * number, 1000 * number + 300)
        for start in (0, 100, 200):
            publish(tier, space, list(ids[: start + 100]), start)
    tier.close()
    return files(root)


def publish(tier: DiskTier, space: Namespace, ids: list[int], start: int) -> None:
    tokens = len(ids) - start
    payload = random.Random(ids[0] + start).randbytes(10 * tokens)
    done = tier.publish(
        space, ids, start, payload, codec="lossless", exact_tokens=tokens, raw_bytes=RAW * tokens
    )
    assert done.outcome is Outcome.STORED


def files(root: Path) -> list[Path]:
    return sorted(root.rglob("*.krul"), key=lambda file: file.stat().st_mtime_ns)


def flip(file: Path, at: int) -> None:
    """One bit of a file; its times stay."""
    before = file.stat()
    raw = bytearray(file.read_bytes())
    raw[at] ^= 8
    file.write_bytes(raw)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
