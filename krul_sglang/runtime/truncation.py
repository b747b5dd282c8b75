"""Which tokens of a finished conversation are not stored when they leave the device.

The boundary is an absolute position, fixed when a request finishes: the tree is cut there and
what lies behind is marked. What another conversation shares is never marked, and a marked
node that has children all the same when it leaves (they were stored) is stored like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from krul_sglang.runtime import marks

if TYPE_CHECKING:
    from krul_sglang.runtime.cache import KrulRadixCache


class Planned(NamedTuple):
    """What was decided for a request that returns.

    load: leading tokens it takes from the tree. stored: that it could take. history: tokens
    its conversation had, of which the last may not have been stored.
    """

    load: int
    stored: int
    history: int


def history_of(node: Any, end: int) -> int:
    """Tokens of the conversation whose stored part ends with ``node``, at position ``end``."""
    return max(end, marks.history(node))


def cut(cache: KrulRadixCache, req: Any) -> None:
    """A request has finished and left its tokens in the tree: fix the boundary."""
    if req.last_node is None or req.skip_radix_cache_insert:
        return
    path = list(cache.path(req.last_node))
    for node in path:
        marks.want(node)
    if _stores_all(cache):
        return
    length = sum(len(node.key) for node in path)
    position = max(_shared(path, length), _position(cache, length))
    if position >= length:
        return
    _split_at(cache, req, position)
    end = length
    for node in cache.path(req.last_node):
        if end <= position:
            if len(node.children) == 1:  # what follows is this conversation's alone
                marks.keep_history(node, length)
            return
        marks.unwant(node)
        end -= len(node.key)


def _shared(path: Sequence[Any], length: int) -> int:
    """How many leading tokens of a path, given from its leaf up, other conversations share."""
    for depth, node in enumerate(path):
        if len(node.children) > (1 if depth else 0):
            return length
        length -= len(node.key)
    return 0


def _stores_all(cache: KrulRadixCache) -> bool:
    """Whether the boundary lies at the end whatever the history."""
    fraction = cache.krul.config.recompute_fraction
    return cache.restores.plans.boundary.share >= 1 if fraction is None else fraction == 0


def _position(cache: KrulRadixCache, length: int) -> int:
    """The boundary of a history of ``length`` tokens, in whole pages."""
    fraction = cache.krul.config.recompute_fraction
    if fraction is None:
        position = cache.restores.plans.boundary.of(length)
    else:
        position = length - int(length * fraction)
    return -(-position // cache.page_size) * cache.page_size


def _split_at(cache: KrulRadixCache, req: Any, position: int) -> None:
    """See to it that no node of the request's path crosses ``position``: a match that ends
    there splits one that does."""
    key = RadixKey(
        req.full_untruncated_fill_ids[:position], req.extra_key, cache_salt=req.cache_salt
    )
    found = cache.tree_core.match_prefix(MatchPrefixParams(key=key))
    cache._apply_cache_actions(found.cache_actions)
