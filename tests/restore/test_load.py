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


def test_what_cannot_be_opened_is_reported_before_anything_is_read(stored) -> None:
    store, (a, b, _) = stored.store, stored.segments
    assert store.wait_sealed(20)
    store.mark_lost(b.id)
    runs = [*slot_runs(stored.ids), SlotRun(999, 0, 5), SlotRun(b.id, 0, 3)]
    sink = Sink(sum(run.tokens for run in runs))
    outcome = stored.loader().load(runs, sink)
    assert not outcome.ok
    assert outcome.lost == (b.id, 999), "each once, in the order they were asked for"
    assert sink.writes == 0
    again, out = load(stored, stored.ids[: a.tokens])
    assert again.ok
    assert torch.equal(out, stored.rows[:, :, : a.tokens])


def test_a_damaged_segment_is_reported_and_the_others_stay_readable(stored) -> None:
    assert stored.store.wait_sealed(20)
    a = stored.segments[0]
    payload = bytearray(a.payload)
    payload[-1] ^= 1
    a.payload = bytes(payload)
    assert load(stored, stored.ids)[0].lost == (a.id,)
    again, out = load(stored, stored.ids[a.tokens :])
    assert again.ok
    assert torch.equal(out, stored.rows[:, :, a.tokens :])


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
    assert load(stored, stored.ids)[0].lost == (stored.segments[0].id,)
    outcome, out = load(stored, stored.ids[20:])
    assert outcome.ok
    assert torch.equal(out, stored.rows[:, :, 20:])


def test_close_ends_the_threads(stored) -> None:
    loader = stored.loader(threads=3)
    before = {t for t in threading.enumerate() if t.name.startswith("krul-load")}
    loader.load(slot_runs(stored.ids), Sink(60))
    ours = {t for t in threading.enumerate() if t.name.startswith("krul-load")} - before
    assert ours
    loader.close()
    loader.close()
    assert not any(t.is_alive() for t in ours)
