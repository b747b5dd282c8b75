"""Loads under way: a forward pass waits for them layer by layer, and is never fooled.

Nodes join the tree when their load begins. Until :meth:`Restores.settle`, which follows the
forward pass that needs them, no one else reads their rows: the pass itself waits in the
pool's layer counter, an eviction waits in :meth:`Restores.guard`. What could not be loaded
leaves the device again, and the requests that read it start anew (:mod:`.stepping`).
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from krul_sglang.restore.cost import Rate
from krul_sglang.restore.planner import Plan
from krul_sglang.restore.trace import LoadTrace, RestoreTrace, covered
from krul_sglang.runtime import missing
from krul_sglang.runtime.exact import RECOMPUTED
from krul_sglang.runtime.marks import full_data
from krul_sglang.runtime.planning import Plans
from krul_sglang.runtime.prefetching import Prefetches, Staging
from krul_sglang.store.slots import SlotRun, slot_runs

if TYPE_CHECKING:
    from krul_sglang.restore.load import Opened
    from krul_sglang.restore.pipeline import Load, Sink
    from krul_sglang.runtime.cache import KrulRadixCache

logger = logging.getLogger(__name__)

PATIENCE = 10.0
"""A load that takes this many times longer than expected, and this many seconds more, is
given up: its tokens are computed instead."""
TRACES = 64
"""Restores whose traces are kept."""

# Set on a request: how many leading tokens it may take from the tree, after a load failed.
LIMIT = "krul_limit"


@dataclass
class Pending:
    """A load whose nodes are in the tree already.

    staging, sink: what was decoded before the request was admitted, and where it belongs.
    nodes: from the root side down. begin: position of the first token. recomputed: stored
    tokens that its request computes. patience: seconds after which it is given up.
    """

    load: Load
    runs: Sequence[SlotRun]
    nodes: Sequence[Any]
    begin: int
    recomputed: int
    plan: Plan
    patience: float
    sink: Sink
    staging: Staging | None = None
    began: float = field(default_factory=time.perf_counter)
    late: bool = False

    @property
    def remaining(self) -> float:
        """Seconds of patience left."""
        return max(0.0, self.began + self.patience - time.perf_counter())

    def hand_over(self, layer: int) -> list[Any]:
        """Copy what of a layer was decoded early to its rows; returns the sink's events."""
        return [] if self.staging is None else self.staging.hand_over(layer, self.sink)


@dataclass
class Pass:
    """A forward pass under way. waits: by layer, when it came there and when it went on."""

    began: float = field(default_factory=time.perf_counter)
    waits: dict[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def wait_seconds(self) -> float:
        """Seconds spent waiting for layers."""
        return sum(end - begin for begin, end in self.waits.values())

    def outside_layers(self, seconds: float) -> float | None:
        """Of the ``seconds`` that it computed, those in which it was at none of its layers. They
        are what is left when every layer takes as long as those between two that it came to;
        None where it came to fewer."""
        came = [self.waits[layer] for layer in sorted(self.waits)]
        if len(came) < 2:
            return None
        gaps = [after[0] - before[1] for before, after in pairwise(came)]
        return seconds - sum(gaps) / len(gaps) * len(came)


@dataclass
class Totals:
    """Sums over all restores since start, seconds."""

    passes: int = 0
    makespan: float = 0.0
    wait: float = 0.0
    fetch: float = 0.0
    decode: float = 0.0
    load_bubble: float = 0.0
    compute_bubble: float = 0.0
    failed: int = 0
    late: int = 0
    requeued: int = 0


class LayerCounter:
    """What SGLang's pool asks before a layer is read."""

    def __init__(self, restores: Restores, layers: int) -> None:
        self._restores = restores
        self.num_layers = layers
        self.consumer_index = -1

    def wait_until(self, layer: int) -> None:
        """Return when ``layer`` of every pending load is there, or never will be."""
        if self._restores.pending:
            self._restores.wait_layer(layer)

    def set_consumer(self, index: int) -> None:
        """SGLang's own controller names its loads by number; ours are all waited for."""


class Restores:
    """One rank's loads. Scheduler thread only."""

    def __init__(self, cache: KrulRadixCache, overlapped: bool) -> None:
        """overlapped: whether a scheduler settles what :meth:`begin` began; else it is loaded
        at once."""
        self._cache = cache
        self._krul = cache.krul
        self.overlapped = overlapped
        self.pending: list[Pending] = []
        self.traces: deque[RestoreTrace] = deque(maxlen=TRACES)
        self.totals = Totals()
        self.plans = Plans(cache)
        self.prefetches = Prefetches(cache)
        self._pause = ExitStack()  # of the encoder, while anything is pending
        self.parked: list[Any] = []
        """Requests that start anew and wait for their last results to be dropped."""
        self._pass: Pass | None = None
        if overlapped:
            counter = LayerCounter(self, self._krul.pool.spec.layers)
            self._krul.pool.register_layer_counter(counter)

    # ---- loading ---------------------------------------------------------------

    def begin(self, opened: Opened, transfer: Any, rows: torch.Tensor, req: Any) -> None:
        """Start to fill pool rows (int64 ``[n]``) with what SGLang's transfer names."""
        nodes = [self._cache.tree_core.node_by_id(n) for n in transfer.nodes_to_load]
        device = sum(len(above.key) for above in self._cache.path(nodes[0].parent.id))
        end = device + opened.tokens
        total = end if req is None else len(req.full_untruncated_fill_ids)
        plan = self.plans.expected(device, transfer.host_indices, max(1, total - end))
        sink, early = self._krul.pool.writer(rows), None
        if req is not None:
            early = self.prefetches.take(req, transfer.host_indices)
        if early is None:
            load = self._krul.loader.start(opened, sink)
        else:
            load = early.load
            self._krul.loader.redirect(load, sink)
        self.pending.append(
            Pending(
                load=load,
                sink=sink,
                staging=None if early is None else early.staging,
                runs=slot_runs(transfer.host_indices),
                nodes=nodes,
                begin=device,
                recomputed=getattr(req, RECOMPUTED, 0),
                plan=plan,
                patience=PATIENCE * plan.seconds + PATIENCE,
            )
        )
        if len(self.pending) == 1:
            self._pause.enter_context(self._krul.store.held_back())
        self._krul.planner.take(plan, total - end)
        if req is not None:
            self.plans.decided(req)

    def wait_layer(self, layer: int) -> None:
        """Let the running pass wait for a layer of every pending load."""
        arrived = time.perf_counter()
        for pending in self.pending:
            if not pending.load.wait_layer(layer, pending.remaining):
                self._give_up(pending)
            for event in [*pending.load.events(layer), *pending.hand_over(layer)]:
                torch.cuda.current_stream().wait_event(event)
        if self._pass is not None:
            self._pass.waits.setdefault(layer, (arrived, time.perf_counter()))

    def _give_up(self, pending: Pending) -> None:
        if pending.load.ok:
            return
        pending.late = True
        pending.load.cancel()
        logger.warning(
            "krul: a restore of %d tokens was not there after %.1f s; computing them",
            pending.load.tokens,
            pending.patience,
        )

    def is_loading(self, node: Any) -> bool:
        """Whether a node's rows are not yet known to be right."""
        return any(own is node for one in self.pending for own in one.nodes)

    def guard(self) -> None:
        """Before rows may be freed: wait for loads whose request was not admitted after all."""
        for pending in self.pending:
            if full_data(pending.nodes[-1]).lock_ref == 0:
                self._finish(pending)

    def _finish(self, pending: Pending) -> None:
        if not pending.load.wait(pending.remaining):
            self._give_up(pending)

    # ---- settling --------------------------------------------------------------

    def start_pass(self) -> None:
        """A forward pass begins."""
        self._pass = Pass()

    def end_pass(self) -> Pass:
        """It has ended (on a GPU: it has been launched)."""
        assert self._pass is not None
        ended, self._pass = self._pass, None
        return ended

    def settle(self, forward: Pass | None = None, new: int = 0) -> list[Pending]:
        """Wait for the end of every pending load, and return those that failed; the same on
        every rank. forward: the pass that read them; new: tokens it computed."""
        pending, self.pending = self.pending, []
        if not pending:
            return []
        for one in pending:
            self._finish(one)
            self._hand_over(one)
        self._pause.close()
        ended = time.perf_counter()
        failed = self._failed(pending)
        for one in pending:
            self._count(one, one in failed)
        if forward is not None:
            self._trace(pending, failed, forward, ended, new)
        self._krul.planner.next_batch()
        return failed

    def _hand_over(self, pending: Pending) -> None:
        """What no pass has asked for reaches its rows now."""
        if pending.staging is None:
            return
        for layer in range(self._krul.pool.spec.layers):
            for event in pending.hand_over(layer):
                event.synchronize()
        self.prefetches.release(pending.staging)
        pending.staging = None

    def _failed(self, pending: Sequence[Pending]) -> list[Pending]:
        """Those that any rank could not load; what it could not read is lost on all."""
        flags = [int(one.load.cancelled) for one in pending]
        for one in pending:
            bad = set(one.load.failed)
            flags += [int(run.segment in bad) for run in one.runs]
        flags = self._cache.agree(flags)
        late, rest = flags[: len(pending)], iter(flags[len(pending) :])
        failed = []
        for one, is_late in zip(pending, late, strict=True):
            lost = [run.segment for run in one.runs if next(rest)]
            for segment in dict.fromkeys(lost):
                missing.lose(self._cache, segment)
            if lost or is_late:
                failed.append(one)
        return failed

    def _count(self, pending: Pending, failed: bool) -> None:
        trace, totals, counters = pending.load.trace, self.totals, self._krul.counters
        totals.failed += failed
        totals.late += pending.late
        if failed:
            return
        for source in pending.load.sources:
            source.keep()
        counters.restored_tokens += pending.load.tokens
        counters.restores += 1
        counters.restore_seconds += max(0.0, trace.ended - pending.began)
        totals.fetch += trace.fetch_seconds
        totals.decode += trace.decode_seconds
        self._learn(pending, trace)

    def _learn(self, pending: Pending, trace: LoadTrace) -> None:
        cost = self._krul.planner.load
        for tier, (nbytes, spans) in trace.carried.items():
            cost.links.setdefault(tier, Rate(0.0)).observe(nbytes, covered(spans))
        for codec, tokens in pending.load.tokens_of.items():
            cost.observe_decode(codec, tokens, trace.codec_seconds.get(codec, 0.0))

    def _trace(
        self,
        pending: Sequence[Pending],
        failed: Sequence[Pending],
        forward: Pass,
        ended: float,
        new: int,
    ) -> None:
        recomputed = sum(one.recomputed for one in pending)
        trace = RestoreTrace(
            began=min(one.began for one in pending),
            forward=(forward.began, ended),
            waits=[forward.waits[layer] for layer in sorted(forward.waits)],
            loads=[one.load.trace for one in pending],
            tokens=sum(one.load.tokens for one in pending),
            recomputed=recomputed,
            new=max(0, new - recomputed),
            stored_bytes=sum(one.load.stored_bytes for one in pending),
            predicted=max(one.plan.seconds for one in pending),
            failed=bool(failed),
        )
        self.traces.append(trace)
        self._cache.journal.restored(trace, [one.load for one in pending])
        totals, bubbles = self.totals, trace.bubbles
        totals.passes += 1
        totals.makespan += trace.makespan
        totals.wait += trace.wait_seconds
        totals.load_bubble += bubbles["load"]
        totals.compute_bubble += bubbles["compute"]

    def drop(self, failed: Sequence[Pending]) -> None:
        """Take the nodes of failed loads off the device again; no request holds them."""
        cache = self._cache
        for one in failed:
            for node in reversed(one.nodes):
                data = full_data(node)
                if data.value is not None and data.lock_ref == 0:
                    cache._demote(node.id, defaultdict(int))
            missing.forget_lost(cache, one.nodes[-1].id)

    def abandon(self) -> None:
        """Give up every load; the tree is about to be cleared."""
        self.prefetches.drop_all()
        for one in self.pending:
            one.load.cancel()
            if one.staging is not None:
                self.prefetches.release(one.staging)
        self._pause.close()
        self.pending = []
        self.parked = []


def reads(cache: KrulRadixCache, req: Any, failed: Sequence[Pending]) -> bool:
    """Whether a request's prefix comes from one of the failed loads."""
    if req.last_node is None:
        return False
    bad = {id(node) for one in failed for node in one.nodes}
    return any(id(node) in bad for node in cache.path(req.last_node))
