"""Damaged and hostile payloads: the codec's own error, within bounded memory."""

from __future__ import annotations

import tracemalloc
import zlib

import msgpack
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_runs import random_run

from krul_sglang.codec import frames
from krul_sglang.codec.base import CodecError, KVSpec
from krul_sglang.codec.frames import MAX_HEADER, pack_payload, payload_codec
from krul_sglang.codec.registry import codec_names, make_codec
from krul_sglang.strategy.base import EXACT

SPEC = KVSpec(3, 2, 8, 8, "bfloat16")
PAYLOAD = make_codec("lossless", SPEC).encode(random_run(SPEC, 12, 0), EXACT)


def read(payload: bytes) -> list[bytes]:
    """K and V of every layer, as bytes."""
    reader = make_codec("lossless", SPEC).open(payload)
    return [
        x.view(torch.int16).numpy().tobytes()
        for pair in reader.layers(0, reader.tokens)
        for x in pair
    ]


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(PAYLOAD) - 1), st.integers(1, 255))
def test_no_changed_byte_goes_unnoticed(at: int, flip: int) -> None:
    damaged = bytearray(PAYLOAD)
    damaged[at] ^= flip
    # zstd ignores one bit of a frame's header; a flip that changes no value may pass.
    try:
        found = read(bytes(damaged))
    except CodecError:
        return
    assert found == read(PAYLOAD)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(PAYLOAD) - 1))
def test_truncation_is_noticed(length: int) -> None:
    with pytest.raises(CodecError):
        read(PAYLOAD[:length])


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=1, max_size=40))
def test_extension_is_noticed(tail: bytes) -> None:
    with pytest.raises(CodecError):
        read(PAYLOAD + tail)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(PAYLOAD) - 1), st.integers(1, 64))
def test_zeroed_ranges_are_noticed(at: int, length: int) -> None:
    zeroed = PAYLOAD[:at] + bytes(len(PAYLOAD[at : at + length])) + PAYLOAD[at + length :]
    if zeroed == PAYLOAD:
        return
    with pytest.raises(CodecError):
        read(zeroed)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(noise: bytes) -> None:
    for payload in (noise, PAYLOAD[:40] + noise):
        with pytest.raises(CodecError):
            read(payload)


def craft(**changes: object) -> bytes:
    """A well-formed payload whose header says what ``changes`` say."""
    extra: dict[str, object] = {"checks": [0]}
    extra.update(changes)
    parts = [zstandard.ZstdCompressor().compress(b""), b""]
    return pack_payload("lossless", SPEC, 0, 0, parts, extra)


@pytest.mark.parametrize(
    "changes",
    [
        {"surprise": 1},
        {"tokens": -1},
        {"tokens": 1 << 60},
        {"tokens": True},
        {"start": -1},
        {"layers": 1 << 40},
        {"frames": [-5, 5]},
        {"frames": ["a"]},
        {"frames": [1 << 62, 0]},
        {"checks": "no list"},
        {"codec": "other"},
        {"dtype": 5},
    ],
    ids=str,
)
def test_hostile_headers_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(CodecError):
        read(craft(**changes))


def test_declared_tokens_allocate_nothing() -> None:
    tracemalloc.start()
    with pytest.raises(CodecError):
        read(craft(tokens=1 << 22))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_decompression_bomb_is_refused_before_it_expands() -> None:
    bomb = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(write_checksum=True)
    ).compress(bytes(1 << 28))
    groups = 12 * 32 * 3  # raw plane of the one group all layers share
    payload = pack_payload(
        "lossless", SPEC, 12, 0, [bomb, bytes(groups)], {"checks": [zlib.crc32(bytes(groups))]}
    )
    tracemalloc.start()
    with pytest.raises(CodecError, match="declared size"):
        read(payload)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_header_that_is_no_map_or_too_large_is_refused() -> None:
    raw = msgpack.packb([1, 2, 3])
    prefix = frames._PREFIX.pack(frames.MAGIC, frames.VERSION, len(raw), zlib.crc32(raw))
    with pytest.raises(CodecError, match="map"):
        read(prefix + raw)
    with pytest.raises(CodecError, match="exceeds"):
        pack_payload("x", SPEC, 0, 0, [], {"pad": bytes(MAX_HEADER)})


def test_a_payload_names_its_codec() -> None:
    assert payload_codec(PAYLOAD) == "lossless"
    assert "lossless" in codec_names()


def test_an_unknown_codec_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'lossless'"):
        make_codec("losless", SPEC)
