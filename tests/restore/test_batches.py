"""Short lossy neighbours are loaded as one, and a damaged one among them is found."""

from __future__ import annotations

import pytest
import torch
from small_profile import LAYERS, PROFILE, make_run, spec_of

from krul_sglang.codec.lossless import LosslessCodec
from krul_sglang.codec.predictive import PredictiveCodec
from krul_sglang.restore import load
from krul_sglang.restore.load import Loader
from krul_sglang.store.memory import MemoryStore
from krul_sglang.store.slots import slot_runs
from krul_sglang.strategy.base import EXACT, Strategy

SPEC = spec_of("float32")
LENGTHS = (12, 30, 5, 44, 9)


class Rows:
    """The sink: rows of every layer, and how many tokens each write had."""

    def __init__(self, tokens: int) -> None:
        self.k = torch.full((LAYERS, tokens, SPEC.kv_heads, SPEC.head_dim), torch.nan)
        self.writes: list[int] = []

    def __call__(self, layer: int, first: int, k: torch.Tensor, v: torch.Tensor) -> None:
        self.k[layer, first : first + len(k)] = k
        self.writes.append(len(k))


@pytest.fixture
def stored():
    """A store with an exact run, then lossy ones; their slot ids."""
    codecs = {"lossless": LosslessCodec(SPEC), "predictive": PredictiveCodec(SPEC, PROFILE)}
    store = MemoryStore(SPEC, 1 << 24, codecs.__getitem__, "lossless")
    ids, start = [], 0
    for number, length in enumerate(LENGTHS):
        run = make_run(length, number, "float32", start)
        strategy = Strategy("predictive", 0.01) if number else EXACT
        ids.append(store.stage(run, strategy, exact=not number)[1])
        start += length
    assert store.wait_sealed(20)
    assert store.stats.fallbacks == 0
    yield store, torch.cat(ids)
    store.close()


def test_lossy_neighbours_are_one_batch(stored, monkeypatch) -> None:
    store, ids = stored
    loader = Loader(store, 2)
    together, alone = Rows(len(ids)), Rows(len(ids))
    assert loader.load(slot_runs(ids), together).ok
    assert sorted(set(together.writes)) == [12, 88]
    monkeypatch.setattr(load, "BATCH_TOKENS", 1)
    assert loader.load(slot_runs(ids), alone).ok
    assert sorted(set(alone.writes)) == sorted(LENGTHS)
    torch.testing.assert_close(together.k, alone.k, rtol=0, atol=2e-5)
    loader.close()


def test_a_long_history_is_several_batches(stored, monkeypatch) -> None:
    monkeypatch.setattr(load, "BATCH_TOKENS", 50)
    store, ids = stored
    loader, rows = Loader(store, 2), Rows(len(ids))
    assert loader.load(slot_runs(ids), rows).ok
    assert set(rows.writes) == {12, 35, 44, 9}
    loader.close()


def test_the_damaged_one_of_a_batch_is_the_only_one_lost(stored) -> None:
    store, ids = stored
    runs = slot_runs(ids)
    segment = store.get(runs[2].segment)
    payload = bytearray(segment.payload)
    payload[-3] ^= 4
    segment.payload = bytes(payload)
    loader, rows = Loader(store, 2), Rows(len(ids))
    outcome = loader.load(runs, rows)
    assert outcome.lost == (segment.id,)
    loader.close()
