"""A real store with three sealed segments, and a loader over it."""

from types import SimpleNamespace

import pytest
import torch

from krul_sglang.codec.base import KVRun, KVSpec
from krul_sglang.codec.lossless import LosslessCodec
from krul_sglang.restore.load import Loader
from krul_sglang.store.memory import MemoryStore
from krul_sglang.strategy.base import EXACT

SPEC = KVSpec(layers=3, kv_heads=2, head_dim=8, v_head_dim=8, dtype="bfloat16")
LENGTHS = (20, 7, 33)


@pytest.fixture
def stored():
    """``rows`` [2, layers, 60, heads, dim], stored as ``segments`` whose ids are ``ids``."""
    rows = torch.randn(2, SPEC.layers, sum(LENGTHS), 2, 8).bfloat16()
    codec = LosslessCodec(SPEC)
    store = MemoryStore(SPEC, 1 << 24, {"lossless": codec}.__getitem__, "lossless")
    segments, ids, start = [], [], 0
    for length in LENGTHS:
        part = rows[:, :, start : start + length].clone()
        segment, slots = store.stage(KVRun(part[0], part[1], start), EXACT, exact=True)
        segments.append(segment)
        ids.append(slots)
        start += length
    loaders = []

    def make_loader(threads: int = 2, bandwidth: float | None = None) -> Loader:
        loaders.append(Loader(store, threads, bandwidth))
        return loaders[-1]

    yield SimpleNamespace(
        rows=rows, store=store, segments=segments, ids=torch.cat(ids), loader=make_loader
    )
    for loader in loaders:
        loader.close()
    store.close()
