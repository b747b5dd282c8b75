"""A profile fitted in a second on layers that are linear in each other, plus noise."""

from __future__ import annotations

from dataclasses import replace

import torch

from krul_sglang.codec.base import KVRun, KVSpec
from krul_sglang.codec.guard import quarters
from krul_sglang.codec.predictive import ROUNDING, PredictiveCodec
from krul_sglang.profile.base import Profile
from krul_sglang.profile.fit import Samples, fit
from krul_sglang.profile.rope import Rope
from krul_sglang.strategy.base import Strategy

LAYERS, HEADS, DIM = 5, 2, 8
WIDTH = 2 * HEADS * DIM
ROPE = Rope(10000.0 ** (-torch.arange(0, DIM, 2, dtype=torch.float32) / DIM))


def spec_of(dtype: str) -> KVSpec:
    return KVSpec(LAYERS, HEADS, DIM, DIM, dtype)


def _layers(tokens: int, seed: int) -> torch.Tensor:
    fixed = torch.Generator().manual_seed(1)
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, WIDTH, generator=gen)
    out = [x]
    for _ in range(LAYERS - 1):
        step = torch.randn(WIDTH, WIDTH, generator=fixed) / WIDTH**0.5
        x = x @ step + 0.2 * torch.randn(tokens, WIDTH, generator=gen)
        out.append(x)
    return torch.stack(out)


def make_profile() -> Profile:
    gen = torch.Generator().manual_seed(2)
    weight = torch.rand(WIDTH, generator=gen) + 0.1
    samples = []
    for seed in (3, 4):
        g = torch.randn(1, LAYERS, 400, WIDTH, generator=gen) * weight
        samples.append(Samples(_layers(400, seed), g, g / 2, 16))
    maps, _ = fit(samples, 0.1, ROUNDING)
    draft = Profile(HEADS, DIM, DIM, ROPE, maps, ())
    codec = PredictiveCodec(spec_of("float32"), draft)
    # Held-out error and distance as calibration measures them, at the coarsest class.
    strategy = Strategy("predictive", classes=bytes([3] * 400))
    run = make_run(400, 5, "float32")
    seen = [(step, codec.encode_at(run, strategy, step)[1]) for step in (0.05, 0.1, 0.2)]
    curve = [
        (step, kl, measured.error)
        for (step, measured), kl in zip(seen, (0.001, 0.01, 0.05), strict=True)
    ]
    return replace(draft, curve=curve, novelty=quarters(seen[-1][1].novelty))


def make_run(tokens: int, seed: int, dtype: str, start: int = 0) -> KVRun:
    x = _layers(tokens, seed)
    k, v = x[..., : HEADS * DIM], x[..., HEADS * DIM :]
    tables = ROPE.tables(start, tokens)
    k = torch.stack([ROPE.apply(layer.unflatten(1, (HEADS, DIM)), tables) for layer in k])
    kind = getattr(torch, dtype)
    return KVRun(k.to(kind), v.unflatten(2, (HEADS, DIM)).to(kind), start)


PROFILE = make_profile()
