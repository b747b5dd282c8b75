"""What is loaded for requests in the queue: right rows later, and nothing left behind."""

import threading

import pytest
from batches import step
from faulty_codec import Faults, converse, install
from kv_oracle import LAYERS, oracle
from tree_rig import Rig

HISTORY = list(range(1000, 1120))


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def rig(make_rig, faults) -> Rig:
    """A conversation of 121 tokens that has left the device."""
    rig = make_rig(overlapped=True)
    install(rig, faults)
    converse(rig, HISTORY)
    rig.evict()
    rig.sealed()
    return rig


def queued(rig: Rig, *tail: int):
    """A returning request that is not in the batch just formed."""
    req = rig.request([*HISTORY, *tail])
    rig.cache.restores.prefetches.look_ahead([req])
    return req


def admit(rig: Rig, req) -> None:
    rig.match(req)
    assert rig.admit(req)


def answered(rig: Rig, req) -> None:
    """The request's rows are what a prefill gives, and nothing is held for it any more."""
    tokens = tuple(req.full_untruncated_fill_ids)
    assert rig.rows_of(req, len(tokens)).equal(oracle(tokens))
    rig.decode(req, 5)
    rig.finish(req)
    idle(rig)


def idle(rig: Rig) -> None:
    assert rig.krul.store.ledger.snapshot()["prefetch"] == 0
    assert not rig.cache.restores.prefetches._waiting
    rig.check()


def counts(rig: Rig) -> tuple[int, int]:
    prefetches = rig.cache.restores.prefetches
    return prefetches.started, prefetches.used


def loads(rig: Rig) -> list:
    return [one.load for one in rig.cache.restores.prefetches._waiting]


def test_what_was_decoded_in_the_queue_reaches_its_rows(rig) -> None:
    req = queued(rig, 7, 8)
    (load,) = loads(rig)
    assert load.wait(20)
    assert load.ok
    assert rig.krul.store.ledger.snapshot()["prefetch"] == len(HISTORY) * (
        rig.krul.pool.spec.token_bytes
    )
    admit(rig, req)
    assert req.host_loaded_length == len(HISTORY)
    assert not step(rig, [req])
    assert counts(rig) == (1, 1)
    assert rig.krul.counters.restored_tokens == len(HISTORY)
    answered(rig, req)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_load_that_is_under_way_goes_on_into_the_pool(rig, faults, layer: int) -> None:
    faults.layer, faults.gate = layer, threading.Event()
    req = queued(rig, 7)
    assert faults.at_gate.wait(20)
    admit(rig, req)
    threading.Timer(0.1, faults.gate.set).start()
    assert not step(rig, [req])
    assert counts(rig) == (1, 1)
    answered(rig, req)


def test_a_batch_that_never_runs_leaves_right_rows(rig) -> None:
    """Nodes join the tree when their load begins: others may read them afterwards."""
    req = queued(rig, 7)
    (load,) = loads(rig)
    assert load.wait(20)
    admit(rig, req)
    rig.abort(req)
    assert rig.cache.restores.settle() == []
    other = rig.request([*HISTORY, 9])
    rig.match(other)
    assert other.host_hit_length == 0, "on the device by now"
    assert rig.admit(other)
    rig.prefill(other)
    answered(rig, other)


def test_a_request_that_leaves_the_queue_takes_nothing_with_it(rig, faults) -> None:
    faults.layer, faults.gate = 1, threading.Event()
    queued(rig, 7)
    assert faults.at_gate.wait(20)
    threading.Timer(0.1, faults.gate.set).start()
    rig.cache.restores.prefetches.look_ahead([])
    assert faults.gate.is_set(), "staging was freed while a thread wrote into it"
    faults.layer = None
    idle(rig)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_damage_found_in_the_queue_is_a_miss(rig, faults, layer: int) -> None:
    faults.layer = layer
    req = queued(rig, 7)
    (load,) = loads(rig)
    assert load.wait(20)
    assert load.failed
    assert rig.krul.store.lost_count == 0, "only a load that is read says what is lost"
    admit(rig, req)
    again = step(rig, [req])
    assert again == [req]
    assert rig.krul.store.lost_count == 1
    assert counts(rig) == (1, 0)
    faults.layer = None
    admit(rig, req)
    assert not step(rig, [req])
    answered(rig, req)


def test_damage_found_after_the_admission_is_a_miss(rig, faults) -> None:
    faults.layer, faults.gate = LAYERS - 1, threading.Event()
    req = queued(rig, 7)
    assert faults.at_gate.wait(20)
    admit(rig, req)
    gate, faults.gate, faults.layer = faults.gate, None, None
    load = rig.cache.restores.pending[0].load
    load._changed.acquire()
    try:
        load.failed.append(rig.segment_ids(rig.find(HISTORY)[0])[0])
    finally:
        load._changed.release()
    gate.set()
    again = step(rig, [req])
    assert again == [req]
    assert counts(rig) == (1, 1)
    rig.match(req)
    assert rig.admit(req)
    assert not step(rig, [req])
    answered(rig, req)


def test_staging_is_bounded(make_rig, faults) -> None:
    rig = make_rig(overlapped=True)
    install(rig, faults)
    converse(rig, HISTORY)
    rig.evict()
    rig.sealed()
    raw = len(HISTORY) * rig.krul.pool.spec.token_bytes
    rig.krul.store.ledger.limit = 8 * raw
    reqs = [rig.request([*HISTORY, n]) for n in range(3)]
    rig.cache.restores.prefetches.look_ahead(reqs)
    assert counts(rig) == (1, 0)
    rig.cache.restores.prefetches.look_ahead(reqs)
    assert counts(rig) == (1, 0), "a request is looked at once"
    rig.cache.restores.prefetches.look_ahead([])
    idle(rig)


def test_an_eviction_that_needs_the_memory_gets_it(rig) -> None:
    queued(rig, 7)
    (load,) = loads(rig)
    assert load.wait(20)
    ledger = rig.krul.store.ledger
    converse(rig, range(3000, 3040))
    ledger.limit = ledger.used + 1024
    rig.evict()
    assert ledger.snapshot()["prefetch"] == 0
    assert rig.krul.counters.dropped_tokens == 0
    ledger.limit = 1 << 22
    idle(rig)


def test_a_prefix_that_has_changed_is_loaded_anew(rig) -> None:
    """Another request of the conversation was first and put part of it on the device."""
    req = queued(rig, 7)
    other = rig.request([*HISTORY[:80], 9])
    admit(rig, other)
    assert not step(rig, [other])
    rig.decode(other, 5)
    rig.finish(other)
    admit(rig, req)
    assert req.host_loaded_length == len(HISTORY) - 80
    assert not step(rig, [req])
    assert counts(rig) == (1, 0)
    answered(rig, req)


def test_a_flush_gives_prefetches_up(rig, faults) -> None:
    faults.layer, faults.gate = 1, threading.Event()
    queued(rig, 7)
    assert faults.at_gate.wait(20)
    threading.Timer(0.1, faults.gate.set).start()
    rig.cache.reset()
    assert faults.gate.is_set()
    assert rig.krul.store.ledger.used == 0
    idle(rig)


def test_what_is_on_the_device_is_not_prefetched(rig) -> None:
    req = rig.request([*HISTORY, 7])
    admit(rig, req)
    assert not step(rig, [req])
    answered(rig, req)
    queued(rig, 9)
    assert counts(rig) == (0, 0)
