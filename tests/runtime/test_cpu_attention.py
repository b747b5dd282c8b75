"""The CPU attention hooks compute what SGLang's own torch_native backend computes."""

from __future__ import annotations

import functools

import pytest
import torch

backend_module = pytest.importorskip("sglang.srt.layers.attention.torch_native_backend")

from krul_sglang.runtime import cpu_attention  # noqa: E402

Backend = backend_module.TorchNativeAttnBackend


class Batch:
    """A ragged batch over a scattered pool: prefixes, new rows, and where they lie."""

    def __init__(self, heads: int, kv_heads: int, dim: int, prefixes: list[int], new: list[int]):
        rng = torch.Generator().manual_seed(3)
        totals = [p + n for p, n in zip(prefixes, new, strict=True)]
        rows = torch.randperm(sum(totals) + 5, generator=rng)
        self.k = torch.randn(len(rows), kv_heads, dim, generator=rng)
        self.v = torch.randn(len(rows), kv_heads, dim, generator=rng)
        self.table = torch.zeros(len(new) + 2, max(totals), dtype=torch.int64)
        self.slots = torch.arange(len(new)).flip(0) + 1
        at = 0
        for slot, total in zip(self.slots.tolist(), totals, strict=True):
            self.table[slot, :total] = rows[at : at + total]
            at += total
        self.totals, self.prefixes, self.new = map(torch.tensor, (totals, prefixes, new))
        self.query = torch.randn(sum(new), heads, dim, generator=rng)
        self.options = {"scaling": dim**-0.5, "enable_gqa": heads != kv_heads}

    def extend(self, run) -> torch.Tensor:
        out = torch.full_like(self.query, torch.nan)
        run(
            self.query, out, self.k, self.v, self.table, self.slots, self.totals,
            self.prefixes, self.new, None, causal=True, **self.options,
        )  # fmt: skip
        return out

    def decode(self, run) -> torch.Tensor:
        out = torch.full_like(self.query, torch.nan)
        run(
            self.query, out, self.k, self.v, self.table, self.slots, self.totals, None,
            causal=False, **self.options,
        )  # fmt: skip
        return out


@pytest.fixture
def backend():
    return Backend.__new__(Backend)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (7, 1)])
@pytest.mark.parametrize("prefixes", [[0, 0, 0], [13, 0, 40]])
def test_extend_equals_the_original(backend, heads, kv_heads, prefixes):
    batch = Batch(heads, kv_heads, 16, prefixes, [5, 9, 1])
    original = functools.partial(Backend._run_sdpa_forward_extend, backend)

    def never(*args, **options):
        raise AssertionError("the hook fell back to the original")

    hooked = batch.extend(functools.partial(cpu_attention.extend, never, backend))
    torch.testing.assert_close(hooked, batch.extend(original), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (7, 1)])
def test_decode_equals_the_original(backend, heads, kv_heads):
    batch = Batch(heads, kv_heads, 16, [13, 0, 40], [1, 1, 1])
    original = functools.partial(Backend._run_sdpa_forward_decode, backend)

    def never(*args, **options):
        raise AssertionError("the hook fell back to the original")

    hooked = batch.decode(functools.partial(cpu_attention.decode, never, backend))
    torch.testing.assert_close(hooked, batch.decode(original), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    "options", [{"is_cross_attn": True}, {"sliding_window_size": 8}, {"causal": False}]
)
def test_what_is_not_covered_goes_to_the_original(backend, options):
    batch = Batch(4, 2, 16, [3], [2])
    called = []

    def original(*args, **kwargs):
        called.append(kwargs)
        return args[2]

    cpu_attention.extend(
        original, backend, batch.query, torch.empty_like(batch.query), batch.k, batch.v,
        batch.table, batch.slots, batch.totals, batch.prefixes, batch.new, None,
        **{"causal": True, **options},
    )  # fmt: skip
    assert len(called) == 1
