"""Attention taps: the few query rows of each running request that are kept.

The attention backend's ``forward`` is wrapped before any CUDA graph is captured. Where a
row goes is computed from tensors the graph replays with (request slots, lengths), so decode
graphs record into the same buffers without Python: rows that are not sampled, and requests
that have no lane, go to a row nobody reads. Nothing is allocated after start.
"""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from krul_sglang.similarity.window import DECODE, PREFILL, ROWS, QueryWindow, Ring

logger = logging.getLogger(__name__)

ATTRIBUTE = "krul_taps"
_PLAN = "krul_tap_plan"
MEMORY = 256 << 20
"""Bytes the rows of all requests may take on one rank, and no more than a 16th of its host
memory budget."""
FEWEST = 4
"""Rows without which nothing is said about a conversation."""
LANES = 64
"""Most requests at a time that are sampled; what is beyond is stored by the profile alone."""


class Taps:
    """Query rows of running requests, a lane each. Scheduler thread only."""

    def __init__(
        self,
        layers: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        slots: int,
        stride: int,
        memory: int = MEMORY,
    ) -> None:
        """slots: rows of the request pool, its padding row 0 included. stride: every how
        many layers queries are kept. memory: bytes the rows may take."""
        self._layers = range(0, layers, stride)
        self._index = {layer: i for i, layer in enumerate(self._layers)}
        # One lane and one row more than are used: where unsampled rows go.
        size = len(self._index) * (ROWS + 1) * heads * head_dim * dtype.itemsize
        self.lanes = max(1, min(LANES, slots, memory // size - 1))
        shape = (len(self._index), self.lanes + 1, ROWS + 1, heads, head_dim)
        self._q = torch.zeros(shape, dtype=dtype, device=device)
        self._positions = torch.full(shape[1:3], -1, dtype=torch.int32, device=device)
        self._lane_of = torch.full((slots,), self.lanes, dtype=torch.int64, device=device)
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._free = list(range(self.lanes))
        self.heads, self.scale = heads, head_dim**-0.5
        self.static = device.type == "cuda"
        """Whether decode plans keep their shape from step to step, as graphs need them."""

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(x.nbytes for x in (self._q, self._positions, self._lane_of))

    # ---- recording -------------------------------------------------------------

    def record(self, q: torch.Tensor, layer_id: int, batch: Any) -> None:
        """Keep what is sampled of ``q`` (``[tokens, heads * dim]`` or ``[tokens, heads, dim]``,
        post-RoPE) of a ForwardBatch."""
        index = self._index.get(layer_id)
        if index is None:
            return
        if index == 0:
            setattr(batch, _PLAN, self._plan(batch))
        plan = getattr(batch, _PLAN, None)
        if plan is None:
            return
        source, lane, row = plan
        rows = q.view(-1, *self._q.shape[3:])
        rows = rows if source is None else rows[source]
        self._q[index].index_put_((lane, row), rows.to(self._q.dtype))

    def _plan(self, batch: Any) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor] | None:
        """Which tokens of the batch are kept (None: all), in which lane and row."""
        mode = batch.forward_mode
        if mode.is_decode():
            plan = self._plan_decode(batch)
        elif mode.is_extend() and batch.rids is not None:
            plan = self._plan_extend(batch)
        else:
            plan = None
        return plan

    def _plan_decode(
        self, batch: Any
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor] | None:
        position = batch.seq_lens - 1
        lane = self._lane_of[batch.req_pool_indices]
        due = position % DECODE.stride == 0
        source = None
        if not self.static:  # leave out what is not sampled
            source = (due & (lane < self.lanes)).nonzero()[:, 0]
            if len(source) == 0:
                return None
            position, lane = position[source], lane[source]
            row = DECODE.row(position)
        else:
            row = torch.where(due, DECODE.row(position), ROWS)
        self._positions[lane, row] = position.to(torch.int32)
        return source, lane, row

    def _plan_extend(
        self, batch: Any
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor] | None:
        slots = batch.req_pool_indices_cpu
        slots = (batch.req_pool_indices if slots is None else slots).tolist()
        source: list[int] = []
        lanes: list[int] = []
        rows: list[int] = []
        positions: list[int] = []
        begin = 0
        for rid, slot, before, new in zip(
            batch.rids, slots, batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu, strict=True
        ):
            held = self._hold(rid, slot)
            chosen = _sampled(PREFILL, before, before + new)
            source += [begin + position - before for position in chosen]
            lanes += [held.lane] * len(chosen)
            rows += [PREFILL.row(position) for position in chosen]
            positions += chosen
            begin += new
            held.sampled, held.prompt = held.sampled + len(chosen), before + new
        if not source:
            return None
        device = self._q.device
        index = torch.tensor([source, lanes, rows, positions]).to(device, non_blocking=True)
        self._positions[index[1], index[2]] = index[3].to(torch.int32)
        return index[0], index[1], index[2]

    def _hold(self, rid: str, slot: int) -> _Held:
        """The lane of a request in the pool's row ``slot``, a new one at its first chunk."""
        held = self._held.get(rid)
        if held is not None and held.slot == slot:
            return held
        self.release(rid)
        if not self._free:  # take that of the one whose prompt is the longest ago
            oldest = next(iter(self._held))
            self._lane_of[self._held[oldest].slot] = self.lanes
            self.release(oldest)
        held = self._held[rid] = _Held(self._free.pop(), slot)
        self._positions[held.lane] = -1
        self._lane_of[slot] = held.lane
        return held

    # ---- reading ---------------------------------------------------------------

    def window(self, rid: str, tokens: int) -> QueryWindow | None:
        """The rows kept of a request of ``tokens`` tokens; None where there are fewer than
        :data:`FEWEST`. Its q is a view: read it before the next forward pass."""
        held = self._held.get(rid)
        if held is None:
            return None
        answered = (tokens - 1) // DECODE.stride - (held.prompt - 1) // DECODE.stride
        if min(held.sampled, PREFILL.size) + min(answered, DECODE.size) < FEWEST:
            return None
        positions = self._positions[held.lane, :ROWS]
        # A position beyond the end attends nothing.
        positions = torch.where(positions < tokens, positions, -1)
        return QueryWindow(self._q[:, held.lane, :ROWS], positions, self._layers)

    def release(self, rid: str) -> None:
        """The request is over; its lane is free.

        Nothing is written to the device: a step in flight may still record into the lane,
        and whoever holds it next clears it in stream order.
        """
        held = self._held.pop(rid, None)
        if held is not None:
            self._free.append(held.lane)


@dataclass
class _Held:
    """A request's lane, its row in the request pool, how many prompt rows it sampled and how
    long the prompt is so far."""

    lane: int
    slot: int
    sampled: int = 0
    prompt: int = 0


def _sampled(ring: Ring, begin: int, end: int) -> range:
    """The positions of ``begin .. end`` that the ring keeps."""
    first = max(begin, end - ring.reach)
    return range(-(-first // ring.stride) * ring.stride, end, ring.stride)


def install(result: Any, runner: Any) -> Any:
    """AFTER ``ModelRunner.init_attention_backends``: tap the backend, where the policy
    measures attention."""
    from sglang.srt.runtime_context import get_parallel

    from krul_sglang.runtime import args
    from krul_sglang.runtime.factory import selector_of

    config = getattr(runner.server_args, args.ATTRIBUTE, None)
    if config is None or config.attention == "off" or runner.is_draft_worker:
        return result
    pool = runner.token_to_kv_pool
    if not hasattr(pool, "k_buffer"):
        return result  # a pool that Krul refuses when its cache is built
    selector = selector_of(config, runner.model_config.num_hidden_layers)
    if selector is None or not selector.stride:
        return result
    model = runner.model_config
    parallel = get_parallel()
    heads = model.num_attention_heads // max(1, parallel.tp_size)
    ranks = max(1, parallel.tp_size) * max(1, parallel.dp_size)
    taps = Taps(
        layers=len(pool.k_buffer),
        heads=heads,
        head_dim=pool.k_buffer[0].shape[2],
        dtype=pool.k_buffer[0].dtype,
        device=pool.k_buffer[0].device,
        slots=len(runner.req_to_token_pool.req_to_token),
        stride=selector.stride,
        memory=min(MEMORY, config.host_memory // ranks // 16),
    )
    setattr(runner, ATTRIBUTE, taps)
    runner.attn_backend.forward = tapped(runner.attn_backend.forward, taps)
    return result


def tapped(forward: Callable, taps: Taps) -> Callable:
    """``forward`` of an attention backend, recording its queries first."""

    @functools.wraps(forward)
    def wrapper(q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, *rest: Any, **kw: Any):
        if layer.tp_q_head_num == taps.heads:  # else heads are split in a way not foreseen
            taps.scale = layer.scaling
            taps.record(q, layer.layer_id, forward_batch)
        return forward(q, k, v, layer, forward_batch, *rest, **kw)

    return wrapper
