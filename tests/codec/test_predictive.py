"""The predictive codec: bounded error, any cut, stable on its own grid, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_profile import LAYERS, PROFILE, WIDTH, make_run, spec_of

from krul_sglang.codec.base import CodecError, KVRun
from krul_sglang.codec.frames import unpack_payload
from krul_sglang.codec.layout import FACTORS
from krul_sglang.codec.lossless import LosslessCodec
from krul_sglang.codec.predictive import PredictiveCodec
from krul_sglang.codec.predictive_reader import FIELDS
from krul_sglang.codec.registry import make_codec
from krul_sglang.strategy.base import SINKS, Strategy

STRATEGY = Strategy("predictive", 0.01)


def decode(payload: bytes, dtype: str, lo: int, hi: int) -> tuple[torch.Tensor, torch.Tensor]:
    layers = list(PredictiveCodec(spec_of(dtype), PROFILE).open(payload).layers(lo, hi))
    assert len(layers) == LAYERS
    return torch.stack([k for k, _ in layers]), torch.stack([v for _, v in layers])


def stored(payload: bytes) -> list[bytes]:
    """The frames: what is stored, without what the encoder measured."""
    _, frames = unpack_payload(payload, "predictive", spec_of("float32"), FIELDS)
    return [bytes(frame) for frame in frames]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 5, 37, 300])
@pytest.mark.parametrize("start", [0, 2, 1000])
def test_every_scalar_comes_back_close(dtype: str, tokens: int, start: int) -> None:
    run = make_run(tokens, 9, dtype, start)
    payload = PredictiveCodec(spec_of(dtype), PROFILE).encode(run, STRATEGY)
    k, v = decode(payload, dtype, 0, tokens)
    assert k.dtype == v.dtype == run.k.dtype
    assert k.shape == run.k.shape
    assert v.shape == run.v.shape
    if tokens:
        error = (torch.cat([k, v], 3).float() - torch.cat([run.k, run.v], 3).float()).square()
        assert float(error.mean()) < 0.25 * float(run.v.float().var())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_sinks_are_kept_at_16_bits(dtype: str) -> None:
    run = make_run(40, 9, dtype)
    k, v = decode(PredictiveCodec(spec_of(dtype), PROFILE).encode(run, STRATEGY), dtype, 0, 40)
    kind = torch.bfloat16 if dtype == "float32" else run.k.dtype
    assert torch.equal(k[:, :SINKS], run.k[:, :SINKS].to(kind).to(run.k.dtype))
    assert torch.equal(v[:, :SINKS], run.v[:, :SINKS].to(kind).to(run.v.dtype))
    assert not torch.equal(k[:, SINKS:], run.k[:, SINKS:])


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 90),
    start=st.integers(0, 6),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_any_cut_gives_the_same_rows(tokens: int, start: int, cut: tuple[float, float]) -> None:
    lo, hi = sorted(round(part * tokens) for part in cut)
    run = make_run(tokens, 5, "float32", start)
    payload = PredictiveCodec(spec_of("float32"), PROFILE).encode(run, STRATEGY)
    k, v = decode(payload, "float32", 0, tokens)
    part_k, part_v = decode(payload, "float32", lo, hi)
    torch.testing.assert_close(part_k, k[:, lo:hi], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(part_v, v[:, lo:hi], rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    budget=st.sampled_from([0.002, 0.01, 0.04]),
    classes=st.binary(min_size=60, max_size=60),
)
def test_encoding_what_was_decoded_changes_no_stored_byte(
    seed: int, budget: float, classes: bytes
) -> None:
    strategy = Strategy("predictive", budget, bytes(b & 3 for b in classes))
    codec = PredictiveCodec(spec_of("float32"), PROFILE)
    payload = codec.encode(make_run(60, seed, "float32"), strategy)
    again = KVRun(*decode(payload, "float32", 0, 60), 0)
    assert stored(codec.encode(again, strategy)) == stored(payload)


def test_a_smaller_budget_costs_bytes_and_buys_precision() -> None:
    run = make_run(500, 1, "bfloat16", 8)
    codec = PredictiveCodec(spec_of("bfloat16"), PROFILE)
    sizes, errors = [], []
    for budget in (0.05, 0.01, 0.002):
        payload = codec.encode(run, Strategy("predictive", budget))
        k, _ = decode(payload, "bfloat16", 0, 500)
        sizes.append(len(payload))
        errors.append(float((k.float() - run.k.float()).square().mean()))
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)


def test_attention_decides_which_tokens_are_finer() -> None:
    """Of tokens alike but for what they drew, those that drew much come back closer."""
    drew_much = torch.arange(400) % 2 == 0
    codes = torch.where(drew_much, 120, 0).to(torch.uint8).expand(LAYERS, -1).contiguous()
    maps = [
        replace(own, attended=torch.cat([torch.zeros(WIDTH), torch.tensor([0.3, 0.3, 0.0])]))
        for own in PROFILE.layers
    ]
    codec = PredictiveCodec(spec_of("float32"), replace(PROFILE, layers=maps))
    run = make_run(400, 1, "float32", 8)
    strategy = Strategy("predictive", 0.01, attention=codes.numpy().tobytes())
    layers = list(codec.open(codec.encode(run, strategy)).layers(0, 400))
    error = (torch.stack([v for _, v in layers]) - run.v).square().mean((0, 2, 3))
    assert error[drew_much].mean() < error[~drew_much].mean() / 2
    with pytest.raises(ValueError, match="attention of 1999 bytes"):
        codec.encode(run, replace(strategy, attention=strategy.attention[:-1]))


def test_classes_decide_which_tokens_are_finer() -> None:
    run = make_run(400, 1, "float32", 8)
    codec = PredictiveCodec(spec_of("float32"), PROFILE)
    strategy = Strategy("predictive", 0.01, bytes([0, 3] * 200))
    _, v = decode(codec.encode(run, strategy), "float32", 0, 400)
    error = (v - run.v).square().mean((0, 2, 3))
    assert float(error[::2].mean()) * 2 < float(error[1::2].mean())
    with pytest.raises(ValueError, match="classes"):
        codec.encode(run, Strategy("predictive", 0.01, bytes([len(FACTORS)]) * 400))
    with pytest.raises(ValueError, match="classes"):
        codec.encode(run, Strategy("predictive", 0.01, bytes(399)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, -1e38])
def test_what_it_cannot_hold_is_refused_on_encoding(value: float) -> None:
    run = make_run(20, 1, "float32")
    run.v[2, 9, 1, 3] = value
    with pytest.raises(ValueError, match="values"):
        PredictiveCodec(spec_of("float32"), PROFILE).encode(run, STRATEGY)


def test_outliers_within_reach_survive() -> None:
    run = make_run(50, 1, "float32", 8)
    run.v[2, 9, 1, 3] = 500.0
    payload = PredictiveCodec(spec_of("float32"), PROFILE).encode(run, STRATEGY)
    _, v = decode(payload, "float32", 0, 50)
    assert abs(float(v[2, 9, 1, 3]) - 500) < 2


def test_smaller_than_lossless() -> None:
    run = make_run(500, 1, "bfloat16", 8)
    codec = PredictiveCodec(spec_of("bfloat16"), PROFILE)
    exact = LosslessCodec(spec_of("bfloat16")).encode(run, STRATEGY)
    assert len(codec.encode(run, STRATEGY)) * 2 < len(exact)


def test_the_registry_wants_a_profile() -> None:
    with pytest.raises(ValueError, match="profile"):
        make_codec("predictive", spec_of("float32"))
    assert make_codec("predictive", spec_of("float32"), PROFILE).name == "predictive"


def test_another_profile_is_refused() -> None:
    import dataclasses

    payload = PredictiveCodec(spec_of("float32"), PROFILE).encode(
        make_run(9, 1, "float32"), STRATEGY
    )
    scaled = dataclasses.replace(PROFILE, rope=dataclasses.replace(PROFILE.rope, scale=2.0))
    with pytest.raises(CodecError, match="profile"):
        PredictiveCodec(spec_of("float32"), scaled).open(payload)


DAMAGED = PredictiveCodec(spec_of("bfloat16"), PROFILE).encode(
    make_run(30, 3, "bfloat16"), STRATEGY
)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(DAMAGED) - 1), st.integers(1, 255), st.booleans())
def test_no_changed_byte_goes_unnoticed(at: int, flip: int, cut: bool) -> None:
    damaged = bytearray(DAMAGED[:at] if cut else DAMAGED)
    if not cut:
        damaged[at] ^= flip
    # zstd ignores one bit of a frame's header; a flip that changes no value may pass.
    try:
        k, v = decode(bytes(damaged), "bfloat16", 0, 30)
    except CodecError:
        return
    assert not cut
    for found, kept in zip((k, v), decode(DAMAGED, "bfloat16", 0, 30), strict=True):
        assert torch.equal(found, kept)
