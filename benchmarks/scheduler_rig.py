"""One rank without a model, for benchmarks/scheduler_cost.py: SGLang's real pools and prefix
cache, and the calls that its scheduler makes on them, in the scheduler's order.

What a forward pass would write is left out: nothing here reads it.
"""

from __future__ import annotations

import functools
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from krul_sglang.config import KrulConfig

SLOTS = 8
"""Rows of the request pool."""
HOST_MEMORY = 4 * 10**9


@dataclass(frozen=True)
class Shape:
    """What the KV pool and the attention of a model look like."""

    layers: int = 30
    kv_heads: int = 3
    heads: int = 9
    head_dim: int = 64
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, model: Path) -> Shape:
        """A model's, from its config.json. Raises OSError, KeyError, ValueError."""
        config = json.loads((model / "config.json").read_text())
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            kv_heads=config.get("num_key_value_heads", heads),
            heads=heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        )

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's KV."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize


def build_krul(kvcache: Any, *, host_memory: int, profile: Path | None, threads: int = 1) -> Any:
    """Krul with its default policy over a pool, as its factory builds it. Without a profile
    the selector is the same, and what it chooses is encoded losslessly."""
    from krul_sglang.codec.registry import make_codec
    from krul_sglang.profile.file import load_profile
    from krul_sglang.restore.cost import ComputeCost, LoadCost
    from krul_sglang.restore.load import Loader
    from krul_sglang.restore.planner import Planner
    from krul_sglang.runtime.cache import Krul
    from krul_sglang.runtime.factory import selector_of
    from krul_sglang.runtime.pool import PoolView
    from krul_sglang.runtime.state import Counters
    from krul_sglang.store.memory import MemoryStore
    from krul_sglang.strategy.base import EXACT

    config = KrulConfig(host_memory=host_memory)
    pool = PoolView(kvcache)
    loaded = None if profile is None else load_profile(profile)

    @functools.cache
    def codec_for(name: str) -> Any:
        return make_codec(EXACT.codec if loaded is None else name, pool.spec, loaded)

    store = MemoryStore(pool.spec, host_memory, codec_for, EXACT.codec, workers=threads)
    return Krul(
        config=config,
        pool=pool,
        store=store,
        loader=Loader(store, threads),
        planner=Planner(pool.spec.layers, ComputeCost(1e-3, 1e-3, 1e-7), LoadCost(threads)),
        selector=selector_of(config, pool.spec.layers),
        turn_ends=frozenset(),
        counters=Counters(),
    )


class Rig:
    """Pools, allocator and prefix cache of one rank, and a scheduler's steps on them."""

    def __init__(
        self,
        kind: str,
        shape: Shape,
        rows: int,
        *,
        host_memory: int = HOST_MEMORY,
        profile: Path | None = None,
    ) -> None:
        """kind: ``stock`` as SGLang makes it when nothing is asked for, ``stock_python`` with the
        Python tree core, ``krul``. rows: tokens the pool holds."""
        from sglang.srt.managers.schedule_policy import PrefillAdder
        from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
        from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

        self._arguments = ServerArgs(model_path="none", page_size=1)
        set_global_server_args_for_scheduler(self._arguments)
        self.kind, self.shape, self.rows = kind, shape, rows
        self.requests = ReqToTokenPool(
            size=SLOTS, max_context_len=rows, device="cpu", enable_memory_saver=False
        )
        self.kvcache = MHATokenToKVPool(
            size=rows,
            page_size=1,
            dtype=shape.dtype,
            head_num=shape.kv_heads,
            head_dim=shape.head_dim,
            layer_num=shape.layers,
            device="cpu",
            enable_memory_saver=False,
        )
        self.allocator = TokenToKVPoolAllocator(
            size=rows, dtype=shape.dtype, device="cpu", kvcache=self.kvcache, need_sort=False
        )
        self.krul: Any = None
        if kind == "krul":
            self.krul = build_krul(self.kvcache, host_memory=host_memory, profile=profile)
        self.cache = self._make_cache()
        self._adder = PrefillAdder.__new__(PrefillAdder)
        self._adder.tree_cache = self.cache
        self._rids = 0

    def _make_cache(self) -> Any:
        from sglang.srt.mem_cache import registry
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.unified_cache.components.base import ComponentType

        params = CacheInitParams(
            disable=False,
            req_to_token_pool=self.requests,
            token_to_kv_pool_allocator=self.allocator,
            page_size=1,
        )
        context = registry.TreeCacheBuildContext(
            server_args=self._arguments,
            params=params,
            is_hybrid_swa=False,
            is_hybrid_ssm=False,
            enable_hierarchical_cache=False,
            disable_radix_cache=False,
            tp_worker=None,
            model_config=None,  # type: ignore[arg-type]
            tp_size=1,
            tp_rank=0,
            tp_group=None,
        )
        if self.kind == "stock":
            return registry.create_tree_cache(context)
        params.tree_core_backend = "python"
        if self.kind == "stock_python":
            return registry.create_tree_cache(context)
        from krul_sglang.runtime.cache import KrulRadixCache
        from krul_sglang.runtime.component import KrulFullComponent

        params.component_registry_override = {ComponentType.FULL: KrulFullComponent}
        make: Any = functools.partial(KrulRadixCache, krul=self.krul, overlapped=True)
        return registry.create_unified_radix_cache(context, cache_class=make)

    @property
    def core(self) -> str:
        """The class of the tree core that is in use."""
        core = type(self.cache.tree_core)
        return f"{core.__module__}.{core.__qualname__}"

    def nodes(self) -> int:
        """Nodes of a Python core's tree without its root, on the device or stored."""
        return len(self.cache.tree_core._collect_all_nodes()) - 1

    def reset(self) -> None:
        """Forget everything."""
        self.cache.reset()
        self.allocator.clear()
        self.requests.clear()

    def occupy(self, spare: int) -> None:
        """Leave that many rows free, as if other requests held the rest: what SGLang's allocator
        does when rows come back grows with those that are free."""
        self.allocator.alloc(max(0, self.allocator.available_size() - spare))

    def close(self) -> None:
        """Stop Krul's threads."""
        if self.krul is not None:
            self.cache.release_host_resources()

    # ---- the life of a request -------------------------------------------------

    def request(self, tokens: Sequence[int]) -> Any:
        """A request as it comes from the tokenizer."""
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        self._rids += 1
        return Req(
            rid=str(self._rids),
            origin_input_text="",
            origin_input_ids=array("q", tokens),
            sampling_params=SamplingParams(temperature=0, max_new_tokens=64),
        )

    def match(self, req: Any) -> None:
        """Look up what of a request is cached, as for every waiting request of a step."""
        req.init_next_round_input(self.cache)

    def admit(self, req: Any) -> None:
        """Take the locks of an admission whose prefix is on the device."""
        with self._adder._lock_node(req.last_node):
            req.lock = self.cache.lock(req.last_node)

    def prefill(self, req: Any) -> None:
        """Rows for what is not cached, where a forward pass would write."""
        self.requests.alloc([req])
        prefix = self.cache.prefix_device_indices(req).to(torch.int32)
        self.requests.write((req.kv.req_pool_idx, slice(0, req.prefix_len)), prefix)
        end = len(req.full_untruncated_fill_ids)
        self._extend(req, req.prefix_len, end)
        req.extend_end = end

    def answer(self, req: Any, tokens: Sequence[int]) -> None:
        """Tokens are sampled; the last one's KV is never written, as in serving."""
        req.output_ids.extend(tokens)
        req.refresh_fill_ids()
        end = len(req.full_untruncated_fill_ids)
        self._extend(req, req.kv.kv_committed_len, end - 1)

    def _extend(self, req: Any, begin: int, end: int) -> None:
        rows = self.allocator.alloc(end - begin)
        assert rows is not None, "the benchmark's pool is too small"
        self.requests.write((req.kv.req_pool_idx, slice(begin, end)), rows.to(torch.int32))
        req.kv.kv_allocated_len = req.kv.kv_committed_len = end

    def checkpoint(self, req: Any) -> None:
        """Put a prompt into the tree after its forward pass."""
        from sglang.srt.mem_cache.common import checkpoint_kv_cache

        checkpoint_kv_cache(req, self.cache)

    def finish(self, req: Any) -> None:
        """The last token was sampled: put all of it into the tree and let go."""
        from sglang.srt.managers.schedule_batch import FINISH_LENGTH
        from sglang.srt.mem_cache.common import release_kv_cache

        req.finished_reason = FINISH_LENGTH(length=0)
        release_kv_cache(req, self.cache, checkpoint=True)

    def turn(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """A whole request."""
        req = self.request(prompt)
        self.match(req)
        self.admit(req)
        self.prefill(req)
        self.checkpoint(req)
        self.answer(req, answer)
        self.finish(req)

    def evict(self, tokens: int) -> int:
        """Free rows as an allocation does that finds too few; returns how many."""
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        return self.cache.evict(EvictParams(num_tokens=tokens)).num_tokens_evicted

    def settle(self) -> None:
        """Wait until everything evicted is encoded."""
        if self.krul is not None and not self.krul.store.wait_sealed(600):
            raise OSError("the encoder did not finish")


class Forward:
    """What of a decode pass Krul is called from, for one request: every layer asks the pool for
    its rows, and calls an attention that does nothing. With a stock cache nothing is in between.
    """

    def __init__(self, rig: Rig, shape: Shape) -> None:
        """shape: the model's, whatever the rig's own pool looks like."""
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        from krul_sglang.runtime.taps import tapped

        self._pool, self._pool_layers = rig.kvcache, rig.shape.layers
        self._q = torch.zeros(1, shape.heads * shape.head_dim, dtype=shape.dtype)
        self._layers = [
            SimpleNamespace(tp_q_head_num=shape.heads, scaling=1.0, layer_id=layer)
            for layer in range(shape.layers)
        ]
        self._batch = SimpleNamespace(
            forward_mode=ForwardMode.DECODE,
            seq_lens=torch.tensor([512]),
            req_pool_indices=torch.tensor([1]),
        )
        self._attention: Any = _nothing
        if rig.krul is not None:
            taps = make_taps(shape)
            record_prompt(taps, shape, "0", slot=1, tokens=512)
            self._attention = tapped(_nothing, taps)

    def run(self) -> None:
        """One token further."""
        self._batch.seq_lens += 1
        for layer in self._layers:
            self._pool.get_kv_buffer(layer.layer_id % self._pool_layers)
            self._attention(self._q, None, None, layer, self._batch)


def make_taps(shape: Shape) -> Any:
    """Where the default policy keeps queries, as for a server."""
    from krul_sglang.runtime.taps import Taps
    from krul_sglang.similarity.window import STRIDE

    return Taps(
        layers=shape.layers,
        heads=shape.heads,
        head_dim=shape.head_dim,
        dtype=shape.dtype,
        device=torch.device("cpu"),
        slots=SLOTS + 1,
        stride=STRIDE,
    )


def record_prompt(taps: Any, shape: Shape, rid: str, slot: int, tokens: int) -> None:
    """Keep (random) queries of a prompt, as its forward pass does."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    batch = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND,
        rids=[rid],
        req_pool_indices_cpu=torch.tensor([slot]),
        extend_prefix_lens_cpu=[0],
        extend_seq_lens_cpu=[tokens],
    )
    q = torch.randn(tokens, shape.heads * shape.head_dim, dtype=shape.dtype)
    for layer in range(shape.layers):
        taps.record(q, layer, batch)


class Hooked:
    """Stands for SGLang's scheduler: its three hooked methods, empty, wrapped as SGLang wraps
    them. With a stock cache they are bare."""

    def __init__(self, rig: Rig) -> None:
        from sglang.srt.model_executor.forward_batch_info import ForwardMode
        from sglang.srt.plugins.hook_registry import HookType, _wrap_fn

        from krul_sglang.runtime.hooks import HOOKS

        self.tree_cache = rig.cache
        self.waiting_queue: list[Any] = []
        batch = {"reqs": [], "prefix_lens": [512], "extend_lens": [32], "return_logprob": False}
        self._decode = SimpleNamespace(forward_mode=ForwardMode.DECODE, **batch)
        self._extend = SimpleNamespace(forward_mode=ForwardMode.EXTEND, **batch)
        self._methods = []
        planned = SimpleNamespace(batch_to_run=self._decode)
        for name, method in (
            ("get_next_batch_to_run", lambda *_, **__: planned),
            ("run_batch", _nothing),
            ("process_batch_result", _nothing),
        ):
            for hook in HOOKS:
                if rig.krul is not None and hook.target.endswith(f".Scheduler.{name}"):
                    method = _wrap_fn(method, hook.function, HookType[hook.kind])
            self._methods.append(method)

    def step(self, prefill: bool) -> None:
        """Everything that Krul hooks of a step in which it has nothing to do."""
        next_batch, run, process = self._methods
        batch = self._extend if prefill else self._decode
        next_batch(self, last_batch=None)
        run(self, batch)
        process(self, batch, None)


def _nothing(*_: Any, **__: Any) -> None:
    pass
