"""The memory tier: staged, sealed, lost and let go, from one thread and from many."""

import random
import threading

import pytest
import torch

from krul_sglang.codec.base import CodecError
from krul_sglang.codec.lossless import LosslessCodec
from krul_sglang.store.segment import RECORD_BYTES, SLOT_BYTES, SegmentState
from krul_sglang.strategy.base import EXACT, Strategy


def read(store, segment, lo: int = 0, hi: int | None = None) -> torch.Tensor:
    hi = segment.tokens if hi is None else hi
    layers = list(store.open(segment).layers(lo, hi))
    return torch.stack([torch.stack(pair) for pair in zip(*layers, strict=True)])


def rows(run) -> torch.Tensor:
    return torch.stack([run.k, run.v])


def assert_adds_up(store) -> None:
    segments = list(store._segments.values())
    held = store.ledger.snapshot()
    assert held["tier"] == sum(s.stored_bytes for s in segments)
    assert held["staging"] == sum(s.staged_bytes for s in segments)
    assert held["index"] == sum(s.index_bytes for s in segments)
    assert store.lost_count == sum(s.state is SegmentState.LOST for s in segments)


def test_staged_and_sealed_rows_read_the_same(make_store, make_run, gate) -> None:
    store = make_store(lossless=gate)
    run = make_run(40, start=7)
    segment, ids = store.stage(run, EXACT, exact=True)
    assert ids.numel() == 40
    assert segment.state is SegmentState.STAGED
    assert store.ledger.used == run.nbytes + RECORD_BYTES + 40 * SLOT_BYTES
    staged = [read(store, segment, lo, hi) for lo, hi in ((0, 40), (3, 17), (39, 40))]
    gate.open_gate()
    assert store.wait_sealed(20)
    assert segment.state is SegmentState.SEALED
    assert segment.run is None
    assert segment.codec == "lossless"
    for (lo, hi), before in zip(((0, 40), (3, 17), (39, 40)), staged, strict=True):
        assert torch.equal(before, rows(run)[:, :, lo:hi])
        assert torch.equal(read(store, segment, lo, hi), before)
    assert_adds_up(store)
    assert store.totals()["stored_tokens"] == 40
    assert store.stats.encoded_bytes == segment.stored_bytes < store.stats.encoded_raw_bytes


def test_what_each_layer_needs_is_known_once_sealed(make_store, make_run, gate) -> None:
    store = make_store(lossless=gate)
    segment, ids = store.stage(make_run(40), EXACT, exact=True)
    store.open(segment)
    assert segment.layer_bytes is None, "of raw rows there is nothing to know"
    gate.open_gate()
    assert store.wait_sealed(20)
    assert segment.layer_bytes.tolist() == store.open(segment).layer_bytes()
    assert segment.layer_bytes.sum() == segment.stored_bytes
    assert segment.index_bytes == RECORD_BYTES + 40 * SLOT_BYTES + segment.layer_bytes.nbytes
    assert_adds_up(store)
    store.release(ids)
    assert store.ledger.used == 0


def test_a_payload_that_cannot_be_opened_leaves_its_rows_readable(make_store, make_run) -> None:
    class Spoiling(LosslessCodec):
        def encode(self, run, strategy) -> bytes:
            return super().encode(run, strategy)[:-1]

    run = make_run(40)
    store = make_store(lossless=Spoiling(make_store().spec))
    segment, _ = store.stage(run, EXACT, exact=True)
    assert store.wait_sealed(20)
    assert segment.state is SegmentState.STAGED
    assert torch.equal(read(store, segment), rows(run))
    assert_adds_up(store)


def test_measured_attention_is_counted_and_sealed_into_a_few_numbers(
    make_store, make_run, gate
) -> None:
    store = make_store(lossless=gate)
    run = make_run(40)
    strategy = Strategy("lossless", attention=bytes(range(120)))
    segment, ids = store.stage(run, strategy, exact=True)
    assert store.ledger.snapshot()["staging"] == run.nbytes + 120
    assert_adds_up(store)
    gate.open_gate()
    assert store.wait_sealed(20)
    assert segment.strategy is None
    assert segment.attention.tokens == 40
    named = RECORD_BYTES + 40 * SLOT_BYTES + segment.layer_bytes.nbytes
    assert segment.index_bytes == named + 4 * (2 + 3)
    assert_adds_up(store)
    store.release(ids)
    assert store.ledger.used == 0
    unsealed, _ = store.stage(run, strategy, exact=True)
    store.mark_lost(unsealed.id)
    assert unsealed.strategy is None
    assert_adds_up(store)


class Gate(LosslessCodec):
    """Encodes once it may, and says when it has begun."""

    def __init__(self, spec) -> None:
        super().__init__(spec)
        self.begun, self._may = threading.Event(), threading.Event()

    def open_gate(self) -> None:
        self._may.set()

    def encode(self, run, strategy):
        self.begun.set()
        assert self._may.wait(30)
        return super().encode(run, strategy)


@pytest.fixture
def gate(make_store):
    codec = Gate(make_store().spec)
    yield codec
    codec.open_gate()


@pytest.mark.parametrize("how", ["release", "mark_lost", "clear"])
def test_gone_while_it_is_being_encoded(make_store, make_run, gate, how: str) -> None:
    store = make_store(lossless=gate)
    segment, ids = store.stage(make_run(30), EXACT, exact=True)
    assert gate.begun.wait(20)
    if how == "release":
        store.release(ids)
    elif how == "mark_lost":
        store.mark_lost(segment.id)
    else:
        store.clear()
    assert store.wait_sealed(0), "nothing waits any more"
    gate.open_gate()
    after, _ = store.stage(make_run(5), EXACT, exact=True)
    assert store.wait_sealed(20)
    assert after.state is SegmentState.SEALED, "the worker went on"
    assert segment.payload is None
    with pytest.raises(CodecError, match="is lost"):
        store.open(segment)
    assert_adds_up(store)


def test_a_segment_goes_with_its_last_token(make_store, make_run) -> None:
    store = make_store()
    segment, ids = store.stage(make_run(10), EXACT, exact=True)
    store.release(ids[4:])
    assert segment.live_tokens == 4
    assert store.get(segment.id) is segment
    assert store.totals()["stored_tokens"] == 4
    store.release(ids[:4])
    assert store.get(segment.id) is None
    assert store.ledger.used == 0


def test_a_token_is_given_back_once(make_store, make_run) -> None:
    store = make_store()
    _, ids = store.stage(make_run(4), EXACT, exact=True)
    with pytest.raises(AssertionError, match="released twice"):
        store.release(torch.cat([ids[:3], ids[:3]]))


def test_lost_is_a_miss_until_released(make_store, make_run) -> None:
    store = make_store()
    segment, ids = store.stage(make_run(10), EXACT, exact=True)
    assert store.wait_sealed(20)
    store.mark_lost(segment.id)
    store.mark_lost(segment.id)
    store.mark_lost(999)
    assert store.lost_count == store.stats.lost_segments == 1
    assert store.totals()["segments"] == 0
    assert store.ledger.snapshot()["tier"] == 0
    with pytest.raises(CodecError):
        store.open(segment)
    assert_adds_up(store)
    store.release(ids)
    assert store.lost_count == 0
    assert store.ledger.used == 0


def test_a_payload_of_another_run_is_not_served(make_store, make_run) -> None:
    store = make_store()
    a, _ = store.stage(make_run(10, start=0), EXACT, exact=True)
    b, _ = store.stage(make_run(10, start=64), EXACT, exact=True)
    c, _ = store.stage(make_run(12, start=0), EXACT, exact=True)
    assert store.wait_sealed(20)
    own = a.payload
    for other in (b, c):
        a.payload = other.payload
        with pytest.raises(CodecError, match="another run"):
            store.open(a)
    a.payload = own


def test_ids_are_never_handed_out_twice(make_store, make_run) -> None:
    store = make_store()
    first = [store.stage(make_run(3), EXACT, exact=True)[0].id for _ in range(3)]
    store.clear()
    second = [store.stage(make_run(3), EXACT, exact=True)[0].id for _ in range(3)]
    assert set(first).isdisjoint(second)


def test_staging_takes_a_quarter_or_one_run(make_store, make_run, gate) -> None:
    run = make_run(40)
    store = make_store(limit=4 * run.nbytes, lossless=gate)
    assert store.staging_limit == run.nbytes
    assert store.wait_for_staging(100 * run.nbytes, 0), "one run alone always may"
    store.stage(run, EXACT, exact=True)
    assert not store.wait_for_staging(1, 0.01)
    gate.open_gate()
    assert store.wait_for_staging(run.nbytes, 20)


def test_an_encoder_that_fails_leaves_exact_rows(make_store, make_run) -> None:
    class Refuses(LosslessCodec):
        def encode(self, run, strategy):
            raise ValueError("not this run")

    spec = make_store().spec
    store = make_store(other=Refuses(spec))
    run = make_run(20)
    segment, _ = store.stage(run, Strategy(codec="other"), exact=False)
    assert store.wait_sealed(20)
    assert (segment.codec, store.stats.fallbacks) == ("lossless", 1)
    assert torch.equal(read(store, segment), rows(run))

    store = make_store(lossless=Refuses(spec))
    segment, ids = store.stage(run, EXACT, exact=True)
    assert store.wait_sealed(20)
    assert segment.state is SegmentState.STAGED
    assert torch.equal(read(store, segment), rows(run))
    store.release(ids)
    assert store.wait_for_staging(10**9, 0)
    assert store.ledger.used == 0


@pytest.mark.parametrize("workers", [1, 3])
def test_close_ends_the_workers_and_refuses_more(make_store, make_run, workers: int) -> None:
    store = make_store(workers=workers)
    runs = [make_run(20 + i) for i in range(8)]
    segments = [store.stage(run, EXACT, exact=True)[0] for run in runs]
    assert store.wait_sealed(20)
    for run, segment in zip(runs, segments, strict=True):
        assert torch.equal(read(store, segment), rows(run))
    started = list(store._encoder._threads)
    assert len(started) == workers
    assert all(worker.is_alive() for worker in started)
    store.close()
    store.close()
    assert not any(worker.is_alive() for worker in started)
    assert store.ledger.used == 0
    with pytest.raises(RuntimeError, match="closed"):
        store.stage(make_run(3), EXACT, exact=True)
    make_store().close()  # never had a worker


def test_close_wakes_whoever_waits(make_store, make_run, gate) -> None:
    run = make_run(40)
    store = make_store(limit=run.nbytes, lossless=gate)
    store.stage(run, EXACT, exact=True)
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(store.wait_for_staging(1, 30)))
    waiting.start()
    gate.open_gate()
    store.close()
    waiting.join(20)
    assert not waiting.is_alive()
    assert answers == [True]


def test_many_threads_and_the_encoder(make_store, make_run) -> None:
    """Four threads stage, read, lose and release while the worker seals and one clears."""
    store, errors, started = make_store(), [], threading.Barrier(5)
    runs = [make_run(tokens, start) for tokens in (1, 5, 33) for start in (0, 9)]

    def live(seed: int) -> None:
        rng, mine = random.Random(seed), []
        started.wait(20)
        for _ in range(150):
            run = rng.choice(runs)
            mine.append((*store.stage(run, EXACT, exact=True), run))
            segment, ids, run = rng.choice(mine)
            try:
                assert torch.equal(read(store, segment), rows(run))
            except CodecError:
                assert store.get(segment.id) is None or segment.state is SegmentState.LOST
            if rng.random() < 0.1:
                store.mark_lost(segment.id)
            if rng.random() < 0.6:
                segment, ids, _ = mine.pop(rng.randrange(len(mine)))
                cut = rng.randrange(len(ids) + 1)
                try:
                    store.release(ids[:cut])
                    store.release(ids[cut:])
                except KeyError:
                    assert cleared.is_set(), "gone without a clear"

    def clear() -> None:
        started.wait(20)
        cleared.set()
        for _ in range(5):
            store.clear()

    def guarded(work, *args) -> None:
        try:
            work(*args)
        except BaseException as error:
            errors.append(error)

    cleared = threading.Event()
    threads = [threading.Thread(target=guarded, args=(live, seed)) for seed in range(4)]
    threads.append(threading.Thread(target=guarded, args=(clear,)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert store.wait_sealed(20)
    assert_adds_up(store)
    store.clear()
    assert store.ledger.used == 0
    assert store._encoder.waiting_bytes == 0
