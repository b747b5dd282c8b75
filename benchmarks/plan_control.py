"""Lets benchmarks/plan_choice.py steer a running server's planner, and look over its shoulder.

A plugin that the server under measurement loads (:mod:`server_plugin` brings it into its
processes); it is no part of the package. The file named by ``PLAN_CONTROL_FILE`` holds an
:class:`Order`; the next /server_info obeys it and removes it, then tells in ``plan_control``
what was planned and computed since.

Only the decision is replaced. A forced load goes through the same tree, link and pipeline as
one that the planner chose.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ORDER_FILE = "PLAN_CONTROL_FILE"
"""Name of the environment variable: where orders are put."""
STATE = "plan_control"
"""What the scheduler's internal state calls the plugin's part."""


@dataclass(frozen=True)
class Order:
    """Everything that holds from now on.

    bandwidth: bytes a second of the link. relearn: the planner forgets what it knows of the
    link and begins with its configured rate, as a server that has just started with it. load:
    position up to which requests load, None for the planner's choice. teach: whether the cost
    model learns from what follows. points: positions whose expected end is noted with every
    plan. evict: everything leaves the device now, as it does when the pool is full.
    """

    bandwidth: float
    relearn: bool = False
    load: int | None = None
    teach: bool = True
    points: Sequence[int] = ()
    evict: bool = True

    def put(self, path: Path) -> None:
        """Leave it for the server, which finds all of it or nothing."""
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(asdict(self)))
        draft.replace(path)


class Control:
    """Stands between one scheduler's cache and its planner. Scheduler thread only."""

    def __init__(self, cache: Any) -> None:
        restores, compute = cache.restores, cache.krul.planner.compute
        self._cache = cache
        self._load: int | None = None
        self._teach = True
        self._points: Sequence[int] = ()
        self._noted: dict[str, Any] = {}
        self._pass_seconds: list[float] = []
        self._plan, self._learn = restores.plans.plan, restores._learn
        self._observe, self._observe_outside = compute.observe, compute.observe_outside
        restores.plans.plan, restores._learn = self.plan, self.learn
        compute.observe, compute.observe_outside = self.observe, self.observe_outside
        # Forced to load little, restores would have the rest of histories not stored any more.
        restores.plans.boundary._shares = deque(maxlen=0)

    def obey(self, order: dict[str, Any]) -> None:
        """Do what an :class:`Order` says."""
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        from krul_sglang.restore.cost import Rate

        krul = self._cache.krul
        krul.loader._pipeline.links["memory"].bandwidth = order["bandwidth"]
        if order["relearn"]:
            krul.planner.load.links["memory"] = Rate(1 / order["bandwidth"])
        self._load, self._teach = order["load"], order["teach"]
        self._points = order["points"]
        self._noted, self._pass_seconds = {}, []
        if order["evict"]:
            self._cache.evict(EvictParams(num_tokens=self._cache.evictable_size()))

    def state(self) -> dict[str, Any]:
        """The first plan since the last order (empty if none was made), and seconds of the
        forward passes since then, waiting not counted."""
        return {"plan": self._noted, "pass_seconds": self._pass_seconds}

    def plan(self, device: int, ids: Any, total: int) -> int:
        """Instead of ``Plans.plan``."""
        import numpy as np

        from krul_sglang.restore.planner import Turn

        plans, planner = self._cache.restores.plans, self._cache.krul.planner
        turn = Turn(device, plans.stored_runs(ids), total - device - ids.numel())
        if not self._noted:
            own = planner.plan(turn)
            points = [p for p in self._points if device <= p <= turn.end]
            curve = planner.ends(turn, np.array(points))[0].tolist() if points else []
            self._noted = {
                "load": own.load,
                "seconds": own.seconds,
                "stored_bytes": sum(run.nbytes for run in turn.stored),
                "expected": [list(pair) for pair in zip(points, curve, strict=True)],
            }
        if self._load is None:
            return self._plan(device, ids, total)
        return max(device, min(turn.end, self._load))

    def learn(self, pending: Any, trace: Any) -> None:
        """Instead of ``Restores._learn``: what loading has cost."""
        if self._teach:
            self._learn(pending, trace)

    def observe(self, prefill: Any, seconds: float, decoding: float) -> None:
        """Instead of ``ComputeCost.observe``: what a forward pass has cost."""
        self._pass_seconds.append(seconds)
        if self._teach:
            self._observe(prefill, seconds, decoding)

    def observe_outside(self, seconds: float) -> None:
        """Instead of ``ComputeCost.observe_outside``."""
        if self._teach:
            self._observe_outside(seconds)


def _control_of(controller: Any) -> Control | None:
    cache = getattr(controller.scheduler, "tree_cache", None)
    if not hasattr(cache, "restores"):
        return None
    if not hasattr(cache, STATE):
        setattr(cache, STATE, Control(cache))
    return getattr(cache, STATE)


def obey(controller: Any, recv_req: Any) -> None:
    """BEFORE ``get_internal_state``."""
    control, path = _control_of(controller), Path(os.environ.get(ORDER_FILE, "/nonexistent"))
    if control is not None and path.exists():
        control.obey(json.loads(path.read_text()))
        path.unlink()


def tell(result: Any, controller: Any, recv_req: Any) -> Any:
    """AFTER ``get_internal_state``."""
    control = _control_of(controller)
    if control is not None:
        result.internal_state[STATE] = control.state()
    return result


def register() -> None:
    """The entry point SGLang calls in every process."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target = (
        "sglang.srt.managers.scheduler_components.internal_state."
        "SchedulerInternalStateController.get_internal_state"
    )
    HookRegistry.register(target, obey, HookType.BEFORE)
    HookRegistry.register(target, tell, HookType.AFTER)
