"""Runs and pairs that the tests of pair merging share."""

from __future__ import annotations

import torch

from krul_sglang.codec.base import KVRun, KVSpec
from krul_sglang.codec.pair_merge import PairMergeCodec
from krul_sglang.codec.registry import make_codec
from krul_sglang.strategy.base import Strategy

Pairs = tuple[tuple[int, int], ...]
PAIRS: Pairs = ((1, 4), (2, 3))


def spec_of(dtype: str, layers: int = 6) -> KVSpec:
    return KVSpec(layers, 2, 8, 6, dtype)


def make_run(spec: KVSpec, tokens: int, seed: int = 0, start: int = 0) -> KVRun:
    """Layers that resemble their neighbours, so that angles differ from token to token."""
    gen = torch.Generator().manual_seed(seed)

    def tensor(dim: int) -> torch.Tensor:
        shape = (spec.layers, tokens, spec.kv_heads, dim)
        x = torch.randn(shape, generator=gen).cumsum(0)
        return x.to(getattr(torch, spec.dtype))

    return KVRun(tensor(spec.head_dim), tensor(spec.v_head_dim), start)


def encode(run: KVRun, spec: KVSpec, pairs: Pairs) -> bytes:
    return make_codec("pair_merge", spec).encode(run, Strategy("pair_merge", pairs=pairs))


def decode(payload: bytes, spec: KVSpec, lo: int, hi: int) -> tuple[torch.Tensor, torch.Tensor]:
    layers = list(PairMergeCodec(spec).open(payload).layers(lo, hi))
    assert len(layers) == spec.layers
    return torch.stack([k for k, _ in layers]), torch.stack([v for _, v in layers])
