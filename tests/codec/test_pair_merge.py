"""Pair merging: against an independent SLERP, any cut, layer order, exact rest."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_runs import bits_of, random_run
from pair_runs import PAIRS, Pairs, decode, encode, make_run, spec_of

from krul_sglang.codec.base import CodecError, KVRun, KVSpec
from krul_sglang.codec.frames import pack_payload, unpack_payload
from krul_sglang.codec.lossless import LosslessCodec
from krul_sglang.codec.pair_merge import SINKS, PairMergeCodec, slerp
from krul_sglang.codec.registry import make_codec
from krul_sglang.profile.rope import Rope
from krul_sglang.strategy.base import EXACT

DTYPES = ("bfloat16", "float16", "float32")
T = 0.6
"""MiniCache's; not taken from the codec, whose value is under test."""


# The oracle: one vector at a time in float64, straight from the formulas.


def oracle_direction(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, float]:
    u, w = a / math.hypot(*a), b / math.hypot(*b)
    angle = math.acos(max(-1.0, min(1.0, float(u @ w))))
    if math.sin(angle) < 1e-3:
        e = T * u + (1 - T) * w
    else:
        e = (math.sin(T * angle) * u + math.sin((1 - T) * angle) * w) / math.sin(angle)
    return e / math.hypot(*e), angle


def oracle_merge(lower: np.ndarray, upper: np.ndarray, sinks: int) -> tuple[np.ndarray, np.ndarray]:
    """What ``[tokens, heads, dim]`` of two layers become: ``[2, tokens, heads, dim]``, outliers."""
    tokens, heads, _ = lower.shape
    out = np.stack([lower, upper])
    angles = np.zeros(tokens)
    for token in range(tokens):
        for head in range(heads):
            a, b = lower[token, head], upper[token, head]
            e, angle = oracle_direction(a, b)
            out[0, token, head], out[1, token, head] = math.hypot(*a) * e, math.hypot(*b) * e
            angles[token] += angle / heads
    angles[:sinks] = math.inf
    count = sinks + round(0.05 * (tokens - sinks))
    chosen = np.argsort(-angles, kind="stable")[:count]
    out[0, chosen], out[1, chosen] = lower[chosen], upper[chosen]
    return out, chosen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 5, 30, 101])
@pytest.mark.parametrize("start", [0, 2, 1000])
def test_merged_layers_are_the_oracles_and_the_rest_is_exact(
    dtype: str, tokens: int, start: int
) -> None:
    spec = spec_of(dtype)
    run = make_run(spec, tokens, start=start)
    k, v = decode(encode(run, spec, PAIRS), spec, 0, tokens)
    sinks = min(tokens, max(0, SINKS - start))
    # Direction and magnitude are each rounded once to 16 bits, the product once more.
    unit = 2**-11 if dtype == "float16" else 2**-8
    for found, x in ((k, run.k), (v, run.v)):
        assert found.dtype == x.dtype
        for layer in (0, 5):
            assert torch.equal(bits_of(found[layer]), bits_of(x[layer]))
        for lower, upper in PAIRS:
            both = x[[lower, upper]].double().numpy()
            want, chosen = oracle_merge(both[0], both[1], sinks)
            assert torch.equal(found[[lower, upper]][:, chosen], x[[lower, upper]][:, chosen])
            norm = np.linalg.norm(both, axis=-1, keepdims=True)
            error = np.abs(found[[lower, upper]].double().numpy() - want) / norm
            assert error.max() < 2 * unit


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    order=st.permutations(range(6)),
    count=st.integers(0, 3),
    tokens=st.integers(0, 70),
    start=st.integers(0, 6),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 100),
)
def test_any_cut_gives_the_same_rows(
    dtype: str,
    order: Sequence[int],
    count: int,
    tokens: int,
    start: int,
    cut: tuple[float, float],
    seed: int,
) -> None:
    chosen = [sorted(order[2 * i : 2 * i + 2]) for i in range(count)]
    pairs = tuple((lower, upper) for lower, upper in chosen)
    lo, hi = sorted(round(part * tokens) for part in cut)
    spec = spec_of(dtype)
    run = make_run(spec, tokens, seed, start)
    payload = encode(run, spec, pairs)
    reader = make_codec("pair_merge", spec).open(payload)
    assert (reader.tokens, reader.start) == (tokens, start)
    k, v = decode(payload, spec, 0, tokens)
    part_k, part_v = decode(payload, spec, lo, hi)
    assert torch.equal(part_k, k[:, lo:hi])
    assert torch.equal(part_v, v[:, lo:hi])
    rest = [layer for layer in range(6) if all(layer not in pair for pair in pairs)]
    assert torch.equal(part_k[rest], run.k[rest, lo:hi])
    assert torch.equal(part_v[rest], run.v[rest, lo:hi])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (4, 3, 64, 64), (2, 1, 128, 96)], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 5, 257])
def test_odd_shapes_with_every_layer_paired(
    dtype: str, shape: tuple[int, int, int, int], tokens: int
) -> None:
    spec = KVSpec(*shape, dtype)
    run = make_run(spec, tokens, 1)
    pairs = tuple((layer, layer + 1) for layer in range(0, spec.layers, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        k, v = decode(encode(run, spec, pairs), spec, 0, tokens)
        k.zero_()
        v.zero_()
    assert (k.shape, v.shape) == (run.k.shape, run.v.shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_pairs_it_is_lossless_for_any_bits(dtype: str) -> None:
    spec = spec_of(dtype)
    run = random_run(spec, 40, 3, start=7)
    payload = encode(run, spec, ())
    k, v = decode(payload, spec, 0, 40)
    assert torch.equal(bits_of(k), bits_of(run.k))
    assert torch.equal(bits_of(v), bits_of(run.v))
    assert len(payload) < len(LosslessCodec(spec).encode(run, EXACT)) + 400


@pytest.mark.parametrize("angle", [0, 1e-7, 1e-4, 1e-3, 0.5, 2, math.pi - 1e-2])
def test_slerp_follows_the_great_circle_at_any_angle(angle: float) -> None:
    u = torch.tensor([1.0, 0, 0]).double()
    w = torch.tensor([math.cos(angle), math.sin(angle), 0]).double()
    direction, found = slerp((3 * u).float(), (0.5 * w).float())
    assert float(found) == pytest.approx(angle, abs=1e-6)
    from_lower = (1 - T) * angle
    want = torch.tensor([math.cos(from_lower), math.sin(from_lower), 0])
    torch.testing.assert_close(direction, want, atol=1e-4, rtol=0)


def test_opposite_vectors_still_have_a_direction() -> None:
    u = torch.tensor([[3.0, 4, 0], [1, 0, 0]])
    direction, angle = slerp(u, -2 * u)
    assert angle.tolist() == pytest.approx([math.pi] * 2)
    torch.testing.assert_close(direction, u / u.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1, 1e30, 3e38])
def test_slerp_neither_overflows_nor_underflows(scale: float) -> None:
    lower, upper = torch.tensor([1.0, 0]), torch.tensor([0.0, 1])
    direction, angle = slerp(lower * scale, upper * scale)
    assert float(angle) == pytest.approx(math.pi / 2, abs=1e-6)
    want = torch.tensor([math.cos(0.4 * math.pi / 2), math.sin(0.4 * math.pi / 2)])
    torch.testing.assert_close(direction, want, atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_vectors_stay_zero_and_leave_their_partner_whole(dtype: str) -> None:
    spec = spec_of(dtype, 2)
    run = make_run(spec, 30, start=9)
    run.k[0, 3:6] = 0
    run.k[:, 8] = 0
    k, _ = decode(encode(run, spec, ((0, 1),)), spec, 0, 30)
    assert not k[0, 3:6].any()
    assert not k[:, 8].any()
    torch.testing.assert_close(k[1, 3:6], run.k[1, 3:6], rtol=0.02, atol=0.02)


def test_the_tokens_that_turn_most_are_outliers_k_and_v_apart() -> None:
    spec = KVSpec(2, 2, 8, 8, "bfloat16")
    base = make_run(KVSpec(1, 2, 8, 8, "bfloat16"), 100, start=50)
    run = KVRun(torch.cat([base.k, 2 * base.k]), torch.cat([base.v, 2 * base.v]), 50)
    for turned in (11, 42, 43, 80, 99):
        run.k[1, turned] *= -1
    run.v[1, 7] *= -1
    k, v = decode(encode(run, spec, ((0, 1),)), spec, 0, 100)
    assert torch.equal(k[:, [11, 42, 43, 80, 99]], run.k[:, [11, 42, 43, 80, 99]])
    assert torch.equal(v[:, 7], run.v[:, 7])
    kept = (k == run.k).flatten(2).all(2)[1].sum()
    assert kept < 20


def test_a_zero_vector_is_no_outlier() -> None:
    spec = KVSpec(2, 1, 8, 8, "bfloat16")
    run = make_run(spec, 40, start=50)
    run.k[0, :30] = 0
    k, _ = decode(encode(run, spec, ((0, 1),)), spec, 0, 40)
    exact = (k == run.k).flatten(2).all(2).all(0)
    assert exact[30:].sum() == round(0.05 * 40)


def test_merging_commutes_with_rope() -> None:
    spec = KVSpec(2, 2, 8, 8, "float32")
    rope = Rope(10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float32) / 8))
    plain = make_run(spec, 60, start=100)
    tables = rope.tables(100, 60)
    rotated = torch.stack([rope.apply(layer, tables) for layer in plain.k])
    merged, _ = slerp(rotated[0], rotated[1])
    expected = rope.apply(slerp(plain.k[0], plain.k[1])[0], tables)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)


def test_merging_shrinks_what_lossless_leaves() -> None:
    spec = KVSpec(4, 3, 64, 64, "bfloat16")
    run = make_run(spec, 400)
    exact = len(LosslessCodec(spec).encode(run, EXACT))
    assert exact / len(encode(run, spec, ((2, 3),))) > 1.25
    assert exact / len(encode(run, spec, ((0, 1), (2, 3)))) > 1.7


def test_input_is_left_alone_and_strided_input_is_fine() -> None:
    spec = KVSpec(2, 3, 8, 8, "bfloat16")
    big = make_run(KVSpec(2, 6, 8, 8, "bfloat16"), 40)
    run = KVRun(big.k[:, :, ::2], big.v[:, :, 1::2], 0)
    before = bits_of(big.k).clone()
    payload = encode(run, spec, ((0, 1),))
    assert torch.equal(bits_of(big.k), before)
    dense = KVRun(run.k.contiguous(), run.v.contiguous(), 0)
    assert encode(dense, spec, ((0, 1),)) == payload


def test_two_iterators_of_one_reader_do_not_disturb_each_other() -> None:
    spec = spec_of("bfloat16")
    reader = PairMergeCodec(spec).open(encode(make_run(spec, 60), spec, PAIRS))
    for (k0, _), (k1, _) in zip(reader.layers(0, 60), reader.layers(20, 40), strict=True):
        assert torch.equal(k0[20:40], k1)


def test_a_layer_is_ready_before_those_above_it_are_read() -> None:
    # So many tokens that not even the outliers of two layers share a frame.
    spec = KVSpec(6, 3, 64, 64, "bfloat16")
    run = make_run(spec, 3000)
    payload = encode(run, spec, PAIRS)
    header, frames = unpack_payload(payload, "pair_merge", spec, {"pairs": list})
    parts = [bytearray(frame) for frame in frames]
    for part in (0, 1, 2, 4):  # the last layer or pair of each part
        parts[part][-1] ^= 1
    damaged = pack_payload("pair_merge", spec, 3000, 0, parts, {"pairs": header["pairs"]})
    reader = PairMergeCodec(spec).open(damaged)
    ready = reader.layers(0, 3000)
    k, v = decode(payload, spec, 0, 3000)
    for layer in (0, 1):
        found_k, found_v = next(ready)
        assert torch.equal(found_k, k[layer])
        assert torch.equal(found_v, v[layer])
    with pytest.raises(CodecError):
        next(ready)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_it_cannot_merge_is_refused(value: float, dtype: str) -> None:
    spec = spec_of(dtype)
    run = make_run(spec, 20)
    run.v[2, 9, 1, 3] = value
    with pytest.raises(ValueError, match="NaN, infinite"):
        encode(run, spec, PAIRS)


def test_magnitudes_beyond_16_bits_are_refused() -> None:
    spec = spec_of("float16")
    run = make_run(spec, 20)
    run.k[1] = 60000.0
    with pytest.raises(ValueError, match="very large"):
        encode(run, spec, PAIRS)


@pytest.mark.parametrize("pairs", [((0, 6),), ((3, 3),), ((3, 1),), ((0, 1), (1, 2)), ((-1, 2),)])
def test_pairs_that_are_none_are_the_callers_mistake(pairs: Pairs) -> None:
    spec = spec_of("bfloat16")
    with pytest.raises(ValueError, match="pair"):
        encode(make_run(spec, 5), spec, pairs)


def test_a_cut_or_run_that_does_not_fit_is_refused() -> None:
    spec = spec_of("bfloat16")
    run = make_run(spec, 5)
    reader = PairMergeCodec(spec).open(encode(run, spec, PAIRS))
    with pytest.raises(ValueError, match="not within"):
        list(reader.layers(0, 6))
    with pytest.raises(ValueError, match="dtypes"):
        encode(run, spec_of("float16"), PAIRS)
