"""Too little host memory, a slow encoder, a codec that cannot: nothing breaks, all is counted."""

import threading

import pytest
from kv_oracle import ROUNDING, RoundingCodec
from tree_rig import Rig

from krul_sglang.codec.lossless import LosslessCodec
from krul_sglang.runtime import backup
from krul_sglang.runtime.marks import full_data
from krul_sglang.runtime.pool import PoolView
from krul_sglang.store.segment import SegmentState

TOKEN = 384  # raw bytes of one token in a rig


def conversations(rig: Rig, count: int, tokens: int) -> list[list[int]]:
    out = []
    for i in range(count):
        history = list(range(1000 * i, 1000 * i + tokens))
        rig.turn(history, answer=[1])
        rig.evict()
        rig.check()
        out.append(history)
    return out


def assert_prefixes_whole(rig: Rig) -> None:
    """Whatever is stored can be reached: no node lost its parent's data."""
    for node in rig.nodes():
        data = full_data(node)
        assert data.value is not None or data.host_value is not None


@pytest.mark.parametrize("page_size", [1, 16])
def test_the_oldest_conversation_goes_first(make_rig, page_size: int) -> None:
    rig = make_rig(page_size, host_memory=96 * TOKEN)
    first, *_, last = conversations(rig, 6, 32)
    assert rig.match(rig.request([*first, 1])) == 0
    assert rig.match(rig.request([*last, 1])) == 32
    assert rig.krul.counters.dropped_tokens == 0, "stored leaves made room"
    assert_prefixes_whole(rig)


def test_stored_leaves_go_before_their_parents(make_rig) -> None:
    """One long chain of stored turns under pressure loses its end, never its middle."""
    rig = make_rig(host_memory=130 * TOKEN)
    history: list[int] = []
    for turn in range(4):
        history = [*history, *range(1000 * turn, 1000 * turn + 30)]
        rig.turn(history, answer=[1])
        rig.evict()
    whole = rig.match(rig.request([*history, 1]))
    assert whole == len(history)
    rig.turn(list(range(9000, 9020)), answer=[1])
    rig.evict()
    left = rig.match(rig.request([*history, 1]))
    assert 0 < left < whole
    again = rig.turn([*history, 1])
    assert again.host_loaded_length == left
    rig.check()


def test_a_victim_larger_than_the_budget_is_dropped_and_counted(make_rig) -> None:
    rig = make_rig(host_memory=20 * TOKEN)
    rig.turn(list(range(60)), answer=[1])
    assert rig.cache.full_evictable_size() == 60
    rig.evict()
    rig.check()
    assert rig.cache.full_evictable_size() == 0, "eviction made progress"
    assert rig.krul.counters.dropped_tokens == 60
    assert rig.krul.counters.evicted_tokens == 0
    assert rig.krul.store.totals()["segments"] == 0


def test_a_dropped_parent_takes_its_stored_children_along(make_rig) -> None:
    """The child was stored, then the budget shrank below what its parent needs."""
    rig = make_rig()
    system = list(range(40))
    rig.turn([*system, 100, 101], answer=[1])
    rig.turn([*system, 200, 201], answer=[1])
    rig.evict(2)
    rig.evict(2)
    rig.sealed()
    rig.krul.store.ledger.limit = rig.krul.store.ledger.used + 30 * TOKEN
    rig.evict()
    rig.check()
    assert rig.nodes() == []
    assert rig.krul.store.ledger.used == 0
    assert rig.krul.counters.dropped_tokens == 40 + 2 + 2, "the stored children count too"


def test_the_budget_is_never_exceeded(make_rig) -> None:
    rig = make_rig(host_memory=40 * TOKEN)
    for i in range(1, 30):
        rig.turn(list(range(1000 * i, 1000 * i + i)), answer=[1])
        rig.evict()
        rig.check()
    snapshot = rig.krul.store.ledger.snapshot()
    assert snapshot["peak"] <= snapshot["limit"]


class HeldCodec(LosslessCodec):
    """Lossless, but encodes only once it may."""

    def __init__(self, spec) -> None:
        super().__init__(spec)
        self.may = threading.Event()

    def encode(self, run, strategy):
        assert self.may.wait(30)
        return super().encode(run, strategy)


def test_a_full_staging_area_drops_instead_of_waiting_forever(make_rig, monkeypatch) -> None:
    monkeypatch.setattr(backup, "STAGING_WAIT_SECONDS", 0.05)
    probe = make_rig()
    held = HeldCodec(probe.krul.pool.spec)
    rig = make_rig(host_memory=400 * TOKEN, codecs={"lossless": held})
    for i in range(2):
        rig.turn(list(range(1000 * i, 1000 * i + 60)), answer=[1])
    rig.evict()
    assert rig.krul.counters.evicted_tokens == 60, "one fits in a quarter of the budget"
    assert rig.krul.counters.dropped_tokens == 60
    assert rig.cache.full_evictable_size() == 0
    held.may.set()
    rig.check()
    kept = [i for i in range(2) if rig.match(rig.request(range(1000 * i, 1000 * i + 61)))]
    assert len(kept) == 1


class Refusing(RoundingCodec):
    """Cannot encode what begins early in its sequence."""

    def encode(self, run, strategy):
        if run.start < 20:
            raise ValueError("not this one")
        return super().encode(run, strategy)


def test_a_codec_that_cannot_is_replaced_by_lossless_and_counted(make_rig) -> None:
    spec = PoolView(make_rig().kvcache).spec
    rig = make_rig(lossy=ROUNDING, turn_ends=[99], codecs={"rounding": Refusing(spec)})
    history = list(range(100, 130))
    rig.turn(history, answer=[1])
    rig.evict()
    rig.check()
    assert rig.krul.store.stats.fallbacks == 1
    segments = list(rig.krul.store._segments.values())
    assert {s.state for s in segments} == {SegmentState.SEALED}
    assert {s.codec for s in segments} == {"lossless"}
    rig.turn([*history, 3])
    rig.check()


class Broken(LosslessCodec):
    """Fails on every run."""

    def encode(self, run, strategy):
        raise MemoryError("no room")


def test_when_even_lossless_fails_the_rows_stay_raw_and_accounted(make_rig) -> None:
    """The encoder's failure must neither lose the rows nor leave a debt in staging."""
    spec = PoolView(make_rig().kvcache).spec
    rig = make_rig(codecs={"lossless": Broken(spec)})
    history = list(range(40))
    rig.turn(history, answer=[1])
    rig.evict()
    rig.check()
    again = rig.turn([*history, 2], answer=[1])
    assert again.host_loaded_length == 40
    rig.evict()
    rig.cache.evict_host(1 << 20)
    rig.check()
    assert rig.krul.store.ledger.used == 0
    assert rig.krul.store.wait_sealed(0.1), "released raw rows still count as waiting"


@pytest.mark.parametrize("fraction", ["0.25", "1"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_the_recompute_fraction_caps_what_is_loaded(make_rig, page_size, fraction) -> None:
    rig = make_rig(page_size, recompute=fraction)
    history = list(range(96))
    rig.turn(history, answer=[1])
    rig.evict()
    rig.sealed()
    req = rig.request([*history, 2])
    allowed = int(96 * (1 - float(fraction)))
    for _ in range(3):  # a queued request is matched more than once
        assert rig.match(req) == allowed // page_size * page_size
    assert rig.admit(req)
    assert req.host_loaded_length == allowed // page_size * page_size
    rig.prefill(req)
    rig.decode(req, 3)
    rig.checkpoint(req)
    rig.finish(req)
    kept = -(-allowed // page_size) * page_size
    assert rig.krul.counters.unstored_tokens == 96 - kept, "what is computed anyway is not stored"
    assert rig.krul.counters.recomputed_tokens == kept - req.host_loaded_length
    assert rig.krul.counters.misses == 0, "what is recomputed by plan is no miss"
    rig.check()
