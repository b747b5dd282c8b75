"""A conversation's id: the same from a running server and from the files it left."""

from __future__ import annotations

import hashlib
import json

ID_BYTES = 6


def namespace_hash(extra_key: str | None, cache_salt: str | None) -> hashlib.blake2b:
    """The id of a conversation without tokens; its tokens' int64 bytes are yet to be added."""
    space = json.dumps([extra_key, cache_salt])
    return hashlib.blake2b(space.encode(), digest_size=ID_BYTES)
