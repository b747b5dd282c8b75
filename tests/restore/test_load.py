"""Loading slots: every token at its place, damage reported by segment, nothing raised for it."""

import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from krul_sglang.restore.load import LoadOutcome
from krul_sglang.store.slots import SlotRun, slot_runs


class Sink:
    """Keeps what was written, and refuses to be written to twice."""

    def __init__(self, tokens: int) -> None:
        self.out = torch.full((2, 3, tokens, 2, 8), torch.nan, dtype=torch.bfloat16)
        self.writes, self._lock = 0, threading.Lock()

    def __call__(self, layer: int, first: int, k: torch.Tensor, v: torch.Tensor) -> None:
        target = self.out[:, layer, first : first + len(k)]
        assert target.isnan().all(), "a row was written twice"
        target[0], target[1] = k, v
        with self._lock:
            self.writes += 1


def load(stored, ids: torch.Tensor, **loader) -> tuple[LoadOutcome, torch.Tensor]:
    sink = Sink(len(ids))
    return stored.loader(**loader).load(slot_runs(ids), sink), sink.out


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("sealed", [False, True])
def test_every_token_reaches_its_place(stored, sealed: bool, threads: int) -> None:
    if sealed:
        assert stored.store.wait_sealed(20)
    outcome, out = load(stored, stored.ids, threads=threads)
    assert outcome.ok
    assert outcome.tokens == 60
    assert torch.equal(out, stored.rows)
    if sealed:
        assert outcome.stored_bytes == sum(s.stored_bytes for s in stored.segments)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(cuts=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=4))
def test_any_slices_in_any_order(stored, cuts) -> None:
    """What a tree asks for after splits: parts of segments, in any order, parts twice."""
    picked = torch.cat([torch.arange(lo, max(lo, hi)) for lo, hi in cuts])
    outcome, out = load(stored, stored.ids[picked])
    assert outcome.ok
    assert outcome.tokens == len(picked)
    assert torch.equal(out, stored.rows[:, :, picked])


def test_nothing_to_load(stored) -> None:
    outcome, _ = load(stored, stored.ids[:0])
    assert outcome == LoadOutcome(0, 0, ())


def test_damaged_lost_and_gone_segments_are_all_reported(stored) -> None:
    store, (a, b, _) = stored.store, stored.segments
    assert store.wait_sealed(20)
    payload = bytearray(a.payload)
    payload[-1] ^= 1
    a.payload = bytes(payload)
    store.mark_lost(b.id)
    runs = [*slot_runs(stored.ids), SlotRun(999, 0, 5), SlotRun(a.id, 0, 3)]
    sink = Sink(sum(run.tokens for run in runs))
    outcome = stored.loader().load(runs, sink)
    assert not outcome.ok
    assert outcome.lost == (a.id, b.id, 999), "each once, in the order they were asked for"
    assert torch.equal(sink.out[:, :, 27:60], stored.rows[:, :, 27:]), "the rest was read"
    again, out = load(stored, stored.ids[27:])
    assert again.ok
    assert torch.equal(out, stored.rows[:, :, 27:])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_payload_is_a_miss(stored, share: float) -> None:
    assert stored.store.wait_sealed(20)
    segment = stored.segments[2]
    whole = segment.payload
    segment.payload = whole[: int(len(whole) * share)]
    outcome, _ = load(stored, stored.ids)
    segment.payload = whole
    assert outcome.lost == (segment.id,)


def test_a_released_segment_is_a_miss_not_an_error(stored) -> None:
    stored.store.release(stored.ids[:20])
    outcome, out = load(stored, stored.ids)
    assert outcome.lost == (stored.segments[0].id,)
    assert torch.equal(out[:, :, 20:], stored.rows[:, :, 20:])


def test_a_throttled_load_waits_for_its_bytes(stored, monkeypatch) -> None:
    """The pause is what the bytes owe at the given rate; damage is not waited for."""
    assert stored.store.wait_sealed(20)
    slept = []
    monkeypatch.setattr("krul_sglang.restore.load.time.sleep", slept.append)
    outcome, out = load(stored, stored.ids, bandwidth=1.0)
    assert torch.equal(out, stored.rows)
    assert len(slept) == 1
    assert outcome.stored_bytes - 60 < slept[0] <= outcome.stored_bytes
    load(stored, stored.ids, bandwidth=1e15)
    stored.store.mark_lost(stored.segments[0].id)
    load(stored, stored.ids, bandwidth=1.0)
    assert len(slept) == 1


def test_close_ends_the_threads(stored) -> None:
    loader = stored.loader(threads=3)
    before = {t for t in threading.enumerate() if t.name.startswith("krul-load")}
    loader.load(slot_runs(stored.ids), Sink(60))
    ours = {t for t in threading.enumerate() if t.name.startswith("krul-load")} - before
    assert ours
    loader.close()
    loader.close()
    assert not any(t.is_alive() for t in ours)
