"""Conversations of the prefix tree: root-to-leaf paths, what they hold and what is stored.

Runs in the scheduler between two steps, so it reads and changes nothing, and what it costs is
bounded: one pass over the nodes, and a closer look at the paths that are asked for.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from krul_sglang.inspection.detail import detail, pieces_of, summary
from krul_sglang.inspection.identity import namespace_hash
from krul_sglang.runtime import marks
from krul_sglang.runtime.marks import full_data
from krul_sglang.store.slots import slot_runs

if TYPE_CHECKING:
    from krul_sglang.runtime.cache import KrulRadixCache

LIMIT, MOST = 20, 200
"""Conversations that are listed, by default and at most."""
_NONE = torch.empty(0, dtype=torch.int64)


def list_newest(cache: KrulRadixCache, argument: Mapping[str, str]) -> dict[str, Any]:
    """The ``limit`` conversations that were used last, newest first, and how many there are.

    Raises ValueError for a limit that is none.
    """
    limit = argument.get("limit", str(LIMIT))
    if not limit.isdecimal() or not 1 <= int(limit) <= MOST:
        raise ValueError(f"limit={limit}: a number of conversations from 1 to {MOST}")
    leaves = list(_leaves(cache))
    newest = heapq.nlargest(int(limit), leaves, key=lambda leaf: leaf.last_access_time)
    ids = _Ids(cache)
    return {
        "total": len(leaves),
        "conversations": [_conversation(cache, leaf, ids)[0] for leaf in newest],
    }


def find(cache: KrulRadixCache, argument: Mapping[str, str]) -> dict[str, Any]:
    """Ids that begin with ``id``, and the conversation's detail where there is only one."""
    ids, wanted = _Ids(cache), argument["id"]
    found = {ids.of(leaf): leaf for leaf in _leaves(cache) if ids.of(leaf).startswith(wanted)}
    if len(found) != 1:
        return {"ids": sorted(found)}
    (leaf,) = found.values()
    line, pieces = _conversation(cache, leaf, ids)
    return {"ids": list(found), "detail": {**line, **detail(cache.krul.store, pieces)}}


def _leaves(cache: KrulRadixCache) -> Iterator[Any]:
    stack = list(cache.tree_core.root_node.children.values())
    while stack:
        node = stack.pop()
        stack.extend(node.children.values())
        if not node.children:
            yield node


class _Ids:
    """Ids of leaves; what paths have in common is hashed once."""

    def __init__(self, cache: KrulRadixCache) -> None:
        self._cache = cache
        self._prefixes: dict[int, Any] = {}

    def of(self, leaf: Any) -> str:
        """A hash of the tokens from the root to the leaf's end, and of their namespace."""
        new, digest = [], None
        for node in self._cache.path(leaf.id):
            digest = self._prefixes.get(node.id)
            if digest is not None:
                break
            new.append(node)
        if digest is None:
            digest = namespace_hash(new[-1].key.extra_key, new[-1].key.cache_salt)
        for node in reversed(new):
            digest = digest.copy()
            digest.update(node.key.raw_token_ids())
            self._prefixes[node.id] = digest
        return digest.hexdigest()


def _conversation(cache: KrulRadixCache, leaf: Any, ids: _Ids) -> tuple[dict[str, Any], list]:
    """What the list says of a conversation, and the pieces it is stored in."""
    nodes = list(cache.path(leaf.id))
    tokens = sum(len(node.key) for node in nodes)
    exact = sum(marks.exact_tokens(node) for node in nodes)
    slots = [full_data(node).host_value for node in reversed(nodes)]
    stored = torch.cat([_NONE, *(own for own in slots if own is not None)])
    pieces = pieces_of(cache.krul.store, slot_runs(stored))
    line = {
        "id": ids.of(leaf),
        "namespace": namespace_hash(leaf.key.extra_key, leaf.key.cache_salt).hexdigest(),
        "age_seconds": round(cache.clock.age(leaf.last_access_time), 1),
        "tokens": tokens,
        "device_tokens": sum(len(node.key) for node in nodes if not node.evicted),
        "stored_tokens": len(stored),
        "exact_tokens": exact,
        "lossy_tokens": tokens - exact,
        **summary(pieces),
    }
    return line, pieces
