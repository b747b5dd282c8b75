"""What a request that demands exact KV may be served from, and what it leaves behind."""

import pytest
import torch
from kv_oracle import ROUNDING, oracle
from tree_rig import Rig

from krul_sglang.runtime.exact import LOSSY_TOKENS
from krul_sglang.runtime.marks import is_lossy
from krul_sglang.strategy.base import SINKS

END = 9
HISTORY = [*range(100, 115), END, *range(200, 248)]  # 16 exact tokens, then 48 lossy ones


@pytest.fixture(params=[1, 16])
def rig(make_rig, request) -> Rig:
    return make_rig(request.param, lossy=ROUNDING, turn_ends=[END])


def store_lossy(rig: Rig, history=HISTORY) -> None:
    rig.turn(history, answer=[1])
    rig.evict()
    rig.sealed()


def marks(rig: Rig, history=HISTORY) -> list[bool]:
    return [is_lossy(n) for n in rig.find(history)]


def test_a_plain_request_is_told_how_many_tokens_came_back_lossy(rig: Rig) -> None:
    store_lossy(rig)
    req = rig.request([*HISTORY, 5])
    rig.match(req)
    assert rig.admit(req)
    assert req.host_loaded_length == len(HISTORY)
    assert getattr(req, LOSSY_TOKENS) == 48  # the opening, 16 tokens, is exact
    rig.prefill(req)
    rig.finish(req)
    assert any(marks(rig))
    rig.check()


def test_stored_lossy_is_a_miss(rig: Rig) -> None:
    store_lossy(rig)
    req = rig.turn([*HISTORY, 5], exact=True)
    assert req.host_loaded_length == 16, "the exact opening of the same node is used"
    assert getattr(req, LOSSY_TOKENS) == 0
    assert rig.krul.counters.misses == 1
    rig.check()


def test_resident_lossy_is_a_miss_and_is_replaced(rig: Rig) -> None:
    store_lossy(rig)
    rig.turn([*HISTORY, 5])  # brings the lossy rows back
    assert any(marks(rig))
    req = rig.request([*HISTORY, 6], exact=True)
    assert rig.match(req) < len(HISTORY)
    assert rig.admit(req)
    rig.prefill(req)
    rig.decode(req, 7)
    rig.checkpoint(req)
    rig.finish(req)
    assert not any(marks(rig)), "the exact rows took the lossy nodes over"
    rig.check()
    again = rig.request([*HISTORY, 8], exact=True)
    assert rig.match(again) == len(HISTORY)
    assert again.host_hit_length == 0


def test_a_lossy_node_in_use_is_left_alone(rig: Rig) -> None:
    """Its reader goes on undisturbed; the exact request keeps its own rows to the end."""
    store_lossy(rig)
    reader = rig.request([*HISTORY, 5])
    rig.match(reader)
    assert rig.admit(reader)
    rig.prefill(reader)
    rig.decode(reader, 50)

    exact = rig.request([*HISTORY, 6], exact=True)
    rig.match(exact)
    assert rig.admit(exact)
    rig.prefill(exact)
    rig.decode(exact, 51)
    rig.checkpoint(exact)
    for token in (52, 53):
        rig.decode(exact, token)
    length = exact.kv.kv_committed_len
    tokens = tuple(exact.full_untruncated_fill_ids[:length])
    assert torch.equal(rig.rows_of(exact, length), oracle(tokens))
    rig.check()
    rig.finish(exact)
    rig.decode(reader, 54)
    rig.finish(reader)
    assert any(marks(rig))
    rig.check()


def test_the_mark_follows_a_split_and_a_second_eviction(rig: Rig) -> None:
    store_lossy(rig)
    rig.turn([*HISTORY, 5])
    rig.match(rig.request([*HISTORY[:32], 70, 71]))  # splits the restored node
    assert sum(marks(rig)) >= 2
    rig.evict()
    rig.check()
    again = rig.request([*HISTORY, 6], exact=True)
    assert rig.match(again) <= SINKS + rig.page_size + len(HISTORY[:16])
    plain = rig.turn([*HISTORY, 7])
    assert plain.host_loaded_length == len(HISTORY)
    assert getattr(plain, LOSSY_TOKENS) > 0
    rig.check()


def test_a_restored_node_is_not_encoded_a_second_time(rig: Rig) -> None:
    """A second lossy encoding would lose quality; the stored original is kept instead."""
    store_lossy(rig)
    before = {s.id: s.payload for s in rig.krul.store._segments.values()}
    rig.turn([*HISTORY, 5], answer=[1])
    rig.evict()
    rig.sealed()
    after = {s.id: s.payload for s in rig.krul.store._segments.values()}
    assert before.items() <= after.items()


def test_what_was_computed_on_lossy_rows_is_marked_even_if_stored_exactly(rig: Rig) -> None:
    """A branch makes everything above it shared, so it is stored losslessly; that does
    not make rows exact that were computed on a lossy prefix."""
    store_lossy(rig)
    longer = [*HISTORY, *range(300, 332)]
    rig.turn(longer)
    rig.turn([*longer, *range(400, 416)])
    rig.turn([*longer, *range(500, 516)])
    rig.evict()
    rig.check()
    exact = rig.request([*longer, 6], exact=True)
    assert rig.match(exact) < len(HISTORY)
    assert rig.admit(exact)
    rig.prefill(exact)
    rig.finish(exact)
    rig.check()


def test_shared_prefixes_are_stored_exactly(rig: Rig) -> None:
    system = [*range(100, 131), END]
    for tail in (300, 400):
        rig.turn([*system, *range(tail, tail + 32)], answer=[1])
    rig.evict()
    rig.sealed()
    req = rig.request([*system, *range(300, 332), 6], exact=True)
    assert rig.match(req) == len(system)
    assert rig.admit(req)
    assert req.host_loaded_length == len(system)
    rig.prefill(req)
    rig.finish(req)
    rig.check()


def test_an_answer_that_began_exact_ends_exact(rig: Rig) -> None:
    """Retracted in the middle, its own history may have become lossy by then."""
    req = rig.request(HISTORY, max_new=20)
    rig.match(req)
    assert rig.admit(req)
    rig.prefill(req)
    rig.decode(req, 50)
    rig.checkpoint(req)
    rig.decode(req, 51)
    rig.retract(req)
    rig.evict()
    rig.sealed()
    assert rig.krul.store.totals()["lossy_segments"] > 0

    rig.match(req)
    assert rig.admit(req)
    assert req.host_loaded_length == 16, "only the exact opening"
    assert getattr(req, LOSSY_TOKENS) == 0
    rig.prefill(req)
    assert torch.equal(rig.rows_of(req, 66), oracle(tuple(req.full_untruncated_fill_ids[:66])))
    rig.finish(req)
    rig.check()


def test_an_answer_that_began_lossy_may_go_on_lossy(rig: Rig) -> None:
    store_lossy(rig)
    req = rig.request([*HISTORY, 5], max_new=20)
    rig.match(req)
    assert rig.admit(req)
    rig.prefill(req)
    rig.decode(req, 50)
    lossy = getattr(req, LOSSY_TOKENS)
    rig.retract(req)
    rig.evict()
    rig.match(req)
    assert rig.admit(req)
    assert req.host_loaded_length == len(HISTORY)
    assert getattr(req, LOSSY_TOKENS) == lossy > 0
    rig.prefill(req)
    rig.finish(req)
    rig.check()


def test_with_a_lossless_policy_nothing_is_ever_lossy(make_rig) -> None:
    rig = make_rig()
    store_lossy(rig)
    req = rig.turn([*HISTORY, 5], exact=True)
    assert req.host_loaded_length == len(HISTORY)
    rig.check()


def test_a_failed_load_of_lossy_segments_leaves_an_exact_request(rig: Rig) -> None:
    """What the match promised as lossy was recomputed: the report must say so."""
    store_lossy(rig)
    for segment in list(rig.krul.store._segments.values()):
        rig.damage(segment.id)
    req = rig.request([*HISTORY, 5])
    rig.match(req)
    assert getattr(req, LOSSY_TOKENS) > 0
    assert rig.admit(req)
    assert getattr(req, LOSSY_TOKENS) == 0
    rig.prefill(req)
    rig.finish(req)
    assert not any(marks(rig))
    rig.check()
