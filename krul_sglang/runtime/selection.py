"""Preemptive selection: what a request's own attention says, kept until its nodes leave.

When a request finishes, its sampled queries are held against its keys while these are
still on the device; the result, a byte a token and layer, is tagged on the nodes it
leaves in the tree. An eviction needs nothing else, however much later it comes. A node
without a tag is stored by the profile's default.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from krul_sglang.codec.layout import SINKS
from krul_sglang.runtime import marks
from krul_sglang.runtime.marks import full_data
from krul_sglang.similarity.estimate import attention_codes

if TYPE_CHECKING:
    from krul_sglang.runtime.cache import KrulRadixCache
    from krul_sglang.strategy.base import Strategy


@dataclass(frozen=True)
class Attention:
    """What each token of a node drew: uint8 ``[layers, tokens]`` on the host, complete once
    ``ready`` (a CUDA event, None on a CPU) has passed."""

    codes: torch.Tensor
    ready: Any = None

    def cut(self, lo: int, hi: int) -> Attention:
        """That of tokens ``lo .. hi``, memory of its own."""
        if self.ready is not None:
            self.ready.synchronize()
        return Attention(self.codes[:, lo:hi].clone())

    def code_bytes(self, lo: int, hi: int) -> bytes:
        """``layers * (hi - lo)`` codes, as a :class:`Strategy` carries them."""
        return self.cut(lo, hi).codes.numpy().tobytes()


def measure(cache: KrulRadixCache, req: Any, tokens: int) -> Attention | None:
    """The attention of a finished request's first ``tokens``, None where too little is known.

    Its pool rows are read in stream order, before anyone may free them.
    """
    krul = cache.krul
    if krul.taps is None or krul.lossy is None or not req.finished():
        return None
    window = krul.taps.window(req.rid, tokens)
    if window is None:
        return None
    with krul.pool.in_forward_order():
        rows = cache.req_to_token_pool.req_to_token[req.kv.req_pool_idx, :tokens]
        codes = attention_codes(window, krul.pool.k, rows, krul.taps.scale, SINKS)
        if codes.device.type == "cpu":
            return Attention(codes)
        host = torch.empty(codes.shape, dtype=torch.uint8, pin_memory=True)
        host.copy_(codes, non_blocking=True)
        return Attention(host, torch.cuda.current_stream().record_event())


def tag(cache: KrulRadixCache, req: Any, attention: Attention | None) -> None:
    """Leave ``attention`` on the nodes of the request's path that have yet to be stored."""
    if attention is None or req.last_node is None:
        return
    begin = 0
    for node in reversed(list(cache.path(req.last_node))):
        end = begin + len(node.key)
        if full_data(node).host_value is None and end <= attention.codes.shape[1]:
            marks.mark_attention(node, attention.cut(begin, end))
        begin = end
    cache.krul.counters.measured_requests += 1


def strategy_of(lossy: Strategy, node: Any, lo: int, hi: int) -> Strategy:
    """How tokens ``lo .. hi`` of a node are to be stored where they may be lossy."""
    attention = marks.attention(node)
    if attention is None:
        return lossy
    return replace(lossy, attention=attention.code_bytes(lo, hi))
