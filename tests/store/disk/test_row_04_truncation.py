"""Row 4: files cut at every place, zeroed, grown: a miss, whenever it happens."""

from __future__ import annotations

import os
import random

import pytest
from disk_kit import Piece, assert_agrees, files, look, opened, set_aside, store
from restore_rig import STRATEGIES, Restorer, same

from krul_sglang.codec.base import CodecError

PIECE = Piece(1, 3, size=2000)


def lengths(head: int, size: int) -> list[int]:
    """Every length within the header and at its end, and some within the payload."""
    cuts = random.Random(0).sample(range(head + 2, size - 1), 60)
    return [*range(head + 2), *cuts, size - 1]


@pytest.mark.parametrize("known", [True, False], ids=["known", "found so"])
def test_cut_files(open_tier, root, counts, known) -> None:
    tier = open_tier()
    name = store(tier, PIECE)
    (path,) = files(root)
    whole = path.read_bytes()
    cuts = lengths(name.size - PIECE.size, name.size)
    for done, length in enumerate(cuts):
        path.write_bytes(whole)
        tier.refresh()
        if known:
            assert name in tier.names()
            os.truncate(path, length)
        else:
            path.unlink()
            tier.refresh()
            assert name not in tier.names()
            path.write_bytes(whole[:length])
            tier.refresh()
            assert name not in tier.names(), "its size alone tells"
        assert look(tier, PIECE) is None
        assert tier.totals()["damaged"] == done + 1
        assert not path.exists()
    assert store(tier, PIECE) == name
    assert_agrees(tier, root)
    counts(cuts=len(cuts), misses=len(cuts), wrong_bytes=0)


def test_a_cut_file_whose_name_agrees_is_refused_too(open_tier, root, counts) -> None:
    tier = open_tier()
    name = store(tier, PIECE)
    (path,) = files(root)
    whole = path.read_bytes()
    path.unlink()
    cuts = lengths(name.size - PIECE.size, name.size)
    for length in [*cuts, name.size + 1, name.size + 5000]:
        shorter = name._replace(size=length)
        path.with_name(shorter.file).write_bytes((whole + bytes(5000))[:length])
        tier.refresh()
        assert shorter in tier.names()
        assert look(tier, PIECE) is None
        assert shorter not in tier.names()
    assert not files(root)
    counts(cuts_with_the_size_in_the_name=len(cuts), wrong_bytes=0)


@pytest.mark.parametrize("tail", [b"\0", b"x" * 4096])
@pytest.mark.parametrize("known", [True, False], ids=["known", "found so"])
def test_a_file_that_grew(open_tier, root, tail, known) -> None:
    tier = open_tier()
    store(tier, PIECE)
    (path,) = files(root)
    with open(path, "ab") as file:
        file.write(tail)
    if not known:
        tier = open_tier()
    assert look(tier, PIECE) is None
    assert tier.totals()["damaged"] == 1
    assert len(set_aside(root)) == 1


def test_a_file_that_shrinks_while_it_is_read(open_tier, root) -> None:
    """An error, where a mapped file would be a signal; what was fetched stays what it was."""
    tier = open_tier()
    store(tier, PIECE)
    payload = opened(tier, PIECE)
    assert payload is not None
    payload.fetch(500)
    os.truncate(files(root)[0], payload.name.size - 1000)
    with pytest.raises(CodecError, match="ends early"):
        payload.fetch(payload.size)
    assert bytes(payload.view[:500]) == PIECE.payload[:500]


@pytest.mark.parametrize("codec", STRATEGIES)
def test_zeroed_ranges(root, counts, codec) -> None:
    """As a power loss leaves a file whose size was written and whose blocks were not."""
    rig, rng = Restorer(root, codec), random.Random(0)
    size = len(rig.whole)
    ranges = [(0, size), (0, rig.head), (rig.head, size), (size - 1, size), (0, 1)]
    ranges += [(at, min(size, at + 512)) for at in range(0, size, 512)]
    ranges += [(at, at + 1) for at in rng.sample(range(size - 1), 40)]
    misses = 0
    for lo, hi in ranges:
        raw = rig.whole[:lo] + bytes(hi - lo) + rig.whole[hi:]
        rig.put(raw)
        found = rig.restore()
        if found is None:
            assert raw != rig.whole
            assert not rig.path.exists()
            misses += 1
        else:
            assert same(found, rig.rows)
            assert sum(a != b for a, b in zip(raw, rig.whole, strict=True)) <= 1
    assert misses == rig.tier.totals()["damaged"] > len(ranges) // 2
    rig.close()
    counts(**{f"{codec} ranges zeroed": len(ranges)}, misses=misses, wrong_rows=0)
