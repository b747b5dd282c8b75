"""Builds the cache of one rank from SGLang's context; refuses what cannot be served."""

from __future__ import annotations

import functools
import logging
import os
from typing import TYPE_CHECKING, Any

import torch

from krul_sglang.config import KrulConfig
from krul_sglang.strategy.base import Selector
from krul_sglang.strategy.budget import BudgetSelector
from krul_sglang.strategy.fixed import FixedSelector
from krul_sglang.strategy.paper import PaperSelector

if TYPE_CHECKING:
    from krul_sglang.codec.base import Codec
    from krul_sglang.restore.planner import Planner
    from krul_sglang.runtime.pool import PoolView

logger = logging.getLogger(__name__)


def create(ctx: Any) -> Any:
    """The factory registered as radix cache backend ``krul``."""
    from sglang.srt.mem_cache.registry import create_unified_radix_cache
    from sglang.srt.mem_cache.unified_cache.components.base import ComponentType

    from krul_sglang.runtime import args, compat, hooks
    from krul_sglang.runtime.cache import KrulRadixCache
    from krul_sglang.runtime.component import KrulFullComponent

    hooks.verify()
    config = getattr(ctx.server_args, args.ATTRIBUTE, None)
    if config is None:
        config = KrulConfig.from_environment(enabled="1")
    compat.check_settings(config, ctx.server_args)
    krul = build(config, ctx)
    # An own FULL component also selects the Python tree core, whose nodes can be
    # looked up by id; the default Rust core's cannot.
    ctx.params.component_registry_override = {ComponentType.FULL: KrulFullComponent}
    ctx.params.tree_core_backend = "python"
    cache = create_unified_radix_cache(
        ctx, cache_class=functools.partial(KrulRadixCache, krul=krul, overlapped=True)
    )
    logger.info(
        "Krul: policy %s, %.2f GB host memory on this rank, %.1f KB of KV a token",
        config.policy,
        krul.store.ledger.limit / 1e9,
        krul.pool.spec.token_bytes / 1e3,
    )
    return cache


def build(config: KrulConfig, ctx: Any) -> Any:
    """The rank's :class:`~krul_sglang.runtime.cache.Krul`."""
    from sglang.srt.runtime_context import get_parallel

    from krul_sglang.codec.registry import make_codec
    from krul_sglang.profile.file import load_profile
    from krul_sglang.profile.locate import rank_path
    from krul_sglang.restore.load import Loader
    from krul_sglang.runtime import taps
    from krul_sglang.runtime.cache import Krul
    from krul_sglang.runtime.disk import open_disk, open_remote
    from krul_sglang.runtime.metrics import Metrics
    from krul_sglang.runtime.pool import PoolView
    from krul_sglang.runtime.state import Counters
    from krul_sglang.store.memory import MemoryStore
    from krul_sglang.strategy.base import EXACT

    parallel = get_parallel()
    ranks = max(1, parallel.tp_size) * max(1, parallel.dp_size)
    runner = ctx.tp_worker.model_runner
    pool = PoolView(
        ctx.params.token_to_kv_pool_allocator.get_kvcache(),
        getattr(runner, "forward_stream", None),
    )
    profile = None
    if config.needs_profile and config.profile is not None:
        # Checked against the model before this rank was started.
        profile = load_profile(rank_path(config.profile, ctx.tp_rank, max(1, parallel.tp_size)))
    codec_for = functools.cache(lambda name: make_codec(name, pool.spec, profile))
    threads = max(1, min(4, len(os.sched_getaffinity(0)) // ranks))
    store = MemoryStore(
        pool.spec,
        config.host_memory // ranks,
        codec_for,
        EXACT.codec,
        workers=max(1, threads // 2),  # the model's own threads want the other cores
        disk=open_disk(config, ctx, pool.spec, profile),
        remote=open_remote(config, ctx, pool.spec, profile),
    )
    if profile is not None:
        store.ledger.add("profile", profile.nbytes)
    sampled = getattr(runner, taps.ATTRIBUTE, None)
    if sampled is not None:
        rows = pool.k[0].shape[0]
        buffers = sampled.nbytes if pool.device.type == "cpu" else 0
        store.ledger.add("taps", buffers + rows * pool.spec.layers)
    metrics = None
    if ctx.params.enable_metrics:
        metrics = Metrics(
            {
                "model_name": str(ctx.server_args.served_model_name or ctx.model_config.model_path),
                "tp_rank": str(ctx.tp_rank),
                "dp_rank": str(getattr(parallel, "dp_rank", 0) or 0),
            },
            ["memory", *(own.tier for own in (store.disk, store.remote) if own is not None)],
        )
    return Krul(
        config=config,
        pool=pool,
        store=store,
        loader=Loader(store, threads, config.link_bandwidth),
        planner=planner_of(config, ctx, pool, codec_for(EXACT.codec), threads),
        selector=selector_of(config, pool.spec.layers),
        turn_ends=frozenset(ctx.model_config.hf_eos_token_id or ()),
        counters=Counters(),
        metrics=metrics,
        taps=sampled,
        profile=profile,
    )


def planner_of(config: KrulConfig, ctx: Any, pool: PoolView, exact: Codec, threads: int) -> Planner:
    """The rank's planner, with first values measured now."""
    from sglang.srt.runtime_context import get_parallel

    from krul_sglang.restore import probe
    from krul_sglang.restore.planner import Planner

    ranks = max(1, get_parallel().tp_size)
    model, text = ctx.model_config, ctx.model_config.hf_text_config
    heads, hidden = max(1, model.num_attention_heads // ranks), model.hidden_size
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    attention = 2 * hidden * heads * model.head_dim + hidden * pool.spec.layer_scalars
    shape = probe.ModelShape(
        layers=pool.spec.layers,
        hidden=hidden,
        weights=pool.spec.layers * (attention + 3 * hidden * inner // ranks),
        heads=heads,
        head_dim=model.head_dim,
    )
    on_cpu = pool.device.type == "cpu"
    chunk = ctx.server_args.chunked_prefill_size
    return Planner(
        layers=pool.spec.layers,
        compute=probe.compute_cost(shape, getattr(torch, pool.spec.dtype), pool.device),
        load=probe.load_cost(pool.spec, {exact.name: exact}, threads, config.link_bandwidth),
        cores=max(1, len(os.sched_getaffinity(0)) // ranks) if on_cpu else None,
        chunk=chunk if chunk is not None and chunk > 0 else None,
        page=ctx.params.page_size,
    )


def selector_of(config: KrulConfig, layers: int) -> Selector | None:
    """Who chooses how a policy stores what only one conversation can reach; None stores it
    exactly."""
    match config.policy:
        case "predictive":
            return BudgetSelector(config.quality_budget)
        case "fixed":
            return FixedSelector(layers)
        case "paper":
            return PaperSelector(layers)
    return None
