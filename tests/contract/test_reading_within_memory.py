"""What is read from the disk stays within the memory budget, whoever asks for it."""

from __future__ import annotations

import pytest
from batches import step
from faulty_codec import converse
from tree_rig import Rig

from krul_sglang.runtime.prefetching import SHARE

HISTORY = list(range(1000, 1120))
LONGER = [*HISTORY, *range(5000, 5060)]
OTHER = list(range(7000, 7120))


@pytest.fixture
def rig(make_rig, tmp_path) -> Rig:
    return make_rig(overlapped=True, disk=tmp_path / "tier")


def store(rig: Rig, tokens: list[int]) -> None:
    """In memory and on the disk."""
    converse(rig, tokens)
    rig.evict()
    rig.written()


def resident(rig: Rig) -> set[int]:
    return {one.id for one in rig.krul.store._segments.values() if one.payload is not None}


@pytest.mark.parametrize("fits", [True, False])
def test_a_prefetch_counts_the_bytes_it_reads(rig: Rig, fits: bool) -> None:
    """Room for the decoded rows, and for what they come from or not."""
    store(rig, HISTORY)
    krul = rig.krul
    krul.store.demote(1 << 40)
    ledger, rows = krul.store.ledger, len(HISTORY) * krul.pool.spec.token_bytes
    ledger.add("profile", 2 * SHARE * rows)  # memory is nearly full of something else
    on_disk = krul.store.bytes_to_read(krul.store._segments)
    assert on_disk > krul.pool.spec.token_bytes
    ledger.limit = ledger.used + rows + fits * on_disk
    req = rig.request([*HISTORY, 7])
    rig.cache.restores.prefetches.look_ahead([req])
    assert rig.cache.restores.prefetches.started == fits
    assert ledger.snapshot()["peak"] <= ledger.limit
    rig.cache.restores.prefetches.drop_all()


@pytest.mark.parametrize("others", [False, True])
def test_what_makes_way_of_a_path_is_read_with_the_rest(rig: Rig, others: bool) -> None:
    """A path whose head is in memory and whose tail is on the disk alone, one byte too long."""
    krul = rig.krul
    store(rig, HISTORY)
    store(rig, LONGER)
    krul.store.demote(1 << 40)
    path = list(krul.store._segments)
    head = rig.request([*HISTORY])
    rig.match(head)
    assert rig.admit(head)
    assert not step(rig, [head])
    rig.finish(head)
    in_memory = resident(rig)
    assert in_memory
    assert krul.store.bytes_to_read(path) > 0, "the tail"
    if others:
        store(rig, OTHER)
    krul.store.ledger.limit = krul.store.ledger.used + krul.store.bytes_to_read(path) - 1
    assert krul.store.make_room_to_read(path) == others
    if others:
        assert resident(rig) >= in_memory, "those of others go first"
    else:
        assert not resident(rig)


def test_what_is_kept_late_takes_nobody_elses_room(rig: Rig) -> None:
    """Bytes that were read are kept after another path was found to fit."""
    store(rig, HISTORY)
    store(rig, OTHER)
    memory = rig.krul.store
    memory.demote(1 << 40)
    first, second = sorted(memory._segments.values(), key=lambda one: one.tokens)[-2:]
    reader = memory.open(first)
    reader.fetch(memory.spec.layers - 1)
    before = memory.ledger.used
    memory.ledger.limit = before + memory.bytes_to_read([second.id])
    assert memory.make_room_to_read([second.id])
    assert reader.source is not None
    reader.source.keep()
    assert memory.ledger.used == before, "they counted already"
    other = memory.open(second)
    assert memory.ledger.used <= memory.ledger.limit
    del reader
    assert first.payload is not None
    assert memory.ledger.snapshot()["tier"] == first.sealed_bytes
    del other
    assert memory.ledger.snapshot()["loading"] == 0
