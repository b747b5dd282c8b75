"""The bursts of benchmarks/scheduler_cost.py: how long the scheduler stands still while
conversations are evicted one after another, at a model's real pool shape.

An eviction copies a conversation's rows to host memory (staging) on the scheduler's thread;
encoding follows on another thread and competes with it for cores and the interpreter. Every
call that takes part is timed, so that copying, waiting and the rest can be told apart.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from restore_cells import percentile
from scheduler_rig import Rig, Shape, make_taps, record_prompt

from krul_sglang.store.heap import return_freed_memory

MEASURED_REPEATS = 20


@dataclass(frozen=True)
class Burst:
    """conversations of ``tokens`` each, evicted at once, ``rounds`` times; host_memory: bytes."""

    tokens: int
    conversations: int
    rounds: int
    host_memory: int


@dataclass
class Seen:
    """What one burst's calls took, seconds, by what was called; and the staging they met."""

    seconds: dict[str, float] = field(default_factory=dict)
    peak: int = 0
    full: int = 0
    """How often staging had no room for the next run."""
    over_budget: int = 0
    """How often the whole budget had none, so that everything staged was sealed first."""


def history(shape: Shape, model: Path | None, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a text, ``[layers, tokens, kv_heads, head_dim]``: what a codec is to encode
    decides how long it takes. Random without a model."""
    if model is None:
        size = (shape.layers, tokens, shape.kv_heads, shape.head_dim)
        gen = torch.Generator().manual_seed(0)
        return torch.randn(size, generator=gen), torch.randn(size, generator=gen)
    from krul_sglang.profile.conversations import technical_texts
    from krul_sglang.quality.forward import history_kv, load_model

    loaded, tokenizer = load_model(model)
    ids: list[int] = []
    for text in technical_texts(64):
        ids += tokenizer.encode(text, add_special_tokens=False)
    return history_kv(loaded, ids[:tokens])


def run(
    burst: Burst, shape: Shape, profile: Path | None, kv: tuple[torch.Tensor, torch.Tensor]
) -> dict[str, Any]:
    """Measure one kind of burst."""
    rows = burst.tokens * burst.conversations + 64
    rig = Rig("krul", shape, rows, host_memory=burst.host_memory, profile=profile)
    try:
        _fill(rig, kv, burst.tokens)
        return _measure(rig, burst)
    finally:
        rig.close()


def _fill(rig: Rig, kv: tuple[torch.Tensor, torch.Tensor], tokens: int) -> None:
    """Every conversation's rows get the same KV."""
    for buffers, source in zip((rig.kvcache.k_buffer, rig.kvcache.v_buffer), kv, strict=True):
        for layer, buffer in enumerate(buffers):
            for begin in range(1, rig.rows - tokens, tokens):  # row 0 is padding
                buffer[begin : begin + tokens] = source[layer, :tokens]


def _measure(rig: Rig, burst: Burst) -> dict[str, Any]:
    stalls: list[float] = []
    totals: list[float] = []
    seen: list[Seen] = []
    measuring: list[float] = []
    floor: dict[str, list[float]] = {}
    busy: list[float] = []
    for number in range(burst.rounds):
        rig.reset()
        measuring += _converse(rig, burst, measure=number == 0)
        if number == 0:
            floor = _floor(rig, burst)
            return_freed_memory()
        one = Seen()
        began = time.perf_counter()
        with _Watch(rig, one):
            for _ in range(burst.conversations):
                ran = time.thread_time()
                stalls.append(_timed(rig.evict, burst.tokens))
                busy.append(time.thread_time() - ran)
        rig.settle()
        totals.append(time.perf_counter() - began)
        seen.append(one)
    store, counters = rig.krul.store, rig.krul.counters
    held = store.totals()
    return {
        "tokens": burst.tokens,
        "conversations": burst.conversations,
        "rounds": burst.rounds,
        "raw_bytes": burst.tokens * rig.shape.token_bytes,
        "host_memory": burst.host_memory,
        "stall_ms": _milliseconds(stalls),
        "stall_cpu_ms": _milliseconds(busy),
        "parts_ms": {
            name: 1e3 * sum(one.seconds.get(name, 0.0) for one in seen) / len(stalls)
            for name in _Watch.PARTS
        },
        "index_select_ms": _milliseconds(floor["index_select"]),
        "gather_alone_ms": _milliseconds(floor["gather"]),
        "reused_memory_ms": _milliseconds(floor["reused"]),
        "measure_ms": _milliseconds(measuring),
        "burst_stalled_seconds": sum(stalls) / burst.rounds,
        "burst_encoded_seconds": statistics.median(totals),
        "encode_seconds_per_conversation": store.stats.encode_seconds / len(stalls),
        "fallbacks": store.stats.fallbacks,
        "ratio": held["raw_bytes"] / held["stored_bytes"] if held["stored_bytes"] else None,
        "staging_peak": max(one.peak for one in seen),
        "staging_bound": store.staging_limit,
        "staging_waits": sum(one.full for one in seen),
        "budget_waits": sum(one.over_budget for one in seen),
        "evicted_tokens": counters.evicted_tokens,
        "dropped_tokens": counters.dropped_tokens,
    }


def _converse(rig: Rig, burst: Burst, measure: bool) -> list[float]:
    """Finish the burst's requests, each of which leaves one node of ``burst.tokens`` tokens.
    Returns seconds that measuring a finished request's attention takes, if asked for."""
    from krul_sglang.runtime import selection

    rig.krul.taps = make_taps(rig.shape)
    spent: list[float] = []
    for number in range(burst.conversations):
        req = rig.request(range(number * burst.tokens, (number + 1) * burst.tokens))
        rig.match(req)
        rig.admit(req)
        rig.prefill(req)
        record_prompt(rig.krul.taps, rig.shape, req.rid, req.kv.req_pool_idx, burst.tokens)
        rig.checkpoint(req)
        rig.answer(req, [1])
        if measure and number == 0:
            finished, req.finished = req.finished, lambda: True
            spent = [
                _timed(selection.measure, rig.cache, req, burst.tokens)
                for _ in range(MEASURED_REPEATS)
            ]
            req.finished = finished
        rig.finish(req)
    return spent


def _floor(rig: Rig, burst: Burst) -> dict[str, list[float]]:
    """Seconds to copy each conversation's rows while nothing else runs.

    All copies are kept, as staging is in a burst: memory that was never written, or that was
    returned to the system, costs more than the copy itself. ``reused`` copies into the same
    memory again and again.
    """
    pool = rig.krul.pool
    rows = [
        torch.arange(begin, begin + burst.tokens)
        for begin in range(1, 1 + burst.conversations * burst.tokens, burst.tokens)
    ]
    buffers = [*pool.k, *pool.v]
    same = [x.index_select(0, rows[0]) for x in buffers]
    kept: list[Any] = []

    def reuse(wanted: torch.Tensor) -> None:
        for x, out in zip(buffers, same, strict=True):
            torch.index_select(x, 0, wanted, out=out)

    def select(wanted: torch.Tensor) -> None:
        kept.append([x.index_select(0, wanted) for x in buffers])

    def gather(wanted: torch.Tensor) -> None:
        kept.append(pool.gather(wanted, 0))

    found = {"reused": [_timed(reuse, wanted) for wanted in rows]}
    for name, call in (("index_select", select), ("gather", gather)):
        return_freed_memory()
        found[name] = [_timed(call, wanted) for wanted in rows]
        kept.clear()
    return found


class _Watch:
    """Times the calls that an eviction makes, while in place."""

    PARTS = ("gather", "stage", "staging wait", "sealing wait")

    def __init__(self, rig: Rig, seen: Seen) -> None:
        self._pool, self._store, self._seen = rig.krul.pool, rig.krul.store, seen

    def __enter__(self) -> None:
        pool, store = self._pool, self._store
        pool.gather = self._part("gather", pool.gather)
        store.stage = self._part("stage", store.stage, after=self._note_peak)
        store.wait_for_staging = self._part(
            "staging wait", store.wait_for_staging, before=self._note_full
        )
        store.wait_sealed = self._part("sealing wait", store.wait_sealed, before=self._note_budget)

    def __exit__(self, *_: Any) -> None:
        del self._pool.gather
        for name in ("stage", "wait_for_staging", "wait_sealed"):
            delattr(self._store, name)

    def _part(
        self,
        name: str,
        call: Callable,
        before: Callable = lambda *_: None,
        after: Callable = lambda *_: None,
    ) -> Callable:
        def timed(*args: Any) -> Any:
            before(*args)
            began = time.perf_counter()
            result = call(*args)
            spent = time.perf_counter() - began
            self._seen.seconds[name] = self._seen.seconds.get(name, 0.0) + spent
            after(*args)
            return result

        return timed

    @property
    def _staged(self) -> int:
        return self._store.ledger.snapshot()["staging"]

    def _note_peak(self, *_: Any) -> None:
        # Only this thread adds to staging, so its peak is always right after a call.
        self._seen.peak = max(self._seen.peak, self._staged)

    def _note_full(self, nbytes: int, *_: Any) -> None:
        staged = self._staged
        self._seen.full += staged > 0 and staged + nbytes > self._store.staging_limit

    def _note_budget(self, *_: Any) -> None:
        self._seen.over_budget += 1


def _timed(call: Callable[..., Any], *args: Any) -> float:
    began = time.perf_counter()
    call(*args)
    return time.perf_counter() - began


def _milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    return {
        "p50": 1e3 * statistics.median(seconds),
        "p99": 1e3 * percentile(seconds, 99),
        "max": 1e3 * max(seconds),
    }
