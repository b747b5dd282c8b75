"""What a forward pass would write, as a pure function of the tokens; and a lossy codec."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import torch

from krul_sglang.codec.base import Codec, KVRun, SegmentReader
from krul_sglang.codec.lossless import LosslessCodec
from krul_sglang.strategy.base import Strategy

LAYERS, HEADS, DIM = 3, 2, 8
MASK = (1 << 64) - 1
TAINT = 0x5555_AAAA_1234_9876
ROUNDING = Strategy(codec="rounding", budget=0.01)
_SALT = np.random.default_rng(7).integers(0, MASK, (2, LAYERS, 1, HEADS, DIM), dtype=np.uint64)


@functools.lru_cache(4096)
def oracle(tokens: tuple[int, ...], tainted: bool = False) -> torch.Tensor:
    """K and V ``[2, layers, tokens, heads, dim]`` float32 of a prefix; each row depends on
    every token up to its own. ``tainted``: as computed on top of lossy rows."""
    state, states = 1, []
    for token in tokens:
        state = (state * 6364136223846793005 + token * 1442695040888963407 + 1) & MASK
        states.append(state ^ TAINT if tainted else state)
    mixed = np.array(states, np.uint64).reshape(1, 1, -1, 1, 1) ^ _SALT
    for shift in (31, 29):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(0x9E3779B97F4A7C15)
    return torch.from_numpy((mixed >> np.uint64(40)).astype(np.float32) / 2.0**23 - 1)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """What :class:`RoundingCodec` gives back: so far off that a second generation shows."""
    return x.to(torch.bfloat16).to(x.dtype) + 0.5


class _RoundingReader(SegmentReader):
    def __init__(self, inner: SegmentReader) -> None:
        self._inner, self.tokens, self.start = inner, inner.tokens, inner.start

    def layer_bytes(self) -> list[int]:
        return self._inner.layer_bytes()

    def describe(self):
        return self._inner.describe()

    def layers(self, lo: int, hi: int):
        for k, v in self._inner.layers(lo, hi):
            yield rounded(k.float()), rounded(v.float())


class RoundingCodec(Codec):
    """A small lossy codec: float32 stored as bfloat16."""

    name, exact = "rounding", False

    def __init__(self, spec) -> None:
        super().__init__(spec)
        self._inner = LosslessCodec(replace(spec, dtype="bfloat16"))

    def encode(self, run: KVRun, strategy: Strategy) -> bytes:
        return self._inner.encode(KVRun(run.k.bfloat16(), run.v.bfloat16(), run.start), strategy)

    def open(self, payload: bytes) -> SegmentReader:
        return _RoundingReader(self._inner.open(payload))


def assert_plausible(rows: torch.Tensor, tokens: tuple[int, ...], begin: int) -> None:
    """Rows ``[begin, len(tokens))`` each are exact, rounded, or computed on such a prefix."""
    ok = torch.zeros(len(tokens) - begin, dtype=torch.bool)
    for tainted in (False, True):
        pure = oracle(tokens, tainted)[:, :, begin:]
        for value in (pure, rounded(pure)):
            ok |= (rows == value).all(dim=-1).all(dim=-1).all(dim=1).all(dim=0)
    assert bool(ok.all()), f"rows {torch.nonzero(~ok).flatten().tolist()} are wrong"
