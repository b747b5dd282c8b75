"""A damaged segment is a miss once: recomputed exactly, stored anew, then restored again."""

import pytest
from kv_oracle import oracle
from tree_rig import Rig

from krul_sglang.runtime.marks import full_data
from krul_sglang.store.segment import SegmentState


def converse(rig: Rig, turns: int = 3) -> list[int]:
    """A conversation whose turns were stored one by one, so that it is several segments."""
    history = list(range(100, 117))
    for turn in range(turns):
        req = rig.turn(history, answer=[200 + turn, 210 + turn, 220 + turn])
        history = [*req.full_untruncated_fill_ids, *range(300 + 20 * turn, 316 + 20 * turn)]
        rig.evict()
    rig.sealed()
    return history


def chain(rig: Rig, history: list[int]) -> list[int]:
    """Ids of the stored segments along ``history``, in order."""
    return list(dict.fromkeys(s for node in rig.find(history) for s in rig.segment_ids(node)))


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_damaged_middle_segment_is_missed_once(make_rig, page_size: int) -> None:
    rig = make_rig(page_size)
    history = converse(rig)
    before = chain(rig, history)
    assert len(before) >= 3
    rig.damage(before[1])

    req = rig.request(history)
    promised = rig.match(req)
    assert rig.admit(req)
    assert req.host_loaded_length == 0, "all or nothing"
    rig.prefill(req)
    rig.decode(req, 77)
    rig.checkpoint(req)
    assert rig.rows_of(req, len(history)).equal(oracle(tuple(history)))
    rig.finish(req)
    rig.check()
    counters = rig.krul.counters
    assert counters.recomputed_tokens == promised
    assert counters.misses == 1
    assert rig.krul.store.stats.lost_segments == 1

    rig.evict()
    rig.sealed()
    assert rig.krul.store.lost_count == 0, "the lost segment was let go"
    assert before[1] not in chain(rig, history)
    again = rig.turn([*history, 5])
    assert again.host_loaded_length >= len(history) // page_size * page_size
    assert counters.misses == 1, "no repeated miss"
    rig.check()


def test_what_lies_above_the_damage_is_still_restored(make_rig) -> None:
    """Once the loss is known, a match ends right before it."""
    rig = make_rig()
    history = converse(rig)
    ids = chain(rig, history)
    rig.damage(ids[1])
    first = rig.request(history)
    rig.match(first)
    assert rig.admit(first)
    rig.abort(first)  # it only found the damage out

    second = rig.request(history)
    promised = rig.match(second)
    assert promised == rig.krul.store.get(ids[0]).tokens
    assert rig.admit(second)
    assert second.host_loaded_length == promised
    rig.prefill(second)
    rig.finish(second)
    rig.check()


def split_stored(rig: Rig) -> tuple[list[int], int]:
    """A stored conversation whose one segment is shared by two nodes after a split."""
    history = list(range(100, 140))
    rig.turn(history, answer=[1])
    rig.evict()
    rig.sealed()
    (segment,) = chain(rig, history)
    rig.match(rig.request([*history[:20], 900, 901]))  # splits the stored node
    nodes = rig.find(history)
    assert [rig.segment_ids(node) for node in nodes] == [[segment], [segment]]
    return history, segment


def test_a_lost_segment_that_two_nodes_share(make_rig) -> None:
    rig = make_rig()
    history, segment = split_stored(rig)
    rig.damage(segment)
    rig.turn([*history, 2])
    rig.evict()
    rig.sealed()
    assert rig.krul.store.get(segment) is None, "both nodes let it go"
    again = rig.turn([*history, 3])
    assert again.host_loaded_length == len(history)
    rig.check()


def test_a_lost_segment_whose_other_half_is_on_the_device(make_rig) -> None:
    """The resident half must not count its lost copy as stored: its next eviction would
    throw good rows away and the conversation would be missed again."""
    rig = make_rig()
    history, segment = split_stored(rig)
    rig.turn([*history[:20], 900, 901], answer=[1])  # restores the first half only
    rig.damage(segment)
    top, rest = rig.find(history)
    assert full_data(top).value is not None
    assert full_data(rest).value is None

    rig.turn([*history, 2])
    rig.check()
    rig.evict()
    rig.sealed()
    assert rig.krul.store.lost_count == 0
    again = rig.turn([*history, 3])
    assert again.host_loaded_length == len(history)
    rig.check()


def test_an_aborted_discovery_leaves_resident_rows_worth_storing(make_rig) -> None:
    """As above, but the request that found the damage never inserted anything."""
    rig = make_rig()
    history, segment = split_stored(rig)
    rig.turn([*history[:20], 900, 901], answer=[1])
    rig.damage(segment)
    req = rig.request(history)
    rig.match(req)
    assert rig.admit(req)
    rig.abort(req)
    rig.evict()
    rig.sealed()
    assert rig.match(rig.request(history)) == 20
    rig.check()


def test_damage_found_while_another_request_reads_the_prefix(make_rig) -> None:
    rig = make_rig()
    history = converse(rig)
    ids = chain(rig, history)
    reader = rig.request([*history[:18], 950, 951])
    rig.match(reader)
    assert rig.admit(reader)
    rig.prefill(reader)
    rig.damage(ids[-1])
    rig.turn([*history, 4])
    rig.decode(reader, 60)
    rig.checkpoint(reader)
    rig.check(idle=False)
    rig.finish(reader)
    rig.check()


def test_flush_forgets_lost_and_stored_alike(make_rig) -> None:
    rig = make_rig()
    history = converse(rig)
    ids = chain(rig, history)
    rig.damage(ids[0])
    req = rig.request(history)
    rig.match(req)
    assert rig.admit(req)
    assert rig.krul.store.get(ids[0]).state is SegmentState.LOST
    rig.abort(req)
    rig.cache.reset()
    rig.allocator.clear()
    rig.damaged.clear()
    assert rig.krul.store.lost_count == 0
    assert rig.krul.store.ledger.used == 0
    assert rig.match(rig.request(history)) == 0
    rig.turn(history)
    rig.check()


def test_a_stored_segment_is_readable_before_it_is_encoded(make_rig) -> None:
    """Evicted and wanted back at once, the raw rows serve."""
    rig = make_rig()
    history = list(range(100, 160))
    rig.turn(history)
    rig.evict()
    again = rig.turn([*history, 2])
    assert again.host_loaded_length == len(history)
    rig.check()
