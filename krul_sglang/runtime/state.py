"""Krul's counters, and what /server_info shows of them (:mod:`.metrics` has /metrics)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from krul_sglang.runtime import questions
from krul_sglang.runtime.exact import LOSSY_TOKENS


@dataclass
class Counters:
    """Totals since start, on this rank. Written by the scheduler thread."""

    evicted_tokens: int = 0
    dropped_tokens: int = 0
    unstored_tokens: int = 0
    adopted_tokens: int = 0
    pulled_tokens: int = 0
    restored_tokens: int = 0
    recomputed_tokens: int = 0
    restores: int = 0
    restore_seconds: float = 0.0
    evict_seconds: float = 0.0
    misses: int = 0
    measured_requests: int = 0


def block(cache: Any) -> dict[str, Any]:
    """The ``krul`` block of /server_info for one rank."""
    krul = cache.krul
    counters, stats = krul.counters, krul.store.stats
    totals = krul.store.totals()
    memory = krul.store.ledger.snapshot()
    ratio = totals["raw_bytes"] / totals["stored_bytes"] if totals["stored_bytes"] else None
    return {
        "policy": krul.config.policy,
        "protected_tokens": cache.protected_size(),
        **totals,
        "ratio": None if ratio is None else round(ratio, 3),
        "evicted_tokens": counters.evicted_tokens,
        "dropped_tokens": counters.dropped_tokens,
        "unstored_tokens": counters.unstored_tokens,
        "unstored_bytes": round(
            counters.unstored_tokens * krul.pool.spec.token_bytes / (ratio or 1)
        ),
        "adopted_tokens": counters.adopted_tokens,
        "pulled_tokens": counters.pulled_tokens,
        "restored_tokens": counters.restored_tokens,
        "recomputed_tokens": counters.recomputed_tokens,
        "restores": counters.restores,
        "restore_seconds": round(counters.restore_seconds, 6),
        "evict_seconds": round(counters.evict_seconds, 6),
        "encode_seconds": round(stats.encode_seconds, 6),
        "restore": restoring(cache),
        "misses": counters.misses,
        "measured_requests": counters.measured_requests,
        "quality": quality(cache),
        "fallbacks": stats.fallbacks,
        "lost_segments": stats.lost_segments,
        "memory": memory,
        "tiers": tiers(cache),
        "remote": None if krul.store.remote is None else krul.store.remote.totals(),
    }


def quality(cache: Any) -> dict[str, float] | None:
    """The budget in nats and the step that calibration expects to keep it; a segment that is
    stored at a finer one was judged unlike calibrated text. None for other policies."""
    profile, budget = cache.krul.profile, cache.krul.config.quality_budget
    return None if profile is None else {"budget": budget, "step": profile.step_for(budget)}


def tiers(cache: Any) -> dict[str, dict[str, Any]]:
    """Bytes of each tier, and what the disk has counted."""
    store = cache.krul.store
    memory = store.ledger.snapshot()
    found: dict[str, dict[str, Any]] = {
        "memory": {
            "bytes": memory["tier"],
            "limit": memory["limit"],
            "demoted_segments": store.stats.demoted_segments,
            "promoted_segments": store.stats.promoted_segments,
        }
    }
    if store.disk is not None:
        disk = store.disk.disk
        totals = disk.totals()
        found["disk"] = {
            "bytes": totals.pop("used"),
            **totals,
            "gone_segments": store.stats.gone_segments,
            "unwritten": store.disk.unwritten,
            "degraded": disk.degraded,
        }
    return found


def restoring(cache: Any) -> dict[str, Any]:
    """Totals over all restores, seconds, and what the planner believes now."""
    totals, planner = cache.restores.totals, cache.krul.planner
    return {
        "passes": totals.passes,
        "makespan_seconds": round(totals.makespan, 6),
        "wait_seconds": round(totals.wait, 6),
        "fetch_seconds": round(totals.fetch, 6),
        "decode_seconds": round(totals.decode, 6),
        "bubble_seconds": {
            "load": round(totals.load_bubble, 6),
            "compute": round(totals.compute_bubble, 6),
        },
        "failed": totals.failed,
        "late": totals.late,
        "requeued": totals.requeued,
        "prefetches": cache.restores.prefetches.started,
        "prefetches_used": cache.restores.prefetches.used,
        "stored_share": round(cache.restores.plans.boundary.share, 4),
        "cost": {
            "link_bytes_per_second": {
                tier: round(1 / rate.seconds) for tier, rate in planner.load.links.items()
            },
            "decode_tokens_per_second": {
                codec: round(1 / rate.seconds)
                for codec, rate in planner.load.codecs.items()
                if rate.seconds
            },
            "compute_seconds": {
                "fixed": planner.compute.fixed,
                "token": planner.compute.token,
                "pair": planner.compute.pair,
                "beside": round(planner.compute.beside, 4),
                "outside": round(planner.compute.outside or 0.0, 6),
            },
        },
    }


def _tree_cache(scheduler: Any) -> Any:
    cache = getattr(scheduler, "tree_cache", None)
    return cache if hasattr(cache, "krul") else None


def add_to_server_info(result: Any, controller: Any, recv_req: Any) -> Any:
    """AFTER ``get_internal_state``: add the ``krul`` block, or answer the question it asks."""
    cache = _tree_cache(controller.scheduler)
    if cache is None:
        return result
    answer = questions.answer(cache, recv_req)
    if answer is not None:
        result.internal_state = answer
    else:
        result.internal_state["krul"] = block(cache)
    return result


def add_to_cached_tokens(result: Any, streamer: Any, req: Any) -> Any:
    """AFTER ``get_cached_tokens_details``: how many of the cached tokens are lossy."""
    if result is not None and hasattr(streamer.tree_cache, "krul"):
        result["lossy"] = getattr(req, LOSSY_TOKENS, 0)
    return result
