"""An entry that arrived: nothing of it is believed before all of it agrees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from zlib_ng.zlib_ng import crc32

from krul_sglang.codec.base import CodecError
from krul_sglang.store.disk.entry import Entry, EntryName, Namespace
from krul_sglang.store.disk.header import name_of, read_head


class ForeignArrivalError(Exception):
    """A sound entry, but of another namespace or conversation than was asked for."""


@dataclass(frozen=True, eq=False)
class Arrival:
    """name, entry: what it is. payload: the codec's bytes, checked."""

    name: EntryName
    entry: Entry
    payload: memoryview


def receive(name: EntryName, raw: bytes, namespace: Namespace, ids: np.ndarray) -> Arrival:
    """Check the bytes that lay under ``name`` for the conversation ``ids`` (from position 0).

    Raises :class:`CodecError` where they are not what was stored under that name, and
    :class:`ForeignArrivalError` where they are, and yet not this conversation's.
    """
    if len(raw) != name.size:
        raise CodecError(f"{len(raw)} bytes, named as {name.size}")
    view = memoryview(raw)
    entry, offset = read_head(lambda at, length: raw[at : at + length], len(raw))
    said = (entry.fingerprint, entry.start, entry.tokens, entry.exact_tokens)
    if said != (name.fingerprint, name.start, name.tokens, name.exact_tokens):
        raise CodecError("header and name disagree")
    payload = view[offset:]
    if crc32(payload) != entry.payload_crc:
        raise CodecError("payload checksum differs")
    if entry.namespace != namespace or not np.array_equal(entry.ids, ids[: name.stop]):
        # The digests in the name were compared when it was found: only now is it worth knowing
        # whether they are those of the header's tokens.
        if name_of(entry, offset) != name:
            raise CodecError("the header's tokens are not those its name stands for")
        raise ForeignArrivalError("another namespace or conversation")
    return Arrival(name, entry, payload)
