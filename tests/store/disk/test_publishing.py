"""What a published file holds, however large it is: the checksum of a large payload is taken by
another thread while it is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from disk_kit import FINGERPRINT, PLENTY, Piece, files, look, store

from krul_sglang.store.disk.publishing import SUMMED_BESIDE
from krul_sglang.store.disk.tier import DiskTier
from krul_sglang.store.disk.upkeep import Verdict, verify

SIZES = [0, 1, SUMMED_BESIDE - 1, SUMMED_BESIDE, 3 * SUMMED_BESIDE + 5]


@pytest.mark.parametrize("closing", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_a_file_is_its_head_and_payload(tmp_path: Path, size: int, closing: bool) -> None:
    """Bytes equal to those put together in one piece. closing: the tier is given up meanwhile."""
    piece = Piece(1, size=size)
    tier = DiskTier(tmp_path, FINGERPRINT, PLENTY)
    if closing:
        tier._publisher._summing.shutdown()
    store(tier, piece)
    (path,) = files(tmp_path)
    assert path.read_bytes() == piece.file_bytes()
    assert look(tier, piece) == piece.payload
    assert [found.verdict for found in verify(tmp_path)] == [Verdict.SOUND]
    tier.close()
