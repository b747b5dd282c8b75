"""What the disk has of a conversation that the tree does not know: after a restart, or when
memory let go of it.

The tree learns of it when a request asks: the longest way through the disk's entries is looked
up, every entry's header is compared with the request, and the tokens join the tree as stored
ones. No payload is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from krul_sglang.runtime import marks
from krul_sglang.store.disk.entry import Entry, EntryName, Namespace
from krul_sglang.store.segment import RECORD_BYTES, SLOT_BYTES

if TYPE_CHECKING:
    from krul_sglang.codec.base import Payload
    from krul_sglang.runtime.cache import KrulRadixCache

# Set on a request that the disk has been asked for.
_ASKED = "krul_disk_asked"


class Found(NamedTuple):
    """An entry that goes on along a request."""

    name: EntryName
    entry: Entry
    stop: int
    payload: Payload | None = None
    """Where it is here already."""


def namespace(key: Any) -> Namespace:
    """Whose KV a tree key names."""
    return Namespace(key.extra_key, key.cache_salt)


def adopt(cache: KrulRadixCache, req: Any, key: Any, node_id: int, matched: int) -> bool:
    """Let stored tokens that follow the first ``matched`` of ``key`` join the tree below a node;
    the same on every rank. False where there are none."""
    durable = cache.krul.store.disk
    if durable is None or req is None or hasattr(req, _ASKED) or cache.is_exact(req):
        return False
    setattr(req, _ASKED, True)
    path = _find(cache, key, node_id, matched)
    stop = path[-1].stop if path else 0
    stop = -cache.agree([-stop])[0] // cache.page_size * cache.page_size
    if stop <= matched:
        durable.look_around()
        return False
    graft(cache, key, node_id, matched, stop, path)
    cache.krul.counters.adopted_tokens += stop - matched
    return True


def _find(cache: KrulRadixCache, key: Any, node_id: int, matched: int) -> list[Found]:
    """Entries from a boundary of the matched path on, as far as their headers agree."""
    durable = cache.krul.store.disk
    assert durable is not None
    disk = durable.disk
    if not len(disk):
        return []
    starts, end = {0, matched}, matched
    for node in cache.path(node_id):
        end -= len(node.key)
        starts.add(end)
    ids = np.asarray(key.token_ids[: len(key)], np.int64)
    space = namespace(key)
    path = disk.longest_path(space, ids, starts)
    found: list[Found] = []
    for name in path.names if path is not None and path.stop > matched else ():
        if name.stop <= matched:
            continue
        opened = durable.look(name, space, ids)
        if opened is None:
            break
        payload, agreeing = opened
        payload.close()
        found.append(Found(name, payload.entry, name.start + agreeing))
        if agreeing < name.tokens:
            break
    return found if fits(cache, found) else []


def fits(cache: KrulRadixCache, found: list[Found]) -> bool:
    """Whether memory has room for the records of what was found, and for what is here of it."""
    store = cache.krul.store
    needed = sum(RECORD_BYTES + SLOT_BYTES * one.entry.tokens for one in found)
    needed += sum(len(one.payload) for one in found if one.payload is not None)
    store.demote(store.ledger.used + needed - store.ledger.limit)
    return store.ledger.used + needed <= store.ledger.limit


def graft(
    cache: KrulRadixCache, key: Any, node_id: int, matched: int, stop: int, path: list[Found]
) -> None:
    """Let tokens ``matched .. stop`` of ``key``, stored as ``path`` says, join the tree below a
    node that ends at ``matched``."""
    store, ids, exact, is_exact = cache.krul.store, [], 0, True
    for name, entry, _, payload in path:
        lo, hi = max(0, matched - name.start), min(name.tokens, stop - name.start)
        if lo >= hi:
            continue
        ids.append(store.adopt(name, entry, lo, hi, payload))
        if is_exact:
            exact += max(0, min(hi, name.exact_tokens) - lo)
            is_exact = hi <= name.exact_tokens
    # No hashes: SGLang computes them where it needs any.
    core, below = cache.tree_core, key[matched:stop]
    result = core.insert_host(node_id, below, torch.cat(ids), None)
    assert result.prefix_len == 0, "the match would have gone on"
    cache._apply_cache_actions(result.cache_actions)
    marks.mark_adopted(core.node_by_id(result.inserted_host_node), exact)
