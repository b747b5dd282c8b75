"""How much of a match a request takes: asked of the planner once, kept until it is admitted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from krul_sglang.restore.boundary import Boundary
from krul_sglang.restore.load import RAW
from krul_sglang.restore.pipeline import MEMORY
from krul_sglang.restore.planner import Plan, StoredRun, Turn
from krul_sglang.runtime import truncation
from krul_sglang.runtime.marks import full_data
from krul_sglang.store.slots import slot_runs

if TYPE_CHECKING:
    from sglang.srt.mem_cache.base_prefix_cache import MatchResult

    from krul_sglang.runtime.cache import KrulRadixCache

# Set on a request until it is admitted: what it is to take from the tree (truncation.Planned).
PLAN = "krul_plan"


class Plans:
    """One rank's plans, the same on every rank. Scheduler thread only."""

    def __init__(self, cache: KrulRadixCache) -> None:
        self._cache = cache
        self._krul = cache.krul
        self.boundary = Boundary()

    def stored_runs(self, ids: torch.Tensor) -> list[StoredRun]:
        """What the planner needs to know of slot ids, int64 ``[n]``."""
        runs = []
        for run in slot_runs(ids):
            segment = self._krul.store.get(run.segment)
            whole = 0 if segment is None else segment.stored_bytes or segment.raw_bytes
            codec = RAW if segment is None else segment.codec or RAW
            tokens = 1 if segment is None else segment.tokens
            tier = "disk" if segment is not None and segment.is_on_disk_only else MEMORY
            by_layer = None if segment is None else segment.layer_bytes
            nbytes = whole * run.tokens // tokens
            runs.append(StoredRun(run.tokens, nbytes, codec, tier, by_layer))
        return runs

    def wanted_length(self, req: Any, result: MatchResult) -> int:
        """How much of a match is worth taking, the rest being computed sooner."""
        device, stored = result.device_prefix_len, result.host_hit_length
        fraction = self._krul.config.recompute_fraction
        end = device + stored
        if not stored or (fraction is None and req is None):
            return end
        last = self._cache.tree_core.node_by_id(result.best_match_node)
        history = truncation.history_of(last, end)
        if fraction is not None:
            return min(end, device + int((history - device) * (1 - fraction)))
        if not hasattr(req, PLAN):
            nodes = [node for node in self._cache.path(last.id) if node.evicted]
            ids = torch.cat([full_data(node).host_value for node in reversed(nodes)])
            load = self.plan(device, ids, len(req.full_untruncated_fill_ids))
            setattr(req, PLAN, truncation.Planned(load, end, history))
        return max(device, min(end, getattr(req, PLAN).load))

    def plan(self, device: int, ids: torch.Tensor, total: int) -> int:
        """How many leading tokens of a request are best taken from the tree; the same on all
        ranks. ids: slot ids behind the ``device`` tokens; total: tokens of the request."""
        turn = Turn(device, self.stored_runs(ids), total - device - ids.numel())
        (load,) = self._cache.agree([self._krul.planner.plan(turn).load])
        if load == device:
            for tier in {run.tier for run in turn.stored} & self._krul.planner.load.links.keys():
                self._krul.planner.load.links[tier].hope()
        return load

    def expected(self, device: int, ids: torch.Tensor, new: int) -> Plan:
        """What loading all of ``ids`` is expected to take."""
        return self._krul.planner.load_all(Turn(device, self.stored_runs(ids), new))

    def decided(self, req: Any) -> None:
        """The request was admitted with what was planned for it, if anything."""
        planned = req.__dict__.pop(PLAN, None)
        if planned is not None:
            self.boundary.observe(planned.load, planned.stored, planned.history)
