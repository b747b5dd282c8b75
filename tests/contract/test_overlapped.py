"""Loads that go on while the forward pass runs: right rows, and every way they can fail."""

import threading
import time

import pytest
from batches import step
from faulty_codec import Faults, converse, install
from kv_oracle import LAYERS, oracle
from tree_rig import Rig

from krul_sglang.codec.base import CodecError
from krul_sglang.restore.trace import LoadTrace
from krul_sglang.runtime import restoring
from krul_sglang.runtime.marks import full_data
from krul_sglang.runtime.restoring import Pass

HISTORY = list(range(100, 140))


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def rig(make_rig, faults) -> Rig:
    """A conversation of 43 tokens whose turns have left the device."""
    rig = make_rig(overlapped=True)
    install(rig, faults)
    converse(rig, HISTORY)
    rig.evict()
    rig.sealed()
    assert rig.cache.full_evictable_size() == 0
    return rig


def returning(rig: Rig, *tail: int, history=HISTORY):
    """An admitted request that continues the conversation."""
    req = rig.request([*history, *tail])
    rig.match(req)
    assert rig.admit(req)
    return req


def finish(rig: Rig, reqs) -> None:
    for req in reqs:
        tokens = tuple(req.full_untruncated_fill_ids)
        assert rig.rows_of(req, len(tokens)).equal(oracle(tokens)), "not what a prefill gives"
        rig.decode(req, 5)
        rig.finish(req)
    rig.check()


def answer(rig: Rig, reqs) -> None:
    """Schedule requests that start anew, as often as it takes."""
    waiting = list(reqs)
    for _ in range(4):
        if not waiting:
            break
        for req in waiting:
            rig.match(req)
            assert rig.admit(req)
        waiting = step(rig, waiting)
    assert not waiting, "a request starts anew for ever"
    finish(rig, reqs)


def test_a_restored_conversation_continues(rig) -> None:
    req = returning(rig, 7, 8, 9)
    assert req.host_loaded_length == len(HISTORY)
    assert not step(rig, [req])
    finish(rig, [req])
    restores = rig.cache.restores
    assert rig.krul.counters.restores == 1
    assert rig.krul.counters.restored_tokens == len(HISTORY)
    trace = restores.traces[-1]
    assert (trace.tokens, trace.new, trace.recomputed) == (len(HISTORY), 3, 0)
    assert len(trace.waits) == LAYERS
    assert trace.makespan >= trace.wait_seconds
    assert restores.totals.passes == 1


@pytest.mark.parametrize("decoding", [0.0, 1e9])
def test_a_restore_says_what_a_pass_costs_or_what_decoders_on_its_cores_do(
    rig, monkeypatch, decoding: float
) -> None:
    monkeypatch.setattr(LoadTrace, "decode_seconds_since", lambda trace, began: decoding)
    compute = rig.krul.planner.compute
    compute.fixed = compute.token = compute.pair = 1e-12  # all that it takes is unexpected
    known = dict(compute.lessons)
    assert not step(rig, [returning(rig, 7, 8, 9)])
    assert (compute.lessons != known) is (decoding == 0)
    assert (compute.beside > 0) is (decoding > 0)


def test_what_a_pass_does_outside_its_layers_is_what_they_leave() -> None:
    """3 s before the first is read and 5 behind the last, one layer of 2 s among them, whatever
    layers wait."""
    waits = {0: (3.0, 4.0), 1: (6.0, 6.0), 2: (8.0, 18.0)}
    own = Pass(began=0.0, waits=waits)
    assert own.outside_layers(23.0 - own.wait_seconds) == pytest.approx(6.0)
    assert Pass(began=0.0, waits={0: (3.0, 4.0)}).outside_layers(9.0) is None


def test_a_restore_says_what_a_pass_does_outside_its_layers(rig, monkeypatch) -> None:
    compute = rig.krul.planner.compute
    assert compute.outside is None
    prefill = rig.prefill
    monkeypatch.setattr(rig, "prefill", lambda req: (time.sleep(0.2), prefill(req)))
    assert not step(rig, [returning(rig, 7, 8, 9)])  # reads every layer, then prefills
    assert compute.outside > 0.1


def test_the_pass_waits_for_each_layer_and_no_longer(rig, faults) -> None:
    faults.layer, faults.gate = 1, threading.Event()
    req = returning(rig, 7)
    reached = []

    def forward(*_):
        rig.kvcache.get_key_buffer(0)
        reached.append(0)
        threading.Timer(0.1, faults.gate.set).start()
        rig.kvcache.get_key_buffer(1)
        assert faults.gate.is_set(), "the layer was read before it was there"
        reached.append(1)

    rig.cache.restores.start_pass()
    forward()
    forward_pass = rig.cache.restores.end_pass()
    assert reached == [0, 1]
    assert forward_pass.wait_seconds >= 0.09
    assert not rig.cache.restores.settle(forward_pass, 1)
    rig.prefill(req)
    rig.decode(req, 5)
    rig.finish(req)
    rig.check()


@pytest.mark.parametrize("error", [CodecError, MemoryError])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_load_that_fails_is_a_recompute(rig, faults, layer: int, error) -> None:
    faults.layer, faults.error = layer, error
    req = returning(rig, 7, 8)
    again = step(rig, [req])
    assert again == [req]
    assert rig.krul.store.lost_count > 0
    faults.layer = None
    answer(rig, again)
    assert rig.krul.counters.misses == 1
    rig.evict()
    rig.sealed()
    assert rig.krul.store.lost_count == 0, "what was recomputed is stored anew"
    other = returning(rig, 6)
    assert other.host_loaded_length >= len(HISTORY)
    assert not step(rig, [other])
    finish(rig, [other])


def test_two_requests_that_share_a_failed_node_both_start_anew(rig, faults) -> None:
    faults.layer = 1
    first, second = returning(rig, 7, 8), returning(rig, 9)
    assert second.host_loaded_length == 0, "the second one finds the node on the device"
    stranger = rig.request(range(500, 520))
    rig.match(stranger)
    assert rig.admit(stranger)
    assert step(rig, [first, second, stranger]) == [first, second]
    rig.decode(stranger, 5)
    rig.finish(stranger)
    faults.layer = None
    answer(rig, [first, second])


def test_with_logprobs_the_whole_batch_starts_anew(rig, faults) -> None:
    """Its results lie one after the other."""
    faults.layer = 0
    req, stranger = returning(rig, 7), rig.request(range(500, 520))
    rig.match(stranger)
    assert rig.admit(stranger)
    assert step(rig, [req, stranger], logprob=True) == [req, stranger]
    faults.layer = None
    answer(rig, [req, stranger])


def test_a_load_that_stalls_is_given_up_and_stays_stored(rig, faults, monkeypatch) -> None:
    monkeypatch.setattr(restoring, "PATIENCE", 0.05)
    faults.layer, faults.gate = 1, threading.Event()
    req = returning(rig, 7)
    threading.Timer(0.5, faults.gate.set).start()
    again = step(rig, [req])
    assert again == [req]
    assert rig.cache.restores.totals.late == 1
    assert rig.krul.store.lost_count == 0
    answer(rig, again)
    faults.layer = None
    monkeypatch.undo()
    rig.evict()
    other = returning(rig, 6)
    assert other.host_loaded_length >= len(HISTORY), "slow is not lost"
    assert not step(rig, [other])
    finish(rig, [other])


def test_an_eviction_waits_for_rows_that_are_still_written(rig, faults) -> None:
    """A load whose request was not admitted after all: its rows may be freed at once."""
    faults.layer, faults.gate = 1, threading.Event()
    req = returning(rig, 7)
    rig.abort(req)
    threading.Timer(0.1, faults.gate.set).start()
    rig.evict()
    assert faults.gate.is_set(), "rows were freed while a thread wrote into them"
    assert all(one.load.over for one in rig.cache.restores.pending)
    faults.layer = None
    rig.cache.restores.settle()
    rig.check()


def test_a_failed_load_nobody_reads_leaves_the_device(rig, faults) -> None:
    faults.layer = 1
    req = returning(rig, 7)
    rig.abort(req)
    rig.cache.restores.drop(rig.cache.restores.settle())
    assert all(full_data(node).value is None for node in rig.nodes())
    assert rig.krul.store.lost_count == 1
    rig.damaged.update(s.id for s in rig.krul.store._segments.values() if s.payload is None)
    faults.layer = None
    rig.check()


def test_a_flush_gives_loads_up(rig, faults) -> None:
    faults.layer, faults.gate = 1, threading.Event()
    req = returning(rig, 7)
    rig.abort(req)
    assert faults.at_gate.wait(20)
    threading.Timer(0.1, faults.gate.set).start()
    rig.cache.reset()
    assert not rig.cache.restores.pending
    assert faults.gate.is_set()
    assert not rig.nodes()


def test_encoding_pauses_while_a_conversation_is_restored(rig, faults) -> None:
    faults.layer, faults.gate = 1, threading.Event()
    converse(rig, range(500, 530))
    req = returning(rig, 7)
    faults.encoded.clear()
    rig.evict()
    store = rig.krul.store
    assert store.totals()["segments"] > store.totals()["sealed_segments"]
    sealed = store.totals()["sealed_segments"]
    assert not faults.encoded.wait(0.1), "an encoding began"
    assert store.totals()["sealed_segments"] == sealed
    assert store.wait_sealed(20), "whoever waits for the encoder is not held up"
    faults.gate.set()
    faults.layer = None
    assert not step(rig, [req])
    finish(rig, [req])


@pytest.mark.parametrize("bandwidth", [2_000.0, 1e9])
def test_the_planner_divides_a_history(make_rig, bandwidth: float) -> None:
    """On a slow link most is computed, on a fast one all is loaded; the rows are right."""
    rig = make_rig(overlapped=True, recompute="auto", rows=1024)
    long = list(range(1000, 1500))
    converse(rig, long)
    rig.evict()
    rig.sealed()
    rig.krul.planner.load.links["memory"] = restoring_rate(bandwidth)
    rig.krul.planner.compute.lessons.clear()  # the rig's passes taught that computing is free
    req = rig.request([*long, 7])
    promised = rig.match(req)
    assert rig.match(req) == promised, "a plan is kept until the request is admitted"
    assert rig.admit(req)
    assert not step(rig, [req])
    if bandwidth > 1e6:
        assert req.host_loaded_length == len(long)
    else:
        assert req.host_loaded_length < len(long) / 2
        assert rig.krul.counters.recomputed_tokens == len(long) - req.host_loaded_length
    finish(rig, [req])
    assert rig.krul.counters.misses == 0


def restoring_rate(bandwidth: float):
    from krul_sglang.restore.cost import Rate

    return Rate(1 / bandwidth)


def test_the_planner_is_told_what_each_layer_needs(rig) -> None:
    converse(rig, range(500, 530))
    (node,) = rig.find(range(500, 530))
    plans = rig.cache.restores.plans
    with rig.krul.store.held_back():
        rig.evict()
        ids = full_data(node).host_value
        (staged,) = plans.stored_runs(ids)
    assert staged.layer_bytes is None
    rig.sealed()
    (run,) = plans.stored_runs(ids[5:])
    segment = rig.krul.store.get(rig.segment_ids(node)[0])
    assert run.layer_bytes.tolist() == rig.krul.store.open(segment).layer_bytes()
    assert run.nbytes == segment.stored_bytes * run.tokens // segment.tokens
