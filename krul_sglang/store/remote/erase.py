"""Erase one tenant from a server that several fill: what was stored under its salt or key."""

from __future__ import annotations

from krul_sglang.codec.base import CodecError
from krul_sglang.store.disk.entry import Entry, Namespace
from krul_sglang.store.disk.header import MAX_HEADER, PREFIX, read_head
from krul_sglang.store.remote.address import parse_address
from krul_sglang.store.remote.client import Client, RemoteError
from krul_sglang.store.remote.keys import Keys

PATTERN = "krul:*:kv:*"
"""Entries of every layout and fingerprint."""
SCANNED = 64
"""Keys that a round trip asks for; servers give or take some."""
HEAD_BYTES = 16 << 10
"""Of each entry at first; longer heads are asked for again."""
SECONDS = 10.0
MAX_KEYS_BYTES = 16 << 20


def erase(url: str, namespace: Namespace) -> tuple[int, int]:
    """Remove every entry of a tenant, of any fingerprint; how many, and their bytes.

    namespace: a part that is None matches any; at least one must be given. Entries whose head
    cannot be read go too: they might be the tenant's. Raises ValueError, and OSError for what
    the server does.
    """
    if namespace == Namespace():
        raise ValueError("an extra key or a cache salt is needed: nothing else names a tenant")
    address = parse_address(url)
    client = Client(address)
    count = nbytes = 0
    cursor = -1
    try:
        while cursor:
            command = ("SCAN", max(cursor, 0), "MATCH", PATTERN, "COUNT", SCANNED)
            (reply,) = client.exchange([command], SECONDS, MAX_KEYS_BYTES)
            if isinstance(reply, Exception):
                raise RemoteError(str(reply))
            cursor, keys = reply
            for key in keys:
                size = _erase(client, key, namespace)
                count, nbytes = count + (size is not None), nbytes + (size or 0)
    except RemoteError as error:
        raise OSError(f"{address.shown}: {error}") from error
    finally:
        client.close()
    return count, nbytes


def _erase(client: Client, key: bytes, namespace: Namespace) -> int | None:
    """Remove an entry that may be the tenant's; its bytes, None where it is another's or gone."""
    size, head = client.exchange(
        [("STRLEN", key), ("GETRANGE", key, 0, HEAD_BYTES - 1)], SECONDS, HEAD_BYTES
    )
    if size == 0:
        return None
    commands = [("UNLINK", key)]
    try:
        entry = _entry(client, key, size, head)
        if any(
            part not in (None, own) for part, own in zip(namespace, entry.namespace, strict=True)
        ):
            return None
        listed = Keys(entry.fingerprint, entry.namespace).list_of(entry.ids, len(entry.ids))
        commands.append(("ZREM", listed, key.rpartition(b":")[2]))  # type: ignore[arg-type]
    except CodecError:
        pass
    (gone, *_) = client.exchange(commands, SECONDS)
    if isinstance(gone, Exception):
        raise RemoteError(str(gone))
    return size if isinstance(size, int) else 0


def _entry(client: Client, key: bytes, size: object, head: object) -> Entry:
    if not isinstance(size, int) or not isinstance(head, bytes):  # a key of another kind
        raise CodecError("not a value")
    needed = min(size, _head_bytes(head))
    if needed > len(head):
        (head,) = client.exchange([("GETRANGE", key, 0, needed - 1)], SECONDS, needed)
        if not isinstance(head, bytes):
            raise CodecError("not a value")
    return read_head(lambda at, length: head[at : at + length], size)[0]


def _head_bytes(head: bytes) -> int:
    if len(head) < PREFIX.size:
        raise CodecError("shorter than its prefix")
    length = PREFIX.unpack_from(head)[2]
    if length > MAX_HEADER:
        raise CodecError("its header is longer than any")
    return PREFIX.size + length
