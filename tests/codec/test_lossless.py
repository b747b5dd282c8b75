"""The exact codec: every bit back, whatever the dtype, shape or values."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_runs import bits_of, random_run

from krul_sglang.codec.base import CodecError, KVRun, KVSpec
from krul_sglang.codec.registry import make_codec
from krul_sglang.strategy.base import EXACT

DTYPES = ("bfloat16", "float16", "float32")
SHAPES = ((1, 1, 1, 1), (3, 2, 5, 7), (2, 3, 64, 64), (4, 1, 128, 96))


def assert_same_bits(run: KVRun, payload: bytes, spec: KVSpec, lo: int, hi: int) -> None:
    reader = make_codec("lossless", spec).open(payload)
    assert (reader.tokens, reader.start) == (run.tokens, run.start)
    layers = list(reader.layers(lo, hi))
    assert len(layers) == spec.layers
    for layer, (k, v) in enumerate(layers):
        assert (k.shape, k.dtype) == (run.k[layer, lo:hi].shape, run.k.dtype)
        assert (v.shape, v.dtype) == (run.v[layer, lo:hi].shape, run.v.dtype)
        assert torch.equal(bits_of(k), bits_of(run.k[layer, lo:hi]))
        assert torch.equal(bits_of(v), bits_of(run.v[layer, lo:hi]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 2, 63, 257])
def test_matrix_of_dtypes_and_odd_shapes(
    dtype: str, shape: tuple[int, int, int, int], tokens: int
) -> None:
    spec = KVSpec(*shape, dtype)
    run = random_run(spec, tokens, seed=tokens, start=7)
    assert_same_bits(run, make_codec("lossless", spec).encode(run, EXACT), spec, 0, tokens)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    layers=st.integers(1, 5),
    heads=st.integers(1, 4),
    dims=st.tuples(st.integers(1, 33), st.integers(1, 33)),
    tokens=st.integers(0, 70),
    seed=st.integers(0, 2**32),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_any_cut_of_any_run_is_bit_exact(
    dtype: str,
    layers: int,
    heads: int,
    dims: tuple[int, int],
    tokens: int,
    seed: int,
    cut: tuple[float, float],
) -> None:
    spec = KVSpec(layers, heads, *dims, dtype)
    run = random_run(spec, tokens, seed, start=seed % 1000)
    lo, hi = sorted(round(part * tokens) for part in cut)
    assert_same_bits(run, make_codec("lossless", spec).encode(run, EXACT), spec, lo, hi)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_survive(dtype: str) -> None:
    kind = getattr(torch, dtype)
    tiny = torch.finfo(kind).smallest_normal / 4
    specials = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, tiny, -tiny, 1.0]
    values = torch.tensor(specials, dtype=kind).repeat(2 * 6 * 3).view(2, 6, 3, 8)
    spec = KVSpec(2, 3, 8, 8, dtype)
    run = KVRun(values, -values, 0)
    assert_same_bits(run, make_codec("lossless", spec).encode(run, EXACT), spec, 0, 6)


def test_bell_shaped_bf16_shrinks_by_more_than_1_4() -> None:
    gen = torch.Generator().manual_seed(0)
    spec = KVSpec(4, 3, 64, 64, "bfloat16")
    scale = torch.rand(4, 1, 3, 64, generator=gen) * 3 + 0.1
    k = (torch.randn(4, 500, 3, 64, generator=gen) * scale).bfloat16()
    run = KVRun(k, k.flip(-1).contiguous(), 0)
    assert run.nbytes / len(make_codec("lossless", spec).encode(run, EXACT)) > 1.4


def test_input_is_left_alone_and_strided_input_is_fine() -> None:
    spec = KVSpec(2, 3, 8, 8, "bfloat16")
    big = random_run(KVSpec(2, 6, 8, 8, "bfloat16"), 10, seed=1)
    run = KVRun(big.k[:, :, ::2], big.v[:, :, 1::2], 0)
    before = bits_of(run.k).clone()
    payload = make_codec("lossless", spec).encode(run, EXACT)
    assert torch.equal(bits_of(run.k), before)
    assert_same_bits(run, payload, spec, 0, 10)


def test_decoding_warns_about_nothing_and_returns_writable_tensors() -> None:
    spec = KVSpec(2, 3, 8, 8, "bfloat16")
    payload = make_codec("lossless", spec).encode(random_run(spec, 10, 2), EXACT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k, v in make_codec("lossless", spec).open(payload).layers(2, 9):
            k.zero_()
            v.zero_()


def test_two_iterators_of_one_reader_do_not_disturb_each_other() -> None:
    spec = KVSpec(6, 3, 64, 64, "bfloat16")
    run = random_run(spec, 300, seed=3)
    reader = make_codec("lossless", spec).open(make_codec("lossless", spec).encode(run, EXACT))
    for (k0, _), (k1, _) in zip(reader.layers(0, 300), reader.layers(100, 200), strict=True):
        assert torch.equal(bits_of(k0[100:200]), bits_of(k1))


def test_a_run_of_another_shape_or_dtype_is_the_callers_mistake() -> None:
    spec = KVSpec(2, 3, 8, 8, "bfloat16")
    other = random_run(KVSpec(2, 3, 8, 8, "float16"), 4, 0)
    with pytest.raises(ValueError, match="dtypes"):
        make_codec("lossless", spec).encode(other, EXACT)
    narrow = random_run(KVSpec(2, 2, 8, 8, "bfloat16"), 4, 0)
    with pytest.raises(ValueError, match="shapes"):
        make_codec("lossless", spec).encode(narrow, EXACT)


def test_a_cut_outside_the_run_is_refused() -> None:
    spec = KVSpec(2, 3, 8, 8, "bfloat16")
    codec = make_codec("lossless", spec)
    reader = codec.open(codec.encode(random_run(spec, 4, 0), EXACT))
    with pytest.raises(ValueError, match="not within"):
        list(reader.layers(0, 5))


def test_a_payload_for_another_model_is_refused() -> None:
    spec = KVSpec(2, 3, 8, 8, "bfloat16")
    payload = make_codec("lossless", spec).encode(random_run(spec, 4, 0), EXACT)
    with pytest.raises(CodecError, match="dtype"):
        make_codec("lossless", KVSpec(2, 3, 8, 8, "float16")).open(payload)
