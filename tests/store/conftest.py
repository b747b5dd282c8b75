"""Real stores over the real lossless codec, closed at the end."""

import pytest
import torch

from krul_sglang.codec.base import KVRun, KVSpec
from krul_sglang.codec.lossless import LosslessCodec
from krul_sglang.store.memory import MemoryStore

SPEC = KVSpec(layers=3, kv_heads=2, head_dim=8, v_head_dim=8, dtype="float32")


@pytest.fixture
def make_run():
    """Runs of random rows: ``make_run(tokens, start)``; the same arguments, the same rows."""

    def make(tokens: int, start: int = 0) -> KVRun:
        generator = torch.Generator().manual_seed(1000 * tokens + start)
        rows = torch.randn(2, SPEC.layers, tokens, SPEC.kv_heads, 8, generator=generator)
        return KVRun(k=rows[0], v=rows[1], start=start)

    return make


@pytest.fixture
def make_store():
    """Stores with :class:`MemoryStore`'s limit; ``codecs`` adds to or replaces lossless."""
    stores: list[MemoryStore] = []

    def make(limit: int = 1 << 24, workers: int = 1, **codecs) -> MemoryStore:
        known = {"lossless": LosslessCodec(SPEC), **codecs}
        stores.append(MemoryStore(SPEC, limit, known.__getitem__, "lossless", workers))
        return stores[-1]

    yield make
    for store in stores:
        store.close()
