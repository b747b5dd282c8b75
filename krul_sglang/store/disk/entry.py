"""What one stored segment is: its record inside the file, and what its name alone tells.

Everything that lookup, accounting and eviction need is in the name (and the file's times), so
the directory is the index: there is no second one that could be lost or disagree.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from zlib_ng.zlib_ng import crc32

from krul_sglang.codec.base import Payload

MAX_IDS = 1 << 22
"""Longest conversation a file may declare, in tokens; above any context length served today."""
MAX_FILE = 1 << 36
"""Longest file that is believed in, in bytes."""
MIN_FINGERPRINT, MAX_FINGERPRINT = 16, 64

BLOCK = 4096
_SUFFIX = ".krul"
_NUMBER = "(0|[1-9][0-9]{0,12})"
_NAME = re.compile(
    rf"([0-9a-f]{{32}})\.{_NUMBER}\.{_NUMBER}\.{_NUMBER}\.([0-9a-f]{{32}})\.{_NUMBER}\.krul"
)


class Namespace(NamedTuple):
    """Whose KV it is: SGLang's extra key (a LoRA adapter, say) and the request's cache salt.

    Entries of different namespaces are never found for one another; None differs from "".
    """

    extra_key: str | None = None
    cache_salt: str | None = None


class EntryName(NamedTuple):
    """What a file's path tells. Only :meth:`parse` makes one from a name found on disk.

    fingerprint: 16 to 64 bytes, what the KV is bound to (see :func:`.digest.fingerprint_of`).
    parent, end: digests (:mod:`.digest`) of the tokens before the run and with the run.
    start, tokens: the run is tokens ``start .. start + tokens`` of its conversation.
    exact_tokens: how many of the run's leading tokens are bit-exact.
    size: bytes of the whole file.
    """

    fingerprint: bytes
    parent: bytes
    start: int
    tokens: int
    exact_tokens: int
    end: bytes
    size: int

    @property
    def stop(self) -> int:
        """Position behind the run's last token."""
        return self.start + self.tokens

    @property
    def shard(self) -> str:
        """The subdirectory it lies in. By the end's digest: the first segments of all
        conversations share a parent."""
        return f"{self.end[0]:02x}"

    @property
    def file(self) -> str:
        """The file's name in its shard."""
        fields = (self.parent.hex(), self.start, self.tokens, self.exact_tokens)
        return ".".join(map(str, (*fields, self.end.hex(), self.size))) + _SUFFIX

    @property
    def footprint(self) -> int:
        """Bytes it takes on disk, in whole blocks: what the budget counts."""
        return -(-self.size // BLOCK) * BLOCK

    @classmethod
    def parse(cls, fingerprint: bytes, file: str) -> EntryName | None:
        """The name, or None for anything this version would not have written."""
        match = _NAME.fullmatch(file)
        if match is None:
            return None
        parent, start, tokens, exact_tokens, end, size = match.groups()
        first, run, exact, whole = int(start), int(tokens), int(exact_tokens), int(size)
        if not (run and exact <= run and first + run <= MAX_IDS and whole <= MAX_FILE):
            return None
        ends = bytes.fromhex(parent), bytes.fromhex(end)
        return cls(fingerprint, ends[0], first, run, exact, ends[1], whole)


@dataclass(frozen=True, eq=False)
class Entry:
    """The record in a file's header.

    ids: int64 ``[start + tokens]``, the conversation's token ids from position 0 to the run's end.
    start: position of the run's first token; ``tokens`` follows from it.
    exact_tokens: how many of the run's leading tokens are bit-exact.
    codec: name of the codec that wrote the payload. raw_bytes: of the KV it was made from.
    payload_bytes, payload_crc: length and CRC-32 of the payload.
    """

    fingerprint: bytes
    namespace: Namespace
    ids: np.ndarray
    start: int
    exact_tokens: int
    codec: str
    raw_bytes: int
    payload_bytes: int
    payload_crc: int

    def __post_init__(self) -> None:
        if not MIN_FINGERPRINT <= len(self.fingerprint) <= MAX_FINGERPRINT:
            raise ValueError(f"a fingerprint of {len(self.fingerprint)} bytes")
        if not 0 <= self.start < len(self.ids) <= MAX_IDS:
            raise ValueError(f"a run from {self.start} to {len(self.ids)}")
        if not 0 <= self.exact_tokens <= self.tokens:
            raise ValueError(f"{self.exact_tokens} exact of {self.tokens} tokens")
        if self.raw_bytes < 0 or not 0 <= self.payload_bytes <= MAX_FILE:
            raise ValueError("a size out of range")

    @classmethod
    def of(
        cls,
        fingerprint: bytes,
        namespace: Namespace,
        ids: Sequence[int] | np.ndarray,
        start: int,
        payload: Payload,
        *,
        codec: str,
        exact_tokens: int,
        raw_bytes: int,
        payload_crc: int | None = None,
    ) -> Entry:
        """The entry of ``payload``, whose checksum is taken here where it is not given. Raises
        ValueError for figures that cannot be."""
        return cls(
            fingerprint,
            namespace,
            as_ids(ids),
            start,
            exact_tokens,
            codec,
            raw_bytes,
            len(payload),
            crc32(payload) if payload_crc is None else payload_crc,
        )

    @property
    def tokens(self) -> int:
        """Tokens of the run."""
        return len(self.ids) - self.start


def as_ids(ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """Token ids as int64. Raises ValueError for what is not a row of whole numbers."""
    try:
        found = np.asarray(ids)
        if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
            raise ValueError(f"token ids of type {found.dtype}, shape {found.shape}")
        return found.astype(np.int64, copy=False)
    except OverflowError as error:
        raise ValueError(f"a token id does not fit 64 bits: {error}") from error
