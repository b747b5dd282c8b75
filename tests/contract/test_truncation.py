"""The storage boundary in the tree: what a restore would compute anyway is not stored."""

import pytest

from krul_sglang.codec import lossless
from krul_sglang.restore.cost import Rate
from krul_sglang.runtime import marks
from krul_sglang.runtime.marks import full_data


def stored(rig) -> int:
    rig.sealed()
    return rig.krul.store.totals()["stored_tokens"]


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_fraction_is_neither_stored_nor_loaded(make_rig, page_size: int) -> None:
    rig = make_rig(page_size, recompute="0.25")
    history = list(range(95))
    rig.turn(history, answer=[7, 8])  # the last token's KV is never written
    rig.evict()
    kept = stored(rig)
    assert kept == -(-(96 - 24) // page_size) * page_size
    assert rig.krul.counters.unstored_tokens == 96 - kept
    assert rig.krul.counters.dropped_tokens == 0
    req = rig.request([*history, 7, 200])
    assert rig.match(req) == 72 // page_size * page_size
    assert rig.admit(req)
    rig.prefill(req)
    rig.decode(req, 5)
    rig.finish(req)
    rig.check()


def test_the_next_turn_has_a_boundary_of_its_own(make_rig) -> None:
    rig = make_rig(recompute="0.5")
    rig.turn(range(100), answer=[7])
    rig.turn([*range(100), 300, *range(400, 499)], answer=[8])
    rig.evict()
    assert stored(rig) == 100, "half of the second turn's 200 tokens"
    rig.check()


def test_what_others_share_is_stored_whole(make_rig) -> None:
    rig = make_rig(recompute="0.5")
    shared = list(range(60))
    rig.turn([*shared, *range(100, 120)], answer=[1])
    rig.turn([*shared, *range(200, 220)], answer=[2])
    rig.evict()
    assert stored(rig) == 60, "all that is shared, though half of 80 would be 40"
    assert rig.match(rig.request([*shared, 9])) == 60 - 30
    rig.check()


def test_a_boundary_stays_where_it_is_when_the_leaf_goes(make_rig) -> None:
    rig = make_rig(recompute="0.5")
    rig.turn(range(80), answer=[7])
    rig.evict(40)
    before = {node.id: len(node.key) for node in rig.nodes()}
    assert sum(before.values()) == 40
    rig.evict()
    assert {node.id: len(node.key) for node in rig.nodes()} == before
    assert stored(rig) == 40
    (node,) = rig.nodes()
    assert marks.history(node) == 80
    rig.check()


def test_a_marked_node_with_stored_children_is_stored(make_rig) -> None:
    """Else the children would go with it."""
    rig = make_rig(recompute="never")
    rig.turn(range(80), answer=[7])
    rig.turn([*range(80), *range(100, 180)], answer=[8])
    (parent,) = rig.find(range(80))
    marks.unwant(parent)
    rig.evict()
    assert full_data(parent).host_value is not None
    assert stored(rig) == 160
    rig.check()


def test_the_next_turn_unmarks_what_it_continues(make_rig) -> None:
    rig = make_rig(recompute="0.5")
    rig.turn(range(80), answer=[7])
    assert marks.is_unwanted(rig.find(range(80))[-1])
    rig.turn([*range(80), *range(100, 180)], answer=[8])
    assert not any(marks.is_unwanted(node) for node in rig.find(range(80)))


def test_never_stores_all(make_rig) -> None:
    rig = make_rig(recompute="never")
    rig.turn(range(80), answer=[7])
    rig.evict()
    assert stored(rig) == 80
    assert rig.krul.counters.unstored_tokens == 0


def test_restores_that_load_little_move_it_and_a_faster_link_gives_it_up(
    make_rig, monkeypatch
) -> None:
    # Each layer in a frame of its own, as a real model's are: else there is nothing to overlap.
    monkeypatch.setattr(lossless, "GROUP_SCALARS", 1)
    rig = make_rig(recompute="auto", rows=2048)
    cost = rig.krul.planner.load

    def returns(n: int) -> tuple[int, int]:
        """A conversation of its own is stored and comes back: tokens stored and restored."""
        history = [n, *range(5000, 5511)]
        before = stored(rig)
        rig.turn(history, answer=[7])
        rig.evict()
        kept = stored(rig) - before
        restored = rig.krul.counters.restored_tokens
        rig.turn([*history, 9], answer=[8])
        rig.evict()
        rig.check()
        return kept, rig.krul.counters.restored_tokens - restored

    rows = rig.krul.pool.spec.token_bytes
    for n in range(10):
        cost.links["memory"] = Rate(2e-3 / rows)  # twice as slow as computing
        kept, loaded = returns(n)
        assert 0 < loaded < 400
    assert loaded < kept < 400
    assert rig.krul.counters.unstored_tokens > 0
    for n in range(20, 32):
        cost.links["memory"] = Rate(1e-6 / rows)
        kept, loaded = returns(n)
    assert kept == 512
    assert loaded == 512
