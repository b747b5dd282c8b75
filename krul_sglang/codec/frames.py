"""What every payload looks like in bytes, and the checks a reader makes first.

``MAGIC | version | header length | CRC-32 of the header | header | frames``.
The header is one msgpack map whose fields and types are fixed per codec; the
frames follow back to back with their lengths in the header. Nothing that the
bytes declare is believed before it agrees with the :class:`KVSpec` the reader
was opened with, and nothing is allocated from a declared size before that.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import msgpack
import zstandard
from zlib_ng.zlib_ng import crc32

from krul_sglang.codec.base import CodecError, KVSpec, Payload

MAGIC = b"KRUL"
VERSION = 1
MAX_HEADER = 256 * 1024
MAX_TOKENS = 1 << 22
"""Longest run a payload may declare; above any context length served today."""

_PREFIX = struct.Struct("<4sBxxxII")
PREFIX_BYTES = _PREFIX.size
_SPEC_FIELDS = ("layers", "kv_heads", "head_dim", "v_head_dim", "dtype")
_COMMON: dict[str, type] = {
    "codec": str,
    "layers": int,
    "kv_heads": int,
    "head_dim": int,
    "v_head_dim": int,
    "dtype": str,
    "tokens": int,
    "start": int,
    "frames": list,
}


def pack_payload(
    codec: str,
    spec: KVSpec,
    tokens: int,
    start: int,
    frames: Sequence[bytes],
    extra: Mapping[str, Any] | None = None,
) -> bytes:
    """One payload. ``extra`` holds the codec's own header fields (msgpack types)."""
    fields: dict[str, Any] = {"codec": codec, "tokens": tokens, "start": start}
    fields.update({name: getattr(spec, name) for name in _SPEC_FIELDS})
    fields["frames"] = [len(frame) for frame in frames]
    fields.update(extra or {})
    header = msgpack.packb(fields, use_bin_type=True)
    if len(header) > MAX_HEADER:
        raise CodecError(f"header of {len(header)} bytes exceeds {MAX_HEADER}")
    prefix = _PREFIX.pack(MAGIC, VERSION, len(header), crc32(header))
    return b"".join([prefix, header, *frames])


def header_end(head: Payload) -> int:
    """Where the header of a payload ends, from its first :data:`PREFIX_BYTES`. Raises
    :class:`CodecError`; what lies in between is checked when the payload is opened."""
    if len(head) < PREFIX_BYTES:
        raise CodecError(f"payload of {len(head)} bytes is shorter than its prefix")
    _, _, length, _ = _PREFIX.unpack_from(head)
    if length > MAX_HEADER:
        raise CodecError(f"header of {length} bytes")
    return PREFIX_BYTES + length


def _read_header(payload: Payload) -> tuple[dict[str, Any], int]:
    """The header map, checked against its CRC, and the offset behind it."""
    if len(payload) < _PREFIX.size:
        raise CodecError(f"payload of {len(payload)} bytes is shorter than its prefix")
    magic, version, length, crc = _PREFIX.unpack_from(payload)
    if magic != MAGIC:
        raise CodecError("not a Krul payload (magic differs)")
    if version != VERSION:
        raise CodecError(f"payload format {version}, this reader knows {VERSION}")
    end = _PREFIX.size + length
    if length > MAX_HEADER or end > len(payload):
        raise CodecError(f"header of {length} bytes does not fit the payload")
    raw = bytes(memoryview(payload)[_PREFIX.size : end])
    # The prefix has no CRC of its own; its three pad bytes must be zero so that
    # no byte of a payload can change unnoticed.
    if payload[5:8] != b"\0\0\0" or crc32(raw) != crc:
        raise CodecError("header checksum differs")
    try:
        header = msgpack.unpackb(raw, raw=False, strict_map_key=True)
    except Exception as error:  # msgpack raises many types, all of them mean damage
        raise CodecError(f"header is not msgpack: {error}") from error
    if not isinstance(header, dict):
        raise CodecError("header is not a map")
    return header, end


def payload_codec(payload: Payload) -> str:
    """Name of the codec that wrote ``payload``. Raises :class:`CodecError`."""
    header, _ = _read_header(payload)
    name = header.get("codec")
    if not isinstance(name, str):
        raise CodecError("header names no codec")
    return name


def unpack_payload(
    payload: Payload, codec: str, spec: KVSpec, extra: Mapping[str, type] | None = None
) -> tuple[dict[str, Any], list[memoryview]]:
    """Header and frames of a payload written by ``codec`` for ``spec``.

    Raises :class:`CodecError` on an unknown, missing or mistyped field, a shape
    other than ``spec``'s, and frame lengths that do not add up to the payload.
    """
    header, offset = _read_header(payload)
    schema = {**_COMMON, **(extra or {})}
    if header.keys() != schema.keys():
        odd = sorted(str(name) for name in header.keys() ^ schema.keys())
        raise CodecError(f"header fields unknown or missing: {', '.join(odd)[:200]}")
    for name, kind in schema.items():
        if type(header[name]) is not kind:
            raise CodecError(f"header field {name} is not {kind.__name__}")
    if header["codec"] != codec:
        raise CodecError(f"payload of codec {header['codec']!r}, opened as {codec!r}")
    for name in _SPEC_FIELDS:
        if header[name] != getattr(spec, name):
            raise CodecError(f"{name} is {header[name]!r}, expected {getattr(spec, name)!r}")
    if not 0 <= header["tokens"] <= MAX_TOKENS or not 0 <= header["start"] < 1 << 40:
        raise CodecError("tokens or start out of range")
    return header, _split(payload, offset, header["frames"])


def _split(payload: Payload, offset: int, lengths: list[Any]) -> list[memoryview]:
    if any(type(n) is not int or n < 0 for n in lengths):
        raise CodecError("a frame length is not a natural number")
    if offset + sum(lengths) != len(payload):
        raise CodecError("frame lengths do not add up to the payload")
    view = memoryview(payload)
    frames = []
    for length in lengths:
        frames.append(view[offset : offset + length])
        offset += length
    return frames


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """``total`` in whole parts in proportion to ``weights``, evenly where all of them are 0."""
    if not any(weights):
        weights = [1] * len(weights)
    whole = sum(weights)
    ends = [round(total * part / whole) for part in accumulate(weights)]
    return [end - begin for begin, end in pairwise([0, *ends])]


def open_frame(decompressor: zstandard.ZstdDecompressor, frame: memoryview, size: int) -> bytes:
    """The ``size`` bytes of one checksummed zstd frame."""
    try:
        _check_frame(frame, size)
        return decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CodecError(f"damaged frame: {error}") from error


def by_layer(
    layers: int, payload: int, groups: Sequence[tuple[int, int]], sizes: Sequence[int]
) -> list[int]:
    """Bytes each layer needs beyond those below it: a group's at its first layer, and what of
    the ``payload`` bytes is in no group at layer 0."""
    out = [0] * layers
    for (first, _), size in zip(groups, sizes, strict=True):
        out[first] += size
    out[0] += payload - sum(out)
    return out


def open_head(
    decompressor: zstandard.ZstdDecompressor, frame: memoryview, size: int, count: int
) -> bytes:
    """The first ``count`` of a frame's ``size`` bytes where the encoder flushed a block behind
    them. Decompresses little more than that, so the frame's checksum is not looked at."""
    try:
        _check_frame(frame, size)
        # Blocks of at most 128 KiB that do not compress are stored as they are.
        longest = count + 3 * (count // (1 << 17) + 1) + 18
        head = decompressor.stream_reader(bytes(frame[:longest])).read(count)
    except zstandard.ZstdError as error:
        raise CodecError(f"damaged frame: {error}") from error
    if len(head) != count:
        raise CodecError("a frame holds less than its shape implies")
    return head


def _check_frame(frame: memoryview, size: int) -> None:
    """Compare what a frame declares with what is expected, before anything is decompressed:
    python-zstandard allocates what the frame says, whatever ``max_output_size`` the caller gives.
    """
    found = zstandard.get_frame_parameters(frame)
    if found.content_size != size or not found.has_checksum or found.dict_id:
        raise CodecError("a frame's declared size or flags differ from what is expected")
