"""KrulRadixCache: SGLang's prefix tree with Krul's store behind its host side.

The stock tree runs in write-back mode: a node that leaves the device keeps slot
ids in its host side and stays in the tree, matches again, and is loaded when a
request needs it. Krul supplies the three things a host pool would: backing a node
up (:meth:`_execute_and_commit_kv_backup`), loading a path back (:meth:`load_back`)
and letting go (:class:`KrulFullComponent`). The tree owns residency throughout.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from sglang.srt.disaggregation.kv_events import StorageMedium
from sglang.srt.environ import envs
from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    EvictResult,
    InsertParams,
    InsertResult,
    MatchPrefixParams,
    MatchResult,
)
from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from krul_sglang.config import KrulConfig
from krul_sglang.restore.load import Loader
from krul_sglang.runtime.component import LOSSY, full_data
from krul_sglang.runtime.exact import LOSSY_TOKENS, RECOMPUTED, demands_exact
from krul_sglang.runtime.pool import PoolView
from krul_sglang.runtime.state import Counters, Metrics
from krul_sglang.store.memory import MemoryStore
from krul_sglang.store.segment import RECORD_BYTES, SLOT_BYTES, Segment, SegmentState
from krul_sglang.store.slots import slot_runs
from krul_sglang.strategy.base import EXACT, Strategy

logger = logging.getLogger(__name__)

# Longest run that becomes one segment: bounds staging and lets loads run in parallel.
SEGMENT_TOKENS = 1024
# The first tokens of a sequence draw attention from everywhere (attention sinks), so
# errors in them cost most and their bytes least: they stay exact.
SINK_TOKENS = 4
# How long an eviction waits for the encoder before it drops the victim instead.
STAGING_WAIT_SECONDS = 5.0


@dataclass
class Krul:
    """What one rank's cache works with."""

    config: KrulConfig
    pool: PoolView
    store: MemoryStore
    loader: Loader
    lossy: Strategy | None
    """Strategy of what only one conversation can reach; None stores everything exactly."""
    turn_ends: frozenset[int]
    """Token ids that end a turn: what comes before the first one may be shared later."""
    counters: Counters
    metrics: Metrics | None = None


class KrulRadixCache(UnifiedRadixCache):
    """The ``krul`` radix cache backend. Scheduler thread only, like its base."""

    def __init__(self, params: Any, krul: Krul) -> None:
        self.krul = krul
        self.inserting_exact = False
        super().__init__(params)
        self.tree_core.set_hicache_enabled()
        self.tree_core.is_write_back = True
        self.load_back_threshold = 1

    # ---- life cycle ------------------------------------------------------------

    def reset(self) -> None:
        """Flush: the tree and every stored segment."""
        super().reset()
        self.krul.store.clear()
        self._publish()

    def release_host_resources(self) -> None:
        """Shut down: stop the threads, free host memory."""
        super().release_host_resources()
        self.krul.loader.close()
        self.krul.store.close()

    def _publish(self) -> None:
        if self.krul.metrics is not None:
            self.krul.metrics.publish(self)

    # ---- agreement between ranks -----------------------------------------------

    def _agree(self, values: list[int], op: Any = torch.distributed.ReduceOp.MAX) -> list[int]:
        """The same numbers on every rank of the cache group (MAX unless told)."""
        if self.tp_world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.int64)
        self._all_reduce_attn_groups(tensor, op)
        return tensor.tolist()

    # ---- walking the tree ------------------------------------------------------

    def _path(self, node_id: int) -> Iterator[Any]:
        """Nodes from ``node_id`` up to, not including, the root."""
        node = self.tree_core.node_by_id(node_id)
        while node is not self.tree_core.root_node:
            yield node
            node = node.parent

    def _segments_of(self, node: Any) -> Iterator[Segment]:
        ids = full_data(node).host_value
        if ids is None:
            return
        for run in slot_runs(ids):
            segment = self.krul.store.get(run.segment)
            if segment is not None:
                yield segment

    def is_lossy(self, node: Any) -> bool:
        """Whether a request that is served from this node gets KV that is not exact."""
        data = full_data(node)
        if data.metadata.get(LOSSY):
            return True
        return data.value is None and any(not segment.exact for segment in self._segments_of(node))

    def _is_lost(self, node: Any) -> bool:
        return node.evicted and any(
            segment.state is SegmentState.LOST for segment in self._segments_of(node)
        )

    def forget_stored(self, node: Any) -> None:
        """Drop a device-resident node's stored copy, so that its next eviction stores it anew."""
        data = full_data(node)
        assert data.value is not None, "only a device-resident node can forget its stored copy"
        if data.host_value is None:
            return
        ids, data.host_value = data.host_value, None
        self.krul.store.release(ids)
        self.tree_core.kv_events.record_remove(node, medium=StorageMedium.CPU)
        self.tree_core._update_evictable_leaf_sets(node)
        self.tree_core._update_duplicate_tracking(node)

    # ---- matching --------------------------------------------------------------

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """Stock match, cut above what this request cannot use."""
        result = super().match_prefix(params)
        if not isinstance(result.best_match_node, int) or self.disable:
            return result  # a session's own match
        usable = self._usable_length(params.req, result)
        matched = result.device_prefix_len + result.host_hit_length
        if usable < matched:
            result = super().match_prefix(replace(params, key=params.key[:usable]))
        if params.req is not None:
            self._note_match(params.req, result, matched)
        return result

    def _usable_length(self, req: Any, result: MatchResult) -> int:
        """How many matched tokens this request may be served from, in whole pages."""
        device = result.device_prefix_len
        usable = matched = device + result.host_hit_length
        fraction = self.krul.config.recompute_fraction
        if fraction and result.host_hit_length:
            usable = device + int(result.host_hit_length * (1 - fraction))
        exact = self.krul.lossy is not None and demands_exact(req)
        if exact or self.krul.store.lost_count:
            end = matched
            for node in self._path(result.best_match_node):
                begin = end - len(node.key)
                if (exact and self.is_lossy(node)) or self._is_lost(node):
                    usable = min(usable, begin)
                end = begin
        return usable // self.page_size * self.page_size

    def _note_match(self, req: Any, result: MatchResult, matched: int) -> None:
        served = result.device_prefix_len + result.host_hit_length
        setattr(req, RECOMPUTED, max(0, matched - served))
        if self.krul.lossy is not None:
            lossy = sum(len(n.key) for n in self._path(result.best_match_node) if self.is_lossy(n))
            if not req.output_ids:
                setattr(req, LOSSY_TOKENS, lossy)

    # ---- inserting -------------------------------------------------------------

    def checkpoint_into_tree(self, req: Any, *, up_to: int, **kwargs: Any) -> None:
        """Stock insert of a request's KV, keeping exactness a property of its nodes."""
        recomputed = getattr(req, RECOMPUTED, 0)
        if recomputed:
            setattr(req, RECOMPUTED, 0)
            self.krul.counters.recomputed_tokens += recomputed
            self.krul.counters.misses += 1
        if self.krul.lossy is None:
            super().checkpoint_into_tree(req, up_to=up_to, **kwargs)
            return
        exact = getattr(req, LOSSY_TOKENS, 0) == 0
        if exact and demands_exact(req) and self._shares_lossy_in_use(req, up_to):
            # The tree would hand this request the rows of a lossy node that another
            # request is reading; it keeps its own rows instead and caches nothing.
            req.skip_radix_cache_insert = True
            return
        self.inserting_exact = exact
        try:
            super().checkpoint_into_tree(req, up_to=up_to, **kwargs)
        finally:
            self.inserting_exact = False

    def _shares_lossy_in_use(self, req: Any, up_to: int) -> bool:
        from sglang.srt.mem_cache.radix_cache import RadixKey

        key = RadixKey(
            req.full_untruncated_fill_ids[:up_to], req.extra_key, cache_salt=req.cache_salt
        )
        found = self.tree_core.match_prefix(MatchPrefixParams(key=key))
        self._apply_cache_actions(found.cache_actions)
        return any(
            not node.evicted and full_data(node).lock_ref > 0 and self.is_lossy(node)
            for node in self._path(found.best_match_node)
        )

    def insert(self, params: InsertParams) -> InsertResult:
        """Stock insert; afterwards the marks of the nodes it wrote are brought up to date."""
        krul = self.krul
        if self.disable or (krul.lossy is None and not krul.store.lost_count):
            return super().insert(params)
        result = super().insert(replace(params, track_adopted_ranges=True))
        adopted = (result.adopted_ranges or {}).get(ComponentType.FULL, ())
        if not isinstance(result.last_device_node, int):
            return result
        tainted, begin = False, 0
        for node in reversed(list(self._path(result.last_device_node))):
            fresh = any(lo <= begin < hi for lo, hi in adopted)
            begin += len(node.key)
            data = full_data(node)
            if fresh:
                # Computed just now: as exact as the prefix it was computed on.
                if tainted:
                    data.metadata[LOSSY] = True
                else:
                    data.metadata.pop(LOSSY, None)
                if any(s.state is SegmentState.LOST for s in self._segments_of(node)):
                    self.forget_stored(node)
            tainted = tainted or self.is_lossy(node)
        return result

    # ---- evicting --------------------------------------------------------------

    def _evict(self, params: EvictParams, *args: Any, **kwargs: Any) -> EvictResult:
        began = time.perf_counter()
        result = super()._evict(params, *args, **kwargs)
        self.krul.counters.evict_seconds += time.perf_counter() - began
        self._publish()
        return result

    def _execute_and_commit_kv_backup(self, action: Any, write_back: bool = False) -> int:
        """Back nodes up; returns the last one's tokens, 0 as soon as one fails."""
        written = 0
        for node_id in action.node_ids:
            rows, _ = self.tree_core.build_backup_spec(node_id)
            if rows.numel() == 0:  # its stored original still exists: never encoded again
                continue
            node = self.tree_core.node_by_id(node_id)
            ids = self._store_node(node, rows)
            if ids is None:
                self.krul.counters.dropped_tokens += rows.numel()
                return 0
            self.tree_core.commit_backup(node_id, ids, {})
            # Stock publishes this when a transfer is acknowledged; ours is already complete.
            self.tree_core.kv_events.record_store(node, medium=StorageMedium.CPU)
            self.krul.counters.evicted_tokens += rows.numel()
            written = rows.numel()
        return written

    def _store_node(self, node: Any, rows: torch.Tensor) -> torch.Tensor | None:
        """Gather and stage a node's rows; its slot ids, or None when there is no room."""
        store, pool = self.krul.store, self.krul.pool
        start = sum(len(n.key) for n in self._path(node.parent.id))
        head = self._exact_head(node, start)
        ids: list[torch.Tensor] = []
        for lo, hi, strategy in self._pieces(rows.numel(), head):
            nbytes = (hi - lo) * pool.spec.token_bytes
            if not self._make_room(nbytes, hi - lo):
                for held in ids:
                    store.release(held)
                return None
            run = pool.gather(rows[lo:hi], start + lo)
            exact = strategy is EXACT and not full_data(node).metadata.get(LOSSY)
            _, piece = store.stage(run, strategy, exact)
            ids.append(piece)
        return torch.cat(ids)

    def _pieces(self, tokens: int, head: int) -> Iterator[tuple[int, int, Strategy]]:
        """Cut a node into segments: its exact head, then the rest."""
        lossy = self.krul.lossy or EXACT
        for begin, end, strategy in ((0, head, EXACT), (head, tokens, lossy)):
            for lo in range(begin, end, SEGMENT_TOKENS):
                yield lo, min(lo + SEGMENT_TOKENS, end), strategy

    def _exact_head(self, node: Any, start: int) -> int:
        """How many of the node's first tokens stay exact because others may share them.

        Everything above a branch is shared already. A conversation's opening up to
        its first end of turn (a system prompt) may be shared by the next one.
        """
        tokens = len(node.key)
        if self.krul.lossy is None or self._is_above_branch(node):
            return tokens
        head = max(0, SINK_TOKENS - start, self._opening(node))
        return min(tokens, -(-head // self.page_size) * self.page_size)

    def _opening(self, node: Any) -> int:
        """How many of the node's tokens precede the end of the conversation's first turn."""
        ends = self.krul.turn_ends
        for above in self._path(node.parent.id):
            if not ends.isdisjoint(above.key.token_ids[: len(above.key)]):
                return 0
        for offset, token in enumerate(node.key.token_ids[: len(node.key)]):
            if token in ends:
                return offset + 1
        return 0

    @staticmethod
    def _is_above_branch(node: Any) -> bool:
        while len(node.children) == 1:
            node = next(iter(node.children.values()))
        return len(node.children) > 1

    def _make_room(self, nbytes: int, tokens: int) -> bool:
        """Fit ``nbytes`` of raw staging under the budget; the same answer on every rank.

        Waits for the encoder first (raw is several times the sealed size), then asks
        the tree to let stored leaves go, oldest first.
        """
        store = self.krul.store
        needed = nbytes + tokens * SLOT_BYTES + RECORD_BYTES
        if self._agree([needed - store.ledger.limit])[0] > 0:
            return False
        fits = store.wait_for_staging(nbytes, STAGING_WAIT_SECONDS)
        if self._agree([not fits])[0]:
            logger.warning("krul: the encoder does not keep up; a conversation was dropped")
            return False
        waited = False
        while self._agree([store.ledger.used + needed - store.ledger.limit])[0] > 0:
            if not waited:
                store.wait_sealed(STAGING_WAIT_SECONDS)
                waited = True
                continue
            if self.evict_host(max(tokens, self.page_size)) == 0:
                return False
        return True

    def evict_host(
        self, num_tokens: int, component_type: ComponentType = ComponentType.FULL
    ) -> int:
        """Let stored leaves go. Stored originals of device-resident nodes go last:
        encoding a lossy node a second time would lose quality."""
        with envs.SGLANG_HICACHE_SKIP_HOST_DUPLICATE_RECLAIM.override(True):
            freed = super().evict_host(num_tokens, component_type)
        if freed == 0:
            freed = super().evict_host(num_tokens, component_type)
        return freed

    # ---- restoring -------------------------------------------------------------

    def load_back(self, node_id: int, mem_quota: int | None = None, req: Any = None) -> bool:
        """Restore the evicted part of the path to ``node_id``; all of it or nothing."""
        host_lock = self.inc_host_lock_ref(node_id).to_dec_params()
        device_lock = self.inc_lock_ref(node_id)
        try:
            return self._load_back_locked(node_id, mem_quota, req, device_lock.delta)
        finally:
            self.dec_lock_ref(node_id, device_lock.to_dec_params())
            self.dec_host_lock_ref(node_id, host_lock)
            self._publish()

    def _load_back_locked(
        self, node_id: int, mem_quota: int | None, req: Any, locked_tokens: int
    ) -> bool:
        began = time.perf_counter()
        transfer, _ = self.tree_core.build_load_back_spec(node_id, req=req)
        tokens = transfer.host_indices.numel()
        if tokens == 0 or (mem_quota is not None and tokens + locked_tokens > mem_quota):
            return False
        allocator = self.token_to_kv_pool_allocator
        shortfall = tokens - allocator.available_size()
        if shortfall > 0:
            self.evict_for_alloc(EvictParams(num_tokens=shortfall))
        rows = allocator.alloc(tokens)
        if rows is None:
            return False
        if not self._load_rows(transfer.host_indices, rows):
            allocator.free(rows)
            self._forget_lost(node_id)
            if req is not None:
                self._note_failed_load(req, tokens)
            return False
        nodes = [self.tree_core.node_by_id(nid) for nid in transfer.nodes_to_load]
        for node in nodes:
            if self.is_lossy(node):
                full_data(node).metadata[LOSSY] = True
        self._apply_cache_actions(
            self.tree_core.commit_load_back(node_id, rows.to(torch.int64), transfer, {})
        )
        self.tree_core.finish_load_back(node_id)
        counters = self.krul.counters
        counters.restored_tokens += tokens
        counters.restores += 1
        counters.restore_seconds += time.perf_counter() - began
        return True

    def _load_rows(self, ids: torch.Tensor, rows: torch.Tensor) -> bool:
        """Fill pool rows from the store; the same answer on every rank. What any rank
        could not read is lost on all of them."""
        runs = slot_runs(ids)
        outcome = self.krul.loader.load(runs, self.krul.pool.writer(rows))
        lost = self._agree([int(run.segment in outcome.lost) for run in runs])
        for run, is_lost in zip(runs, lost, strict=True):
            if is_lost:
                logger.warning("krul: segment %d is damaged; recomputing it", run.segment)
                self.krul.store.mark_lost(run.segment)
        return not any(lost)

    def _forget_lost(self, node_id: int) -> None:
        # A node above, still on the device, may share the segment since a split: evicted
        # with that copy it would be thrown away, so let it be stored anew.
        for node in self._path(node_id):
            if not node.evicted and any(
                segment.state is SegmentState.LOST for segment in self._segments_of(node)
            ):
                self.forget_stored(node)

    def _note_failed_load(self, req: Any, tokens: int) -> None:
        setattr(req, RECOMPUTED, getattr(req, RECOMPUTED, 0) + tokens)
        if self.krul.lossy is not None and not req.output_ids:
            lossy = sum(len(n.key) for n in self._path(req.last_node) if self.is_lossy(n))
            setattr(req, LOSSY_TOKENS, lossy)
