"""What Krul adds to a step of SGLang's scheduler: hooks before, around and after a batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from krul_sglang.restore.cost import Prefill
from krul_sglang.runtime.restoring import LIMIT, Pending, reads


def _cache_of(scheduler: Any) -> Any:
    cache = getattr(scheduler, "tree_cache", None)
    return cache if hasattr(cache, "restores") else None


def run_batch(original: Callable, scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ``Scheduler.run_batch``: see to it that what it reads has been loaded."""
    cache = _cache_of(scheduler)
    if cache is None or not batch.forward_mode.is_extend():
        return original(scheduler, batch, *args, **kwargs)
    restores = cache.restores
    before, new = np.array(batch.prefix_lens, float), np.array(batch.extend_lens, float)
    loads = [one.load for one in restores.pending]
    restores.start_pass()
    try:
        result = original(scheduler, batch, *args, **kwargs)
    finally:
        forward = restores.end_pass()
    seconds = time.perf_counter() - forward.began - forward.wait_seconds
    failed = restores.settle(forward, int(new.sum()))
    if cache.krul.pool.device.type == "cpu":
        decoding = sum(load.trace.decode_seconds_since(forward.began) for load in loads)
        compute = cache.krul.planner.compute
        compute.observe(Prefill.of_batch(new, before), seconds, decoding)
        outside = forward.outside_layers(seconds)
        # With the log-probabilities of its prompt asked for, a head takes as long as it never does.
        if outside is not None and not batch.return_logprob:
            compute.observe_outside(outside)
    if failed:
        _start_anew(scheduler, cache, batch, failed)
    if loads:
        cache.publish()
    return result


def _start_anew(scheduler: Any, cache: Any, batch: Any, failed: Sequence[Pending]) -> None:
    """Give up what the requests that read a failed load have computed."""
    from sglang.srt.mem_cache.common import release_kv_cache

    hit = [req for req in batch.reqs if reads(cache, req, failed)]
    begin = min(one.begin for one in failed)
    for req in hit:
        setattr(req, LIMIT, begin)
    if hit and batch.return_logprob:
        # The results of a batch lie one after the other: none can be left out.
        hit = list(batch.reqs)
    for req in hit:
        release_kv_cache(req, cache, checkpoint=False)
        req.reset_for_retract()
        _forget_hit(req)
        if scheduler.chunked_req is req:
            scheduler.chunked_req = None
    cache.restores.totals.requeued += len(hit)
    cache.restores.parked += hit
    cache.restores.drop(failed)


def _forget_hit(req: Any) -> None:
    """What the request reports as cached is to be what its next attempt finds; SGLang keeps
    the first attempt's figures, which suits a request that has begun to answer."""
    req.host_loaded_length = 0
    if not req.output_ids:
        req.retracted_stain = False
        req.cached_tokens = req.cached_tokens_device = req.cached_tokens_host = 0
        req._cache_breakdown_computed = False


def after_result(result: Any, scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``Scheduler.process_batch_result``, which drops the results of requests that start
    anew: they may be scheduled again."""
    cache = _cache_of(scheduler)
    if cache is not None and cache.restores.parked:
        again = [req for req in batch.reqs if req in cache.restores.parked]
        scheduler.waiting_queue[:0] = again


def before_next_batch(scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE ``Scheduler.get_next_batch_to_run``: no request that starts anew stays in the
    last batch, and no load outlives a step without a batch."""
    cache = _cache_of(scheduler)
    if cache is None:
        return
    cache.between_steps()
    restores = cache.restores
    if restores.pending:  # admitted for a batch that was never run
        restores.drop(restores.settle())
    if restores.parked:
        last = kwargs.get("last_batch", args[-1] if args else None)
        if last is not None and not last.is_empty():
            last.filter_batch(reqs_to_exclude=restores.parked)
        restores.parked = [req for req in restores.parked if req not in scheduler.waiting_queue]
    cache.pulls.set_aside(scheduler)


def after_next_batch(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``Scheduler.get_next_batch_to_run``: who is still in the queue waits for a pass."""
    cache = _cache_of(scheduler)
    if cache is None:
        return
    if cache.restores.overlapped:
        cache.restores.prefetches.look_ahead(scheduler.waiting_queue)
    cache.pulls.put_back(scheduler, idle=result.batch_to_run is None)
