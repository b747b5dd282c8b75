"""Loads for requests that wait in the queue: into private staging, never into the pool.

A request that is not in the batch just formed waits for a forward pass at least. The first few
of the queue use that time: what their plan would load is fetched and decoded into host memory
of their own, behind every load that a pass waits for. When one is admitted, its load goes on
into the pool's rows, and what had been decoded is copied there layer by layer as the pass
comes to it. Each rank does as its memory allows: whether anything was prefetched changes how
long a restore takes, nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from krul_sglang.runtime.marks import full_data
from krul_sglang.store.slots import slot_runs

if TYPE_CHECKING:
    from krul_sglang.codec.base import KVSpec
    from krul_sglang.restore.pipeline import Load, Sink
    from krul_sglang.runtime.cache import KrulRadixCache

LOOKAHEAD = 4
"""Requests at the head of the queue that are looked at."""
LEAST = 64
"""Tokens below which prefetching is not worth its staging."""
SHARE = 8
"""Part of the memory budget that all staging may take."""

# Set on a request that has been looked at.
_SEEN = "krul_prefetch_seen"


class Staging:
    """Rows of one request in host memory, ``[layers, tokens, ...]``, until the pool takes them."""

    def __init__(self, spec: KVSpec, tokens: int, dtype: torch.dtype, pin: bool) -> None:
        def empty(dim: int) -> torch.Tensor:
            shape = (spec.layers, tokens, spec.kv_heads, dim)
            return torch.empty(shape, dtype=dtype, pin_memory=pin)

        self._k, self._v = empty(spec.head_dim), empty(spec.v_head_dim)
        self.nbytes = tokens * spec.token_bytes
        self._written: list[list[tuple[int, int]]] = [[] for _ in range(spec.layers)]

    def write(self, layer: int, first: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """The sink of a load that nobody waits for yet."""
        end = first + k.shape[0]
        self._k[layer, first:end] = k
        self._v[layer, first:end] = v
        self._written[layer].append((first, end))

    def hand_over(self, layer: int, sink: Sink) -> list[Any]:
        """Give ``sink`` what was written of a layer, once; returns its events."""
        spans, self._written[layer] = self._written[layer], []
        events = [sink(layer, a, self._k[layer, a:b], self._v[layer, a:b]) for a, b in spans]
        return [event for event in events if event is not None]


@dataclass
class Prefetch:
    """A load under way for a request in the queue. ids: slot ids, int64 ``[n]``."""

    req: Any
    ids: torch.Tensor
    load: Load
    staging: Staging


class Prefetches:
    """One rank's prefetches. Scheduler thread only."""

    def __init__(self, cache: KrulRadixCache) -> None:
        self._cache = cache
        self._krul = cache.krul
        self._waiting: list[Prefetch] = []
        self.started = self.used = 0

    def look_ahead(self, queue: list[Any]) -> None:
        """A batch was formed: give up what is not queued any more, begin for who is."""
        if self._waiting:
            queued = {id(req) for req in queue}
            for one in list(self._waiting):
                if id(one.req) not in queued:
                    self.drop(one)
        for req in queue[:LOOKAHEAD]:
            if not getattr(req, _SEEN, False):
                setattr(req, _SEEN, True)
                self._begin(req)

    def _begin(self, req: Any) -> None:
        # Every rank asks the tree, as planning is agreed on; the rest is its own affair.
        req.init_next_round_input(self._cache)
        krul, tokens = self._krul, req.host_hit_length
        if tokens < LEAST:
            return
        path = self._cache.path(req.best_match_node)
        nodes = [full_data(node).host_value for node in path if node.evicted]
        ids = torch.cat(nodes[::-1])
        runs = slot_runs(ids)
        read = krul.store.bytes_to_read({run.segment for run in runs})
        if not self._fits(tokens * krul.pool.spec.token_bytes, read):
            return
        opened = krul.loader.open(runs)
        if opened.lost:
            return
        dtype, pin = krul.pool.k[0].dtype, krul.pool.device.type == "cuda"
        staging = Staging(krul.pool.spec, tokens, dtype, pin)
        krul.store.ledger.add("prefetch", staging.nbytes)
        load = krul.loader.start(opened, staging.write, urgent=False)
        self._waiting.append(Prefetch(req, ids, load, staging))
        self.started += 1

    def _fits(self, nbytes: int, read: int) -> bool:
        """Whether rows of ``nbytes`` and the ``read`` bytes they come from on the disk do."""
        ledger = self._krul.store.ledger
        held = sum(one.staging.nbytes for one in self._waiting)
        within = ledger.used + nbytes + read <= ledger.limit
        return within and held + nbytes <= ledger.limit // SHARE

    def take(self, req: Any, ids: torch.Tensor) -> Prefetch | None:
        """The prefetch of exactly these slot ids for a request that was admitted, if it has
        one that goes well; it is the caller's from now on, to :meth:`release`."""
        for one in self._waiting:
            if one.req is not req:
                continue
            if one.load.failed or not torch.equal(one.ids, ids):
                self.drop(one)
                return None
            self._waiting.remove(one)
            self.used += 1
            return one
        return None

    def drop(self, one: Prefetch) -> None:
        """Give one up."""
        self._waiting.remove(one)
        one.load.cancel()
        self.release(one.staging)

    def drop_all(self) -> None:
        """Give all up."""
        for one in list(self._waiting):
            self.drop(one)

    def release(self, staging: Staging) -> None:
        """The pool has everything, or nobody wants it."""
        self._krul.store.ledger.add("prefetch", -staging.nbytes)
