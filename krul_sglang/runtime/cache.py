"""KrulRadixCache: SGLang's prefix tree with Krul's store behind its host side.

The stock tree runs in write-back mode: a node that leaves the device keeps slot
ids in its host side and stays in the tree, matches again, and is loaded when a
request needs it. Krul supplies the three things a host pool would: backing a node
up (:meth:`_execute_and_commit_kv_backup`), loading a path back (:meth:`load_back`)
and letting go (:class:`KrulFullComponent`). The tree owns residency throughout.
"""

from __future__ import annotations

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
from krul_sglang.profile.base import Profile
from krul_sglang.restore.load import Loader
from krul_sglang.restore.planner import Planner
from krul_sglang.runtime import (
    admission,
    adoption,
    backup,
    leading,
    loading,
    marks,
    missing,
    selection,
    truncation,
)
from krul_sglang.runtime.access import AccessClock
from krul_sglang.runtime.exact import LOSSY_TOKENS, MISSED, RECOMPUTED, demands_exact
from krul_sglang.runtime.journal import Journal
from krul_sglang.runtime.marks import full_data
from krul_sglang.runtime.metrics import Metrics
from krul_sglang.runtime.pool import PoolView
from krul_sglang.runtime.pulling import Pulls
from krul_sglang.runtime.restoring import LIMIT, Restores
from krul_sglang.runtime.state import Counters
from krul_sglang.runtime.taps import Taps
from krul_sglang.store.memory import MemoryStore
from krul_sglang.strategy.base import Selector


@dataclass
class Krul:
    """What one rank's cache works with."""

    config: KrulConfig
    pool: PoolView
    store: MemoryStore
    loader: Loader
    planner: Planner
    selector: Selector | None
    """Chooses how what only one conversation can reach is stored; None stores it exactly."""
    turn_ends: frozenset[int]
    """Token ids that end a turn: what comes before the first one may be shared later."""
    counters: Counters
    metrics: Metrics | None = None
    taps: Taps | None = None
    """Where queries are kept; None measures no attention."""
    profile: Profile | None = None
    """What the policy's codec works from, where it needs one."""


class KrulRadixCache(UnifiedRadixCache):
    """The ``krul`` radix cache backend. Scheduler thread only, like its base."""

    def __init__(self, params: Any, krul: Krul, overlapped: bool = False) -> None:
        """overlapped: whether the scheduler's hooks (:mod:`.stepping`) are in place, so that
        loads may go on while the forward pass runs."""
        self.krul = krul
        self.inserting_exact = False
        self.clock = AccessClock()
        self.journal = Journal(krul.store, krul.counters)
        self.restores = Restores(self, overlapped)
        self.pulls = Pulls(self)
        super().__init__(params)
        self.tree_core.set_hicache_enabled()
        self.tree_core.is_write_back = True
        self.load_back_threshold = 1

    # ---- life cycle ------------------------------------------------------------

    def reset(self) -> None:
        """Flush: the tree and every stored segment."""
        self.restores.abandon()
        self.pulls.drop_all()
        super().reset()
        self.krul.store.clear()
        self.publish()

    def release_host_resources(self) -> None:
        """Shut down: stop the threads, free host memory."""
        self.restores.abandon()
        self.pulls.drop_all()
        super().release_host_resources()
        self.krul.loader.close()
        self.krul.store.close()

    def publish(self) -> None:
        """Have the metrics brought up to date soon (:meth:`between_steps`)."""
        if self.krul.metrics is not None:
            self.krul.metrics.touch()

    def between_steps(self) -> None:
        """The scheduler is about to form its next batch: tell what is due to be told."""
        self.journal.step()
        if self.krul.metrics is not None:
            self.krul.metrics.step(self)

    # ---- agreement between ranks -----------------------------------------------

    def agree(self, values: list[int]) -> list[int]:
        """The largest of each number over the ranks of the cache group, the same on all."""
        if self.tp_world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.int64)
        self._all_reduce_attn_groups(tensor, torch.distributed.ReduceOp.MAX)
        return tensor.tolist()

    # ---- walking the tree ------------------------------------------------------

    def path(self, node_id: int) -> Iterator[Any]:
        """Nodes from ``node_id`` up to, not including, the root."""
        node = self.tree_core.node_by_id(node_id)
        while node is not self.tree_core.root_node:
            yield node
            node = node.parent

    def forget_stored(self, node: Any) -> None:
        """Drop a device-resident node's stored copy, so that its next eviction stores it anew."""
        data = full_data(node)
        assert data.value is not None, "only a device-resident node can forget its stored copy"
        if data.host_value is None:
            return
        ids, data.host_value = data.host_value, None
        marks.forget_stored(node)
        self.krul.store.release(ids)
        self.tree_core.kv_events.record_remove(node, medium=StorageMedium.CPU)
        self.tree_core._update_evictable_leaf_sets(node)
        self.tree_core._update_duplicate_tracking(node)

    # ---- matching --------------------------------------------------------------

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """Stock match, cut above what this request cannot use."""
        self.clock.note()
        result = super().match_prefix(params)
        if not isinstance(result.best_match_node, int) or self.disable:
            return result  # a session's own match
        if adoption.adopt(
            self,
            params.req,
            params.key,
            result.best_match_node,
            result.device_prefix_len + result.host_hit_length,
        ):
            result = super().match_prefix(params)
        matched = result.device_prefix_len + result.host_hit_length
        self.pulls.note(params.key, result.best_match_node, matched)
        admission.note(self, params.req, result)
        missing.lose_gone(self, params.req, result.best_match_node)
        usable = self._usable_length(params.req, result)
        if usable < matched:
            result = super().match_prefix(replace(params, key=params.key[:usable]))
        if params.req is not None:
            self._note_match(params.req, result, matched)
        return result

    def is_exact(self, req: Any) -> bool:
        """Whether a request demands exact KV where some may be lossy."""
        return self.krul.selector is not None and demands_exact(req)

    def _usable_length(self, req: Any, result: MatchResult) -> int:
        """How many matched tokens this request may be served from, in whole pages."""
        device = result.device_prefix_len
        matched = device + result.host_hit_length
        usable = self.restores.plans.wanted_length(req, result)
        limit = getattr(req, LIMIT, matched)
        exact, missed = self.is_exact(req), False
        if exact or self.krul.store.lost_count:
            end, planned = matched, usable
            for node in self.path(result.best_match_node):
                begin = end - len(node.key)
                if exact and marks.is_lossy(node):
                    usable = min(usable, begin + marks.exact_tokens(node))
                if node.evicted and missing.has_lost(self, node):
                    usable = min(usable, begin)
                end = begin
            missed = usable < planned
        if limit < usable:
            usable, missed = limit, True
        if req is not None:
            setattr(req, MISSED, missed)
        return usable // self.page_size * self.page_size

    def _note_match(self, req: Any, result: MatchResult, matched: int) -> None:
        served = result.device_prefix_len + result.host_hit_length
        setattr(req, RECOMPUTED, max(0, matched - served))
        self._note_lossy(req, result.best_match_node)

    def _note_lossy(self, req: Any, node_id: int) -> None:
        if self.krul.selector is not None and not req.output_ids:
            path = self.path(node_id)
            setattr(req, LOSSY_TOKENS, sum(map(marks.lossy_tokens, path)))

    # ---- inserting -------------------------------------------------------------

    def checkpoint_into_tree(self, req: Any, *, up_to: int, **kwargs: Any) -> None:
        """Stock insert of a request's KV, keeping exactness a property of its nodes."""
        recomputed = getattr(req, RECOMPUTED, 0)
        if recomputed:
            setattr(req, RECOMPUTED, 0)
            self.krul.counters.recomputed_tokens += recomputed
            self.krul.counters.misses += getattr(req, MISSED, False)
        self.restores.plans.decided(req)
        self._checkpoint(req, up_to, **kwargs)
        if req.finished():
            truncation.cut(self, req)
            admission.admit(self, req)

    def _checkpoint(self, req: Any, up_to: int, **kwargs: Any) -> None:
        if self.krul.selector is None:
            super().checkpoint_into_tree(req, up_to=up_to, **kwargs)
            return
        exact = getattr(req, LOSSY_TOKENS, 0) == 0
        if exact and demands_exact(req) and self._shares_lossy_in_use(req, up_to):
            # The tree would hand this request the rows of a lossy node that another
            # request is reading; it keeps its own rows instead and caches nothing.
            req.skip_radix_cache_insert = True
            return
        measured = selection.measure(self, req, up_to)
        self.inserting_exact = exact
        try:
            super().checkpoint_into_tree(req, up_to=up_to, **kwargs)
        finally:
            self.inserting_exact = False
        selection.tag(self, req, measured, up_to)

    def on_release(self, req: Any, *, checkpointed: bool) -> None:
        """The request is over, aborted or not: its queries are no longer kept."""
        super().on_release(req, checkpointed=checkpointed)
        if self.krul.taps is not None:
            self.krul.taps.release(req.rid)

    def _shares_lossy_in_use(self, req: Any, up_to: int) -> bool:
        from sglang.srt.mem_cache.radix_cache import RadixKey

        key = RadixKey(
            req.full_untruncated_fill_ids[:up_to], req.extra_key, cache_salt=req.cache_salt
        )
        found = self.tree_core.match_prefix(MatchPrefixParams(key=key))
        self._apply_cache_actions(found.cache_actions)
        return any(
            not node.evicted and full_data(node).lock_ref > 0 and marks.is_lossy(node)
            for node in self.path(found.best_match_node)
        )

    def insert(self, params: InsertParams) -> InsertResult:
        """Stock insert; afterwards the marks of the nodes it wrote are brought up to date."""
        self.clock.note()
        krul = self.krul
        if self.disable or (krul.selector is None and not krul.store.lost_count):
            return super().insert(params)
        result = super().insert(replace(params, track_adopted_ranges=True))
        adopted = (result.adopted_ranges or {}).get(ComponentType.FULL, ())
        if not isinstance(result.last_device_node, int):
            return result
        tainted, begin = False, 0
        for node in reversed(list(self.path(result.last_device_node))):
            fresh = any(lo <= begin < hi for lo, hi in adopted)
            begin += len(node.key)
            if fresh:
                # Computed just now: as exact as the prefix it was computed on.
                marks.mark_computed(node, exact=not tainted)
                if missing.has_lost(self, node):
                    self.forget_stored(node)
            tainted = tainted or marks.is_lossy(node)
        return result

    # ---- evicting --------------------------------------------------------------

    def _evict(self, params: EvictParams, *args: Any, **kwargs: Any) -> EvictResult:
        self.restores.guard()
        began = time.perf_counter()
        with self.krul.store.held_back():  # it would take the cores that gather
            result = super()._evict(params, *args, **kwargs)
        seconds = time.perf_counter() - began
        self.krul.counters.evict_seconds += seconds
        self.journal.evicted(seconds)
        self.publish()
        return result

    def _evict_device_leaf(self, node_id: int, tracker: dict) -> Any:
        """Stock, but a node that is not worth storing leaves the tree instead."""
        node = self.tree_core.node_by_id(node_id)
        if not marks.is_unwanted(node) or node.backuped or node.children:
            return super()._evict_device_leaf(node_id, tracker)
        self.krul.counters.unstored_tokens += len(node.key)
        result = self.tree_core.evict_device_leaf(node_id, False)
        self._apply_eviction_result(result)
        self._accumulate_tracker(tracker, result.tracker)
        return result.backup_kv

    def _execute_and_commit_kv_backup(self, action: Any, write_back: bool = False) -> int:
        """Back nodes up; returns the last one's tokens, 0 as soon as one fails."""
        written = 0
        for node_id in action.node_ids:
            rows, _ = self.tree_core.build_backup_spec(node_id)
            if rows.numel() == 0:  # its stored original still exists: never encoded again
                continue
            node = self.tree_core.node_by_id(node_id)
            if admission.is_admitted(self, node):
                leading.store_above(self, node)
            ids = backup.store_node(self, node, rows)
            if ids is None:
                self.krul.counters.dropped_tokens += rows.numel()
                return 0
            self.tree_core.commit_backup(node_id, ids, {})
            # Stock publishes this when a transfer is acknowledged; ours is already complete.
            self.tree_core.kv_events.record_store(node, medium=StorageMedium.CPU)
            self.krul.counters.evicted_tokens += rows.numel()
            self.journal.stored(ids)
            written = rows.numel()
        return written

    def _drop_subtree_no_host(self, node_id: int, tracker: dict) -> bool:
        """Stock drop of a node that found no room; what was stored below it goes too."""
        stored, stack = 0, list(self.tree_core.node_by_id(node_id).children.values())
        while stack:
            node = stack.pop()
            stored += len(node.key)
            stack.extend(node.children.values())
        dropped = super()._drop_subtree_no_host(node_id, tracker)
        if dropped:
            self.krul.counters.dropped_tokens += stored
        return dropped

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
            loaded = loading.load(self, node_id, mem_quota, req, device_lock.delta)
            if not loaded and req is not None:
                self._note_lossy(req, req.last_node)
            return loaded
        finally:
            self.dec_lock_ref(node_id, device_lock.to_dec_params())
            self.dec_host_lock_ref(node_id, host_lock)
            self.publish()
