"""Which conversations the tiers that outlive the server take: all, or those that came back.

A conversation comes back when a request matches all that the tree has of it, to a leaf's end: a
system prompt that many begin with ends inside the tree. What the request adds belongs to it. What
was stored before that, in memory alone, is handed on then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from krul_sglang.config import ALWAYS
from krul_sglang.runtime.adoption import namespace
from krul_sglang.runtime.marks import full_data
from krul_sglang.store.segment import Origin
from krul_sglang.store.slots import slot_runs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang.srt.mem_cache.base_prefix_cache import MatchResult

    from krul_sglang.runtime.cache import KrulRadixCache

# Set on a request whose conversation came back, and on the nodes that it then left.
CAME_BACK = "krul_came_back"


def _filters(cache: KrulRadixCache) -> bool:
    return cache.krul.config.admit != ALWAYS and cache.krul.store.names_origins


def note(cache: KrulRadixCache, req: Any, result: MatchResult) -> None:
    """A request was matched, as far as the tree goes. Only the first time counts: later it may
    find what it computed itself."""
    if req is None or hasattr(req, CAME_BACK) or not _filters(cache):
        return
    node = cache.tree_core.node_by_id(result.best_match_node)
    setattr(req, CAME_BACK, node is not cache.tree_core.root_node and not node.children)


def is_admitted(cache: KrulRadixCache, node: Any) -> bool:
    """Whether what is stored of a node goes on to the tiers below memory."""
    if not cache.krul.store.names_origins:
        return False
    return not _filters(cache) or CAME_BACK in full_data(node).metadata


def split(parent: Any, child: Any) -> None:
    """``parent`` was just split off the front of ``child``."""
    if CAME_BACK in full_data(child).metadata:
        full_data(parent).metadata[CAME_BACK] = True


def admit(cache: KrulRadixCache, req: Any) -> None:
    """A request has finished: let the tiers below have its conversation, if it came back."""
    if not getattr(req, CAME_BACK, False) or req.last_node is None:
        return
    nodes = list(reversed(list(cache.path(req.last_node))))
    fresh = [node for node in nodes if not is_admitted(cache, node)]
    if not fresh:
        return
    for node in fresh:
        full_data(node).metadata[CAME_BACK] = True
    keys = [np.asarray(node.key.token_ids[: len(node.key)], np.int64) for node in nodes]
    ids, space = np.concatenate(keys), namespace(nodes[-1].key)
    for number in segments_ending(cache, nodes):
        segment = cache.krul.store.get(number)
        assert segment is not None
        end, exact = segment.start + segment.tokens, segment.tokens if segment.exact else 0
        cache.krul.store.admit(number, Origin(space, ids[:end], exact))


def segments_ending(cache: KrulRadixCache, path: Sequence[Any]) -> set[int]:
    """Segments whose last token a path's nodes name: all their tokens are this path's, as they
    were stored along it."""
    stored = [full_data(node).host_value for node in path]
    named = [ids for ids in stored if ids is not None]
    found = set()
    for run in slot_runs(torch.cat(named)) if named else ():
        segment = cache.krul.store.get(run.segment)
        if segment is not None and run.hi == segment.tokens:
            found.add(run.segment)
    return found
