"""Bringing the evicted part of a path back to the device: all of it or nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from krul_sglang.runtime import marks, missing
from krul_sglang.store.slots import slot_runs

if TYPE_CHECKING:
    from krul_sglang.restore.load import Opened
    from krul_sglang.runtime.cache import KrulRadixCache


def load(
    cache: KrulRadixCache, node_id: int, mem_quota: int | None, req: Any, locked_tokens: int
) -> bool:
    """Begin to load what is evicted of the path to ``node_id``, whose nodes are locked.

    locked_tokens: what of SGLang's ``mem_quota`` the locks took. False when it does not fit or
    cannot be read; what was stored and cannot be read is a miss of ``req`` then.
    """
    transfer, _ = cache.tree_core.build_load_back_spec(node_id, req=req)
    tokens = transfer.host_indices.numel()
    if tokens == 0 or (mem_quota is not None and tokens + locked_tokens > mem_quota):
        return False
    if not _fits_memory(cache, transfer.host_indices):
        missing.miss(cache, node_id, req, tokens)
        return False
    opened = cache.krul.loader.open(slot_runs(transfer.host_indices))
    if not _can_open(cache, opened, transfer.host_indices):
        missing.miss(cache, node_id, req, tokens)
        return False
    allocator = cache.token_to_kv_pool_allocator
    shortfall = tokens - allocator.available_size()
    if shortfall > 0:
        cache.evict_for_alloc(EvictParams(num_tokens=shortfall))
    rows = allocator.alloc(tokens)
    if rows is None:
        return False
    rows = rows.to(torch.int64)
    cache.restores.begin(opened, transfer, rows, req)
    if not cache.restores.overlapped and cache.restores.settle():
        allocator.free(rows)
        missing.miss(cache, node_id, req, tokens)
        return False
    for loaded in transfer.nodes_to_load:
        marks.mark_loaded(cache.tree_core.node_by_id(loaded))
    cache._apply_cache_actions(cache.tree_core.commit_load_back(node_id, rows, transfer, {}))
    cache.tree_core.finish_load_back(node_id)
    return True


def _fits_memory(cache: KrulRadixCache, ids: torch.Tensor) -> bool:
    """Whether every rank has room for what must come from its disk."""
    if cache.krul.store.disk is None:
        return True
    segments = {run.segment for run in slot_runs(ids)}
    return not cache.agree([int(not cache.krul.store.make_room_to_read(segments))])[0]


def _can_open(cache: KrulRadixCache, opened: Opened, ids: torch.Tensor) -> bool:
    """Whether every rank could open all of its segments; what one could not is lost."""
    runs = slot_runs(ids)
    lost = cache.agree([int(run.segment in opened.lost) for run in runs])
    for run, is_lost in zip(runs, lost, strict=True):
        if is_lost:
            missing.lose(cache, run.segment)
    return not any(lost)
