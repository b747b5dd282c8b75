"""What payloads say of themselves, against a recount by another road."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_runs import PAIRS
from pair_runs import make_run as pair_run
from pair_runs import spec_of as pair_spec
from small_profile import LAYERS, PROFILE, WIDTH, make_run, spec_of

from krul_sglang.codec.base import CodecError, KVRun
from krul_sglang.codec.frames import pack_payload, shares, unpack_payload
from krul_sglang.codec.layout import FACTORS
from krul_sglang.codec.lossless import LosslessCodec
from krul_sglang.codec.pair_merge import PairMergeCodec
from krul_sglang.codec.predictive import MEASURED_TOKENS, PredictiveCodec
from krul_sglang.codec.predictive_reader import FIELDS
from krul_sglang.store.memory import RawReader
from krul_sglang.strategy.base import EXACT, SINKS, Strategy

CODEC = PredictiveCodec(spec_of("float32"), PROFILE)
STEP = 0.1
JUDGED = Strategy("predictive")


def encode(run: KVRun, strategy: Strategy = JUDGED) -> bytes:
    return CODEC.encode_at(run, strategy, STEP)[0]


@pytest.fixture(params=[1, 1 << 17], ids=["frame-a-layer", "one-frame"])
def grouping(request, monkeypatch) -> int:
    """How many symbols make a frame."""
    monkeypatch.setattr("krul_sglang.codec.layout.GROUP_SYMBOLS", request.param)
    return request.param


@pytest.mark.parametrize("tokens", [1, SINKS, SINKS + 1, 90])
@pytest.mark.parametrize("start", [0, 2, 50])
def test_bytes_add_up_to_the_payload(grouping: int, tokens: int, start: int) -> None:
    payload = encode(make_run(tokens, 3, "float32", start))
    found = CODEC.open(payload).describe()
    assert found.header_bytes + sum(layer.nbytes for layer in found.layers) == len(payload)
    assert [layer.reference for layer in found.layers] == [None, *range(LAYERS - 1)]
    assert (found.step, found.factors) == (STEP, FACTORS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("tokens", [0, 7, 300])
def test_bytes_of_the_other_codecs_add_up(dtype: str, tokens: int) -> None:
    spec = pair_spec(dtype)
    run = pair_run(spec, tokens)
    for codec, strategy in (
        (LosslessCodec(spec), EXACT),
        (PairMergeCodec(spec), Strategy("pair_merge", pairs=PAIRS)),
        (PairMergeCodec(spec), Strategy("pair_merge")),
    ):
        payload = codec.encode(run, strategy)
        found = codec.open(payload).describe()
        assert len(found.layers) == spec.layers
        assert found.header_bytes + sum(layer.nbytes for layer in found.layers) == len(payload)
    raw = RawReader(run).describe()
    assert sum(layer.nbytes for layer in raw.layers) == run.nbytes


def test_an_exact_codec_leaves_no_error() -> None:
    spec = pair_spec("bfloat16")
    codec = LosslessCodec(spec)
    found = codec.open(codec.encode(pair_run(spec, 40), EXACT)).describe()
    assert {layer.error for layer in found.layers} == {0.0}
    assert {layer.reference for layer in found.layers} == {None}


def test_a_merged_pair_names_its_partner_and_halves_what_it_shares() -> None:
    spec = pair_spec("bfloat16")
    codec = PairMergeCodec(spec)
    layers = codec.open(
        codec.encode(pair_run(spec, 400), Strategy("pair_merge", pairs=PAIRS))
    ).describe()
    references = [layer.reference for layer in layers.layers]
    assert references == [None, 4, 3, 2, 1, None]
    alone, merged = layers.layers[0].nbytes, [layer.nbytes for layer in layers.layers[1:5]]
    assert all(0.4 * alone < nbytes < 0.9 * alone for nbytes in merged)
    assert [layer.error for layer in layers.layers] == [0.0, None, None, None, None, 0.0]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), tokens=st.integers(SINKS + 1, 130), start=st.integers(0, 6))
def test_classes_are_those_that_were_asked_for(seed: int, tokens: int, start: int) -> None:
    classes = np.random.default_rng(seed).integers(0, 4, (LAYERS, tokens), np.uint8)
    strategy = Strategy("predictive", classes=classes.tobytes())
    found = CODEC.open(encode(make_run(tokens, seed, "float32", start), strategy)).describe()
    sinks = max(0, SINKS - start)
    for layer, own in zip(found.layers, classes[:, sinks:], strict=True):
        assert layer.classes == tuple(int((own == c).sum()) for c in range(4))


def test_classes_the_codec_judged_are_those_it_decodes_by(grouping: int) -> None:
    attention = np.random.default_rng(1).integers(0, 200, (LAYERS, 300), np.uint8)
    strategy = Strategy("predictive", attention=attention.tobytes())
    maps = [
        replace(own, attended=torch.cat([torch.zeros(WIDTH), torch.tensor([0.5, 0.2, 0.0])]))
        for own in PROFILE.layers
    ]
    codec = PredictiveCodec(spec_of("float32"), replace(PROFILE, layers=maps))
    payload, _ = codec.encode_at(make_run(300, 8, "float32", 8), strategy, STEP)
    reader = codec.open(payload)
    decoded = [coded.of_class.tolist() for coded in reader._coefficients(0, 300)]
    assert [list(layer.classes) for layer in reader.describe().layers] == decoded
    assert all(sum(counts) == 300 and sum(map(bool, counts)) > 1 for counts in decoded)
    assert len({tuple(counts) for counts in decoded}) > 1


@pytest.mark.parametrize("start", [0, 9])
def test_errors_are_what_decoding_shows(start: int) -> None:
    """Every token counts in a run this short; what is decoded went through RoPE and back."""
    run = make_run(MEASURED_TOKENS // 2, 4, "float32", start)
    sinks = max(0, SINKS - start)
    reader = CODEC.open(encode(run))
    tables = PROFILE.rope.tables(run.start, run.tokens)

    def x(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.cat([PROFILE.rope.undo(k, tables).flatten(1), v.flatten(1)], 1)[sinks:]

    for n, ((k, v), layer) in enumerate(
        zip(reader.layers(0, run.tokens), reader.describe().layers, strict=True)
    ):
        lost = (x(run.k[n], run.v[n]) - x(k, v)) @ PROFILE.layers[n].forward
        assert layer.error == pytest.approx(float(lost.square().sum(1).mean()), rel=1e-3)


def test_their_sum_is_what_the_guard_looks_at() -> None:
    payload, measured = CODEC.encode_at(make_run(300, 7, "float32"), Strategy("predictive"), STEP)
    errors = [layer.error for layer in CODEC.open(payload).describe().layers]
    assert errors == pytest.approx(measured.errors)
    assert sum(errors) == pytest.approx(measured.error)


def test_a_dropped_layer_has_nothing_but_its_classes_in_a_shared_frame() -> None:
    strategy = Strategy("predictive", shared=(2, 4))
    layers = CODEC.open(encode(make_run(200, 5, "float32", 8), strategy)).describe().layers
    assert [layer.dropped for layer in layers] == [False, False, True, False, True]
    assert all((layer.nbytes < 100) == layer.dropped for layer in layers)
    assert all(layer.in_shared_frame for layer in layers)
    assert layers[2].error > 2 * layers[1].error


def test_finer_classes_take_more_of_a_shared_frame() -> None:
    classes = np.full((LAYERS, 200), 3, np.uint8)
    classes[1] = 0
    strategy = Strategy("predictive", classes=classes.tobytes())
    layers = CODEC.open(encode(make_run(200, 5, "float32", 8), strategy)).describe().layers
    assert layers[1].nbytes > 1.5 * layers[2].nbytes


def test_shares_are_whole_and_complete() -> None:
    assert shares(10, [1, 1, 1]) == [3, 4, 3]
    assert shares(7, [0, 0]) == [4, 3]
    assert shares(5, [0, 2, 0]) == [0, 5, 0]
    assert shares(0, [3, 4]) == [0, 0]


@pytest.mark.parametrize(
    "errors",
    [
        b"",
        bytes(4 * LAYERS - 1),
        bytes(4 * LAYERS + 4),
        np.full(LAYERS, -1, "<f4").tobytes(),
        np.full(LAYERS, np.nan, "<f4").tobytes(),
        np.full(LAYERS, np.inf, "<f4").tobytes(),
        [0.0] * LAYERS,
    ],
    ids=["none", "short", "long", "negative", "nan", "inf", "list"],
)
def test_errors_that_cannot_be_are_refused(errors: object) -> None:
    payload = encode(make_run(30, 3, "float32"))
    header, frames = unpack_payload(payload, "predictive", CODEC.spec, FIELDS)
    fields = {name: header[name] for name in FIELDS} | {"errors": errors}
    with pytest.raises(CodecError):
        CODEC.open(
            pack_payload("predictive", CODEC.spec, 30, 0, [bytes(f) for f in frames], fields)
        )


PAYLOAD = encode(make_run(40, 3, "float32"))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(PAYLOAD) - 1), st.integers(1, 255))
def test_damage_raises_nothing_but_a_codec_error(at: int, flip: int) -> None:
    damaged = bytearray(PAYLOAD)
    damaged[at] ^= flip
    try:
        found = CODEC.open(bytes(damaged)).describe()
    except CodecError:
        return
    assert found.header_bytes + sum(layer.nbytes for layer in found.layers) == len(PAYLOAD)


def test_a_decompression_bomb_is_refused_before_it_expands() -> None:
    header, frames = unpack_payload(PAYLOAD, "predictive", CODEC.spec, FIELDS)
    bomb = zstandard.ZstdCompressor(write_checksum=True).compress(bytes(1 << 28))
    fields = {name: header[name] for name in FIELDS}
    payload = pack_payload("predictive", CODEC.spec, 40, 0, [bytes(frames[0]), bomb], fields)
    tracemalloc.start()
    with pytest.raises(CodecError, match="declared size"):
        CODEC.open(payload).describe()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
