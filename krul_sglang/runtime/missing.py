"""Stored copies that are lost: a miss for the request, and stored anew after the recompute."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from krul_sglang.runtime.exact import MISSED, RECOMPUTED
from krul_sglang.runtime.marks import full_data
from krul_sglang.store.segment import SegmentState
from krul_sglang.store.slots import slot_runs

if TYPE_CHECKING:
    from krul_sglang.runtime.cache import KrulRadixCache

logger = logging.getLogger(__name__)

# Set on a request whose stored tokens were looked for on the disk.
_LOOKED = "krul_looked"


def has_lost(cache: KrulRadixCache, node: Any) -> bool:
    """Whether any of the node's stored copy is lost."""
    ids, store = full_data(node).host_value, cache.krul.store
    if ids is None or not store.lost_count:
        return False
    segments = [store.get(run.segment) for run in slot_runs(ids)]
    return any(s is not None and s.state is SegmentState.LOST for s in segments)


def lose(cache: KrulRadixCache, segment_id: int) -> None:
    """A segment is damaged: its tokens will be computed anew."""
    logger.warning("krul: segment %d cannot be read; recomputing it", segment_id)
    cache.krul.store.mark_lost(segment_id)


def lose_gone(cache: KrulRadixCache, req: Any, node_id: int) -> None:
    """What the disk let go of since it was stored is a miss before it is planned with; once
    a request, and the same on every rank."""
    store = cache.krul.store
    if store.disk is None or req is None or hasattr(req, _LOOKED):
        return
    setattr(req, _LOOKED, True)
    stored = [full_data(node).host_value for node in cache.path(node_id) if node.evicted]
    segments = [run.segment for ids in stored for run in slot_runs(ids)]
    gone = cache.agree([int(store.is_gone(segment)) for segment in segments]) if segments else []
    for segment, is_gone in zip(segments, gone, strict=True):
        if is_gone:
            store.mark_lost(segment, gone=True)


def forget_lost(cache: KrulRadixCache, node_id: int) -> None:
    """Let device-resident nodes of a path whose stored copy is lost be stored anew."""
    # A node above may share the segment since a split: evicted with that copy it would
    # be thrown away.
    for node in cache.path(node_id):
        if not node.evicted and has_lost(cache, node):
            cache.forget_stored(node)


def miss(cache: KrulRadixCache, node_id: int, req: Any, tokens: int) -> None:
    """The path cannot be loaded: ``req`` computes its ``tokens``."""
    forget_lost(cache, node_id)
    if req is not None:
        setattr(req, RECOMPUTED, getattr(req, RECOMPUTED, 0) + tokens)
        setattr(req, MISSED, True)
