"""A batch of prefills on a rig, through the hooks that Krul puts on SGLang's scheduler."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from kv_oracle import LAYERS
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from tree_rig import Rig

from krul_sglang.runtime import stepping
from krul_sglang.runtime.restoring import reads


def step(rig: Rig, reqs: list[Req], logprob: bool = False) -> list[Req]:
    """One batch of prefills through Krul's hooks, its results included. Returns the
    requests that are to start anew, which SGLang would schedule again."""
    batch = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND,
        reqs=list(reqs),
        prefix_lens=[req.prefix_len for req in reqs],
        extend_lens=[len(req.full_untruncated_fill_ids) - req.prefix_len for req in reqs],
        return_logprob=logprob,
        is_empty=lambda: not batch.reqs,
        filter_batch=lambda reqs_to_exclude: batch.reqs.__setitem__(
            slice(None), [req for req in batch.reqs if req not in reqs_to_exclude]
        ),
    )
    scheduler = SimpleNamespace(tree_cache=rig.cache, chunked_req=None, waiting_queue=[])

    def forward(*_):
        for layer in range(LAYERS):
            rig.kvcache.get_key_buffer(layer)
            rig.kvcache.get_value_buffer(layer)
        failed = [
            one for one in rig.cache.restores.pending if not one.load.wait(20) or not one.load.ok
        ]
        for req in reqs:
            if reads(rig.cache, req, failed):
                _hold(rig, req)
            else:
                rig.prefill(req)

    stepping.run_batch(forward, scheduler, batch)
    for req in reqs:
        if not req.is_retracted:
            req.output_ids.append(77)
            rig.checkpoint(req)
    stepping.after_result(None, scheduler, batch)
    stepping.before_next_batch(scheduler, running_batch=None, last_batch=batch)
    again = scheduler.waiting_queue
    assert batch.reqs == [req for req in reqs if req not in again]
    rig.running = [req for req in rig.running if req not in again]
    assert not rig.cache.restores.pending
    assert not rig.cache.restores.parked
    return again


def _hold(rig: Rig, req: Req) -> None:
    """As :meth:`prefill`, on rows that say nothing: neither they nor its own are looked at."""
    prefix = rig.cache.prefix_device_indices(req)
    rig.req_to_token_pool.alloc([req])
    row = (req.kv.req_pool_idx, slice(0, req.prefix_len))
    rig.req_to_token_pool.write(row, prefix.to(torch.int32))
    end = len(req.full_untruncated_fill_ids)
    rig._alloc(req, end)
    req.kv.kv_committed_len = req.extend_end = end
