"""Pair merging, damaged and hostile. Headers no codec accepts are test_damage.py's."""

from __future__ import annotations

import tracemalloc

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_runs import PAIRS, decode, encode, make_run, spec_of

from krul_sglang.codec.base import CodecError, KVSpec
from krul_sglang.codec.frames import pack_payload, unpack_payload
from krul_sglang.codec.lossless import LosslessCodec
from krul_sglang.strategy.base import EXACT

SPEC = spec_of("bfloat16")
PAYLOAD = encode(make_run(SPEC, 30, 3), SPEC, PAIRS)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(PAYLOAD) - 1), st.integers(1, 255), st.booleans())
def test_no_changed_byte_goes_unnoticed(at: int, flip: int, cut: bool) -> None:
    damaged = bytearray(PAYLOAD[:at] if cut else PAYLOAD)
    if not cut:
        damaged[at] ^= flip
    # zstd ignores one bit of a frame's header; a flip that changes no value may pass.
    try:
        found = decode(bytes(damaged), SPEC, 0, 30)
    except CodecError:
        return
    assert not cut
    for x, kept in zip(found, decode(PAYLOAD, SPEC, 0, 30), strict=True):
        assert torch.equal(x, kept)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(PAYLOAD) - 1), st.binary(min_size=1, max_size=60))
def test_overwritten_ranges_are_noticed_or_harmless(at: int, noise: bytes) -> None:
    damaged = (PAYLOAD[:at] + noise + PAYLOAD[at + len(noise) :])[: len(PAYLOAD)]
    try:
        found = decode(damaged, SPEC, 0, 30)
    except CodecError:
        return
    for x, kept in zip(found, decode(PAYLOAD, SPEC, 0, 30), strict=True):
        assert torch.equal(x, kept)


def repack(spec: KVSpec = SPEC, **changes: object) -> bytes:
    """The payload with other frames (``at0`` and so on) or another header."""
    header, frames = unpack_payload(PAYLOAD, "pair_merge", SPEC, {"pairs": list})
    fields: dict[str, object] = {"pairs": header["pairs"]}
    parts = [bytes(frame) for frame in frames]
    for name, value in changes.items():
        if isinstance(value, bytes):
            parts[int(name.removeprefix("at"))] = value
        else:
            fields[name] = value
    return pack_payload("pair_merge", spec, 30, 0, parts, fields)


def part(layers: int, tokens: int, start: int = 0) -> bytes:
    spec = spec_of("bfloat16", layers)
    return LosslessCodec(spec).encode(make_run(spec, tokens, start=start), EXACT)


@pytest.mark.parametrize(
    "changes",
    [
        {"pairs": []},
        {"pairs": [[1, 4]]},
        {"pairs": [[1, 4], [2, 3], [0, 5]]},
        {"pairs": [[0, 1]] * 1000},
        {"pairs": [[2, 3], [1, 4]]},
        {"pairs": [[4, 1], [2, 3]]},
        {"pairs": [[1, 4], [4, 5]]},
        {"pairs": [[1, 6], [2, 3]]},
        {"pairs": [[-1, 4], [2, 3]]},
        {"pairs": [[1, 4], [2, True]]},
        {"pairs": [[1, 4], 2]},
        {"pairs": [[1, 4], [1 << 62, 1 << 63]]},
        {"pairs": [[1, 4], ["a", "b"]]},
        {"pairs": "none"},
        {"tokens": 29},
        {"tokens": 1 << 22},
        {"start": 1},
        {"surprise": 1},
        {"at0": b""},
        {"at1": b""},
        {"at2": b""},
        {"at3": b""},
        {"at0": part(2, 29)},
        {"at0": part(2, 30, start=1)},
        {"at0": part(3, 30)},
        {"at1": part(2, 30)},
        {"at2": part(4, 6)},
    ],
    ids=str,
)
def test_hostile_headers_and_parts_are_refused(changes: dict[str, object]) -> None:
    payload = repack(**changes)
    tracemalloc.start()
    with pytest.raises(CodecError):
        decode(payload, SPEC, 0, 30)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_part_that_should_be_empty_is_refused() -> None:
    payload = encode(make_run(SPEC, 30), SPEC, ())
    _, frames = unpack_payload(payload, "pair_merge", SPEC, {"pairs": list})
    parts = [bytes(frames[0]), part(2, 30), b""]
    with pytest.raises(CodecError, match="nothing"):
        decode(pack_payload("pair_merge", SPEC, 30, 0, parts, {"pairs": []}), SPEC, 0, 30)


def frame_of(raw: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(raw)


def test_bitmaps_that_name_too_many_outliers_are_refused() -> None:
    _, frames = unpack_payload(PAYLOAD, "pair_merge", SPEC, {"pairs": list})
    raw = bytearray(zstandard.ZstdDecompressor().decompress(frames[3]))
    raw[1] = 0xFF
    with pytest.raises(CodecError, match="outliers"):
        decode(repack(at3=frame_of(bytes(raw))), SPEC, 0, 30)


def test_a_decompression_bomb_is_refused_before_it_expands() -> None:
    payload = repack(at3=frame_of(bytes(1 << 28)))
    tracemalloc.start()
    with pytest.raises(CodecError, match="declared size"):
        decode(payload, SPEC, 0, 30)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
