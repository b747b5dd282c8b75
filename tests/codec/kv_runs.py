"""KV runs for the codec tests."""

from __future__ import annotations

import torch

from krul_sglang.codec.base import KVRun, KVSpec


def random_run(spec: KVSpec, tokens: int, seed: int, start: int = 0) -> KVRun:
    """A run of arbitrary bit patterns: NaN, Inf, -0 and denormals included."""
    gen = torch.Generator().manual_seed(seed)
    word = torch.int32 if spec.dtype == "float32" else torch.int16
    info = torch.iinfo(word)

    def bits(dim: int) -> torch.Tensor:
        shape = (spec.layers, tokens, spec.kv_heads, dim)
        raw = torch.randint(info.min, info.max + 1, shape, generator=gen, dtype=torch.int64)
        return raw.to(word).view(getattr(torch, spec.dtype))

    return KVRun(bits(spec.head_dim), bits(spec.v_head_dim), start)


def bits_of(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32 if x.element_size() == 4 else torch.int16)
