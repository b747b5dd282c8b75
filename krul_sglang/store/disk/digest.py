"""Digests that find candidates: of a fingerprint's fields, and of a conversation so far.

They only find: before an entry is used, the namespace and token ids in its header are compared
(:mod:`.payload`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from krul_sglang.store.disk.entry import Namespace, as_ids

DIGEST_BYTES = 16


def fingerprint_of(fields: Mapping[str, str]) -> bytes:
    """16 bytes that change with any field's name or text, whatever the fields' order."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES, person=b"krul-fingerprint")
    for name, text in sorted(fields.items()):
        digest.update(_framed(name) + _framed(text))
    return digest.digest()


class RollingDigest:
    """Digests of ever longer prefixes of one conversation, in one pass.

    A digest covers the namespace (each part marked and length-prefixed, so that no two pairs
    read alike) and the ids as little-endian int64.
    """

    def __init__(self, namespace: Namespace, ids: Sequence[int] | np.ndarray) -> None:
        self._hash = hashlib.blake2b(digest_size=DIGEST_BYTES, person=b"krul-disk-tokens")
        for part in namespace:
            self._hash.update(_framed(part))
        self._ids = np.ascontiguousarray(as_ids(ids), "<i8")
        self._position = 0

    def at(self, position: int) -> bytes:
        """The digest of the first ``position`` tokens. Positions must not go down."""
        if not self._position <= position <= len(self._ids):
            raise ValueError(f"position {position} after {self._position} of {len(self._ids)}")
        if position > self._position:
            self._hash.update(self._ids[self._position : position].data)
            self._position = position
        return self._hash.copy().digest()


def prefix_digests(
    namespace: Namespace, ids: Sequence[int] | np.ndarray, positions: Sequence[int]
) -> Iterator[bytes]:
    """The digests at rising ``positions``; each covers ``ids[:position]``."""
    rolling = RollingDigest(namespace, ids)
    return (rolling.at(position) for position in positions)


def _framed(text: str | None) -> bytes:
    if text is None:
        return b"\0"
    # Requests may carry text that is not valid Unicode; it must not fail and must not collide.
    encoded = text.encode("utf-8", "surrogatepass")
    return b"\1" + len(encoded).to_bytes(8, "little") + encoded
