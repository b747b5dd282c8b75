"""The head of a segment file, before its payload.

``MAGIC | version | header length | CRC-32 | header | payload``. The CRC covers all bytes before
it and the header. Magic, length and CRC keep their places in every later version, so that a file
of a later version is told from a damaged one. Nothing the bytes declare is believed, and nothing
is allocated for it, before it agrees with the file's size and its name.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import zstandard
from zlib_ng.zlib_ng import crc32

from krul_sglang.codec.base import CodecError
from krul_sglang.codec.frames import open_frame
from krul_sglang.store.disk.digest import prefix_digests
from krul_sglang.store.disk.entry import MAX_IDS, Entry, EntryName, Namespace

MAGIC = b"KSEG"
VERSION = 1
PREFIX = struct.Struct("<4sBxxxII")
MAX_HEADER = 8 * MAX_IDS + (1 << 20)
"""Token ids that do not compress, and a mebibyte for the namespace and the rest."""
MAX_TEXT = 1 << 18

_COVERED = PREFIX.size - 4
_ITEM_SIZES = (4, 8)
_SCHEMA: dict[str, tuple[type, ...]] = {
    "fingerprint": (bytes,),
    "extra_key": (str, type(None)),
    "cache_salt": (str, type(None)),
    "start": (int,),
    "tokens": (int,),
    "exact_tokens": (int,),
    "codec": (str,),
    "raw_bytes": (int,),
    "id_bytes": (int,),
    "ids": (bytes,),
    "payload_bytes": (int,),
    "payload_crc": (int,),
}
_CRC_BYTES = 4


class FutureVersionError(CodecError):
    """A sound file of a later format: a miss, and none of ours to move or remove."""


def pack_head(entry: Entry) -> bytes:
    """What precedes the payload. Raises ValueError where the namespace is absurdly long.

    Its length does not depend on the payload's checksum, see :func:`with_checksum`.
    """
    narrow = entry.ids.astype("<i4")
    ids = narrow if np.array_equal(narrow, entry.ids) else entry.ids.astype("<i8")
    compressor = zstandard.ZstdCompressor(level=3, write_checksum=True, write_content_size=True)
    fields = {
        "fingerprint": entry.fingerprint,
        "extra_key": entry.namespace.extra_key,
        "cache_salt": entry.namespace.cache_salt,
        "start": entry.start,
        "tokens": entry.tokens,
        "exact_tokens": entry.exact_tokens,
        "codec": entry.codec,
        "raw_bytes": entry.raw_bytes,
        "id_bytes": ids.itemsize,
        "ids": compressor.compress(ids.tobytes()),
        "payload_bytes": entry.payload_bytes,
        "payload_crc": (1 << 32) - 1,  # last, and four bytes wide whatever it is
    }
    for text in (*entry.namespace, entry.codec):
        if text is not None and len(text) > MAX_TEXT // 4:
            raise ValueError(f"a namespace or codec name of {len(text)} characters")
    header = msgpack.packb(fields, use_bin_type=True, unicode_errors="surrogatepass")
    return with_checksum(PREFIX.pack(MAGIC, VERSION, len(header), 0) + header, entry.payload_crc)


def with_checksum(head: bytes, payload_crc: int) -> bytes:
    """The same head for a payload of that CRC-32."""
    header = head[PREFIX.size : -_CRC_BYTES] + payload_crc.to_bytes(_CRC_BYTES, "big")
    prefix = head[:_COVERED]
    return prefix + crc32(header, crc32(prefix)).to_bytes(4, "little") + header


def read_head(read: Callable[[int, int], bytes], size: int) -> tuple[Entry, int]:
    """The entry of a file of ``size`` bytes, and the offset of its payload.

    ``read(offset, length)`` gives exactly those bytes. Raises :class:`CodecError` for anything
    damaged, :class:`FutureVersionError` for a sound file of a later version.
    """
    if size < PREFIX.size:
        raise CodecError(f"a file of {size} bytes is shorter than its prefix")
    prefix = read(0, PREFIX.size)
    magic, version, length, crc = PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise CodecError("not a segment file (magic differs)")
    if length > MAX_HEADER or PREFIX.size + length > size:
        raise CodecError(f"a header of {length} bytes does not fit the file")
    header = read(PREFIX.size, length)
    if crc32(header, crc32(prefix[:_COVERED])) != crc:
        raise CodecError("header checksum differs")
    if version != VERSION or prefix[5:8] != b"\0\0\0":
        raise FutureVersionError(f"segment file of format {version}, this reader knows {VERSION}")
    entry = _entry(_fields(header))
    if PREFIX.size + length + entry.payload_bytes != size:
        raise CodecError("header and payload do not add up to the file")
    return entry, PREFIX.size + length


def _fields(header: bytes) -> dict[str, Any]:
    try:
        fields = msgpack.unpackb(
            header,
            raw=False,
            unicode_errors="surrogatepass",
            max_map_len=len(_SCHEMA),
            max_array_len=0,
            max_ext_len=0,
            max_str_len=MAX_TEXT,
        )
    except Exception as error:  # msgpack raises many types, all of them mean damage
        raise CodecError(f"header is not the map it should be: {error}") from error
    if not isinstance(fields, dict) or fields.keys() != _SCHEMA.keys():
        raise CodecError("header fields unknown or missing")
    for name, kinds in _SCHEMA.items():
        if type(fields[name]) not in kinds:
            raise CodecError(f"header field {name} is not {kinds[0].__name__}")
    return fields


def _entry(fields: dict[str, Any]) -> Entry:
    start, tokens, id_bytes = fields["start"], fields["tokens"], fields["id_bytes"]
    if not 0 <= start < start + tokens <= MAX_IDS or id_bytes not in _ITEM_SIZES:
        raise CodecError("start, tokens or id_bytes out of range")
    frame = memoryview(fields["ids"])
    raw = open_frame(zstandard.ZstdDecompressor(), frame, (start + tokens) * id_bytes)
    try:
        return Entry(
            fields["fingerprint"],
            Namespace(fields["extra_key"], fields["cache_salt"]),
            np.frombuffer(raw, f"<i{id_bytes}").astype(np.int64),
            start,
            fields["exact_tokens"],
            fields["codec"],
            fields["raw_bytes"],
            fields["payload_bytes"],
            fields["payload_crc"],
        )
    except ValueError as error:
        raise CodecError(f"header: {error}") from error


def name_of(entry: Entry, head_bytes: int) -> EntryName:
    """The name of a file with a head of ``head_bytes``: a function of its contents alone."""
    stop = len(entry.ids)
    parent, end = prefix_digests(entry.namespace, entry.ids, (entry.start, stop))
    return EntryName(
        entry.fingerprint,
        parent,
        entry.start,
        entry.tokens,
        entry.exact_tokens,
        end,
        head_bytes + entry.payload_bytes,
    )
