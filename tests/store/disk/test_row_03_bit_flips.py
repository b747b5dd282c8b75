"""Row 3: every bit of a header, bits of payloads, characters of names: a miss, set aside."""

from __future__ import annotations

import random

import pytest
from disk_kit import Piece, assert_agrees, files, look, set_aside, store
from restore_rig import STRATEGIES, Restorer, same

from krul_sglang.store.disk.quarantine import MAX_FILES
from krul_sglang.store.disk.upkeep import Verdict, verify


def flipped(raw: bytes, bit: int) -> bytes:
    out = bytearray(raw)
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


@pytest.mark.parametrize("namespace", ["none", "both"])
def test_every_bit_of_a_header(open_tier, root, counts, namespace) -> None:
    keys = () if namespace == "none" else ("adapter", "salt")
    piece = Piece(1, 3, namespace=type(Piece.namespace)(*keys))
    tier = open_tier()
    name = store(tier, piece)
    (path,) = files(root)
    whole = path.read_bytes()
    bits = 8 * (name.size - piece.size)
    for bit in range(bits):
        path.write_bytes(flipped(whole, bit))
        tier.refresh()
        assert look(tier, piece) is None
        assert tier.totals()["damaged"] == bit + 1
        assert not path.exists()
        assert len(set_aside(root)) == min(bit + 1, MAX_FILES)
    assert set_aside(root)[-1].read_bytes() == flipped(whole, bits - 1)
    assert store(tier, piece) == name, "it can be stored anew"
    assert look(tier, piece) == piece.payload
    assert_agrees(tier, root)
    counts(header_flips=bits, misses=bits, set_aside=bits, wrong_bytes=0)


def restore_flips(root, counts, codec: str, sample: int) -> None:
    rig = Restorer(root, codec)
    bits = range(8 * rig.head, 8 * len(rig.whole))
    chosen = random.Random(codec).sample(bits, min(sample, len(bits)))
    harmless = 0
    for bit in chosen:
        damaged = rig.tier.totals()["damaged"]
        rig.put(flipped(rig.whole, bit))
        found = rig.restore()
        if found is not None:
            # zstd ignores one bit of a frame's header.
            assert same(found, rig.rows)
            harmless += 1
            continue
        assert rig.tier.totals()["damaged"] == damaged + 1
        assert not rig.path.exists()
    assert harmless < len(chosen) / 50
    rig.close()
    counts(**{f"{codec} flips": len(chosen)}, misses=len(chosen) - harmless, wrong_rows=0)


@pytest.mark.parametrize("codec", STRATEGIES)
def test_bits_of_payloads_that_are_restored(root, counts, codec) -> None:
    restore_flips(root, counts, codec, 150)


@pytest.mark.long
@pytest.mark.parametrize("codec", STRATEGIES)
def test_every_bit_of_a_payload_that_is_restored(root, counts, codec) -> None:
    restore_flips(root, counts, codec, 1 << 20)


def test_verification_finds_every_flip(open_tier, root, counts) -> None:
    piece = Piece(1, size=2000)
    store(open_tier(), piece)
    (path,) = files(root)
    whole = path.read_bytes()
    chosen = random.Random(0).sample(range(8 * len(whole)), 200)
    for bit in chosen:
        path.write_bytes(flipped(whole, bit))
        (checked,) = verify(root)
        assert checked.verdict is Verdict.DAMAGED
        assert not path.exists()
    path.write_bytes(whole)
    (checked,) = verify(root)
    assert checked.verdict is Verdict.SOUND
    counts(verified_flips=len(chosen), found=len(chosen))


def test_every_character_of_a_name(open_tier, root, counts) -> None:
    """A sound file under another name is a miss, or found with what it says of itself: names
    only find."""
    piece, rng = Piece(1, 3), random.Random(0)
    name = store(open_tier(), piece)
    (path,) = files(root)
    refused = 0
    for at, old in enumerate(name.file):
        new = rng.choice([c for c in "0123456789abcdef.k-" if c != old])
        wrong = path.with_name(name.file[:at] + new + name.file[at + 1 :])
        path.rename(wrong)
        tier = open_tier()
        assert look(tier, piece) in (None, piece.payload)
        for other in tier.names():
            assert tier.reopen(other) is None
        assert not tier.names()
        refused += 1
        for left in [*files(root), wrong, *set_aside(root)]:
            if left.exists():
                left.rename(path)
    assert look(open_tier(), piece) == piece.payload
    counts(names_changed=refused, wrong_bytes=0)
