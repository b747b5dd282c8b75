"""Preemptive selection: what a request's own attention says, kept until its nodes leave.

When a request finishes, its sampled queries are held against its keys while these are
still on the device; what the selector measures is tagged on the nodes the request leaves
in the tree. An eviction needs nothing else, however much later it comes. A node without a
tag is stored by the selector's default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from krul_sglang.runtime import marks
from krul_sglang.runtime.marks import full_data
from krul_sglang.similarity.layers import LayerSimilarity
from krul_sglang.strategy.base import Estimate

if TYPE_CHECKING:
    from krul_sglang.runtime.cache import KrulRadixCache
    from krul_sglang.strategy.base import Selector, Strategy


@dataclass(frozen=True)
class Measured:
    """An estimate in host memory, complete once ``ready`` (a CUDA event, None on a CPU) has
    passed."""

    estimate: Estimate
    ready: Any = None

    def cut(self, lo: int, hi: int) -> Measured:
        """That of tokens ``lo .. hi``, a view; waits for nothing."""
        codes = self.estimate.codes
        own = None if codes is None else codes[:, lo:hi]
        return Measured(Estimate(own, self.estimate.layers), self.ready)

    def complete(self) -> Estimate:
        """The estimate, once it can be read."""
        if self.ready is not None:
            self.ready.synchronize()
        return self.estimate


def measure(cache: KrulRadixCache, req: Any, tokens: int) -> Measured | None:
    """The estimate of a finished request's first ``tokens``, None where too little is known.

    Its queries and pool rows are read in stream order, before anyone may overwrite them.
    """
    krul = cache.krul
    if krul.taps is None or krul.selector is None or not req.finished():
        return None
    with krul.pool.in_forward_order():
        window = krul.taps.window(req.rid, tokens)
        if window is None:
            return None
        rows = cache.req_to_token_pool.req_to_token[req.kv.req_pool_idx, :tokens]
        estimate = krul.selector.measure(window, krul.pool.k, rows, krul.taps.scale)
        krul.counters.measured_requests += 1
        if rows.device.type == "cpu":
            return Measured(estimate)
        return Measured(_on_host(estimate), torch.cuda.current_stream().record_event())


def _on_host(estimate: Estimate) -> Estimate:
    def copy(source: torch.Tensor) -> torch.Tensor:
        host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        return host.copy_(source, non_blocking=True)

    codes, layers = estimate.codes, estimate.layers
    return Estimate(
        None if codes is None else copy(codes),
        None if layers is None else LayerSimilarity(copy(layers.edges), copy(layers.distance)),
    )


def tag(cache: KrulRadixCache, req: Any, measured: Measured | None, tokens: int) -> None:
    """Leave ``measured`` (of the first ``tokens``) on those nodes of the request's path that
    have yet to be stored."""
    if measured is None or req.last_node is None:
        return
    begin = 0
    for node in reversed(list(cache.path(req.last_node))):
        end = begin + len(node.key)
        if full_data(node).host_value is None and end <= tokens:
            marks.tag(node, measured.cut(begin, end))
        begin = end


def strategy_of(selector: Selector, node: Any, lo: int, hi: int) -> Strategy:
    """How tokens ``lo .. hi`` of a node are to be stored where they may be lossy."""
    measured = marks.tag_of(node)
    return (
        selector.default if measured is None else selector.choose(measured.cut(lo, hi).complete())
    )
