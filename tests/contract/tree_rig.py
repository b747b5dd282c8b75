"""One rank in miniature: SGLang's real pool, allocators and tree with Krul behind it.

A :class:`Rig` is driven through the calls the scheduler makes, in its order. What a
forward pass would write is replaced by a pure function of the token prefix
(:func:`kv_oracle.oracle`), so every row can be compared bit for bit wherever it has been.
"""

from __future__ import annotations

from array import array
from collections import Counter

import torch
from kv_oracle import DIM, HEADS, LAYERS, RoundingCodec, assert_plausible, oracle
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req
from sglang.srt.managers.schedule_policy import PrefillAdder
from sglang.srt.mem_cache.allocation import alloc_paged_token_slots_extend, alloc_token_slots
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InitLoadBackParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import checkpoint_kv_cache, release_kv_cache
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

from krul_sglang.codec.lossless import LosslessCodec
from krul_sglang.config import KrulConfig
from krul_sglang.restore.cost import ComputeCost, LoadCost
from krul_sglang.restore.load import Loader
from krul_sglang.restore.planner import Planner
from krul_sglang.runtime import marks
from krul_sglang.runtime.cache import Krul, KrulRadixCache
from krul_sglang.runtime.component import KrulFullComponent
from krul_sglang.runtime.exact import LOSSY_TOKENS
from krul_sglang.runtime.marks import full_data
from krul_sglang.runtime.pool import PoolView
from krul_sglang.runtime.state import Counters
from krul_sglang.store.disk.tier import DiskTier
from krul_sglang.store.durable import Durable
from krul_sglang.store.memory import MemoryStore
from krul_sglang.store.remote.tier import RemoteTier
from krul_sglang.store.segment import SegmentState
from krul_sglang.store.slots import slot_runs
from krul_sglang.strategy.base import EXACT, Strategy
from krul_sglang.strategy.budget import BudgetSelector

FINGERPRINT = b"rig" + bytes(13)


def build_krul(
    kvcache, *, lossy=None, host_memory=1 << 22, recompute="never", turn_ends=(), codecs=None,
    disk=None, disk_limit=1 << 24, remote=None,
) -> Krul:  # fmt: skip
    """Krul over ``kvcache``; ``codecs`` maps further codec names to instances; ``disk`` is the
    directory of a disk tier, ``remote`` the URL of a remote one."""
    pool = PoolView(kvcache)
    known = {"lossless": LosslessCodec(pool.spec), **(codecs or {})}
    if pool.spec.dtype == "float32":
        known.setdefault("rounding", RoundingCodec(pool.spec))
    durable = None
    if disk is not None:
        durable = Durable(DiskTier(disk, FINGERPRINT, disk_limit))
    tiers = {"disk": durable, "remote": remote and RemoteTier(remote, FINGERPRINT)}
    store = MemoryStore(pool.spec, host_memory, known.__getitem__, EXACT.codec, **tiers)
    policy = "lossless" if lossy is None else "predictive"
    return Krul(
        config=KrulConfig(policy=policy, host_memory=host_memory, recompute=recompute),
        pool=pool,
        store=store,
        loader=Loader(store, 2),
        planner=Planner(pool.spec.layers, ComputeCost(1e-3, 1e-3, 1e-7), LoadCost(2)),
        selector=None if lossy is None else Always(lossy),
        turn_ends=frozenset(turn_ends),
        counters=Counters(),
    )


class Always(BudgetSelector):
    """One codec for all, told the attention where it is known."""

    def __init__(self, strategy: Strategy) -> None:
        self._default = strategy


class Rig:
    """Pool, allocators, tree and Krul of one rank, and the scheduler's steps on them."""

    def __init__(
        self, page_size: int = 1, rows: int = 256, group=None, overlapped: bool = False, **krul
    ) -> None:
        args = ServerArgs(model_path="dummy", page_size=page_size)
        set_global_server_args_for_scheduler(args)
        self.page_size, self.rows = page_size, rows
        self.req_to_token_pool = ReqToTokenPool(
            size=8, max_context_len=2 * rows, device="cpu", enable_memory_saver=False
        )
        self.kvcache = MHATokenToKVPool(
            size=rows,
            page_size=page_size,
            dtype=torch.float32,
            head_num=HEADS,
            head_dim=DIM,
            layer_num=LAYERS,
            device="cpu",
            enable_memory_saver=False,
        )
        common = {
            "dtype": torch.float32,
            "device": "cpu",
            "kvcache": self.kvcache,
            "need_sort": False,
            "size": rows,
        }
        if page_size == 1:
            self.allocator = TokenToKVPoolAllocator(**common)
        else:
            self.allocator = PagedTokenToKVPoolAllocator(page_size=page_size, **common)
        self.krul = build_krul(self.kvcache, **krul)
        params = CacheInitParams(
            req_to_token_pool=self.req_to_token_pool,
            token_to_kv_pool_allocator=self.allocator,
            page_size=page_size,
            disable=False,
            tree_components=(ComponentType.FULL,),
            component_registry_override={ComponentType.FULL: KrulFullComponent},
            tree_core_backend="python",
            tp_cache_group=group,
        )
        self.cache = KrulRadixCache(params, self.krul, overlapped)
        self.adder = PrefillAdder.__new__(PrefillAdder)
        self.adder.tree_cache = self.cache
        self.running: list[Req] = []
        self.damaged: set[int] = set()
        self._rids = 0

    def close(self) -> None:
        self.cache.release_host_resources()

    # ---- the life of a request -------------------------------------------------

    def request(self, tokens, *, exact: bool = False, max_new: int = 8, **key) -> Req:
        self._rids += 1
        sampling = SamplingParams(temperature=0, max_new_tokens=max_new)
        sampling.custom_params = {"krul": "exact"} if exact else None
        return Req(
            rid=str(self._rids),
            origin_input_text="",
            origin_input_ids=array("q", tokens),
            sampling_params=sampling,
            **key,
        )

    def match(self, req: Req) -> int:
        """Match; returns how many tokens the tree promises (device and stored)."""
        req.init_next_round_input(self.cache)
        return req.prefix_len + req.host_hit_length

    def admit(self, req: Req) -> bool:
        """Load what was promised and lock the prefix; False when rows are short."""
        with self.adder._lock_node(req.last_node):
            if req.needs_host_load_back():
                promised = req.host_hit_length
                with self.adder._lock_node(req.best_match_node, lock_host=True):
                    loaded, req.last_node = self.cache.init_load_back(
                        InitLoadBackParams(
                            best_match_node=req.best_match_node,
                            host_hit_length=promised,
                            req=req,
                        )
                    )
                assert loaded in (0, promised), "a load is all or nothing"
                req.host_loaded_length = loaded
                req.prefix_len += loaded
                req.kv.cache_protected_len = req.prefix_len
            extend = len(req.full_untruncated_fill_ids) - req.prefix_len
            free = self.allocator.available_size() + self.cache.full_evictable_size()
            if free < extend + 2 * self.page_size:
                return False
            req.lock = self.cache.lock(req.last_node)
        self.running.append(req)
        return True

    def _alloc(self, req: Req, upto: int) -> None:
        """Rows for ``[kv_allocated_len or prefix, upto)``, evicting as the scheduler does."""
        table, row = self.req_to_token_pool.req_to_token, req.kv.req_pool_idx
        have = max(req.kv.kv_allocated_len, req.prefix_len)
        if self.page_size == 1:
            locs = alloc_token_slots(self.cache, upto - have)
        else:
            last = table[row, have - 1] if have else torch.tensor(-1)
            one = lambda n: torch.tensor([n])  # noqa: E731
            locs = alloc_paged_token_slots_extend(
                self.cache,
                one(have),
                one(have),
                one(upto),
                one(upto),
                last.reshape(1).long(),
                upto - have,
            )
        self.req_to_token_pool.write((row, slice(have, upto)), locs.to(torch.int32))
        req.kv.kv_allocated_len = upto

    def prefill(self, req: Req, upto: int | None = None) -> None:
        """One (chunk of a) forward pass over ``[prefix_len, upto)``."""
        upto = len(req.full_untruncated_fill_ids) if upto is None else upto
        if not req.kv.holds_kv:
            prefix = self.cache.prefix_device_indices(req)
            self.req_to_token_pool.alloc([req])
            row = (req.kv.req_pool_idx, slice(0, req.prefix_len))
            self.req_to_token_pool.write(row, prefix.to(torch.int32))
        begin = req.prefix_len
        self.check_prefix(req, begin)
        self._alloc(req, upto)
        self._forward(req, begin, upto)
        req.extend_end = upto

    def _forward(self, req: Req, begin: int, end: int) -> None:
        tokens = tuple(req.full_untruncated_fill_ids[:end])
        values = oracle(tokens, self.is_tainted(req, begin))
        rows = self.req_to_token_pool.req_to_token[req.kv.req_pool_idx, begin:end].long()
        for layer in range(LAYERS):
            self.kvcache.k_buffer[layer][rows] = values[0, layer, begin:]
            self.kvcache.v_buffer[layer][rows] = values[1, layer, begin:]
        req.kv.kv_committed_len = end

    def checkpoint(self, req: Req) -> None:
        checkpoint_kv_cache(req, self.cache)

    def decode(self, req: Req, token: int) -> None:
        """Sample ``token``; a later step writes its KV, as in serving."""
        if req.output_ids:
            end = len(req.origin_input_ids) + len(req.output_ids)
            req.refresh_fill_ids()
            self._alloc(req, end)
            self._forward(req, end - 1, end)
        req.output_ids.append(token)

    def finish(self, req: Req) -> None:
        req.finished_reason = FINISH_LENGTH(length=0)
        self._release(req, checkpoint=True)

    def abort(self, req: Req) -> None:
        """Drop an admitted request in whatever phase it is."""
        self._release(req, checkpoint=False)

    def retract(self, req: Req) -> None:
        """Give its rows up and make it ready to be matched again, answer kept."""
        self._release(req, checkpoint=False)
        req.reset_for_retract()

    def _release(self, req: Req, checkpoint: bool) -> None:
        self.running.remove(req)
        if req.kv.holds_kv:
            release_kv_cache(req, self.cache, checkpoint=checkpoint)
        else:
            self.cache.unlock(req.lock)
            req.lock = None

    def turn(self, tokens, answer=(1, 2, 3), *, exact: bool = False) -> Req:
        """A whole turn; the request comes back finished."""
        req = self.request(tokens, exact=exact)
        self.match(req)
        assert self.admit(req)
        self.prefill(req)
        for i, token in enumerate(answer):
            self.decode(req, token)
            if i == 0:
                self.checkpoint(req)
        self.finish(req)
        return req

    def evict(self, tokens: int | None = None) -> None:
        """Evict ``tokens`` (all by default) from the device."""
        amount = self.cache.full_evictable_size() if tokens is None else tokens
        self.cache.evict(EvictParams(num_tokens=amount))

    def sealed(self) -> None:
        assert self.krul.store.wait_sealed(20), "the encoder did not finish"

    def written(self) -> None:
        self.sealed()
        assert self.krul.store.disk.wait_written(20), "the disk tier did not finish"

    def sent(self) -> None:
        self.sealed()
        assert self.krul.store.remote.wait_sent(20), "the remote tier did not finish"

    def damage(self, segment_id: int, at: int = -1) -> None:
        """Flip one byte of a sealed payload."""
        segment = self.krul.store.get(segment_id)
        assert segment.state is SegmentState.SEALED
        payload = bytearray(segment.payload)
        payload[at] ^= 0x40
        segment.payload = bytes(payload)
        self.damaged.add(segment_id)

    # ---- looking ---------------------------------------------------------------

    def nodes(self) -> list:
        core = self.cache.tree_core
        return [n for n in core._collect_all_nodes() if n is not core.root_node]

    def path_tokens(self, node) -> tuple[int, ...]:
        keys = [list(n.key.raw_token_ids()) for n in self.cache.path(node.id)]
        return tuple(t for key in reversed(keys) for t in key)

    def segment_ids(self, node) -> list[int]:
        ids = full_data(node).host_value
        return [] if ids is None else [run.segment for run in slot_runs(ids)]

    def find(self, tokens) -> list:
        """The tree's nodes along ``tokens``, root side first; nothing is touched or split."""
        wanted = tuple(tokens)
        hits = [n for n in self.nodes() if wanted[: len(p := self.path_tokens(n))] == p]
        return sorted(hits, key=lambda n: len(self.path_tokens(n)))

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.long()
        k = torch.stack([buffer[rows] for buffer in self.kvcache.k_buffer])
        return torch.stack([k, torch.stack([buffer[rows] for buffer in self.kvcache.v_buffer])])

    def rows_of(self, req: Req, end: int) -> torch.Tensor:
        return self.gather(self.req_to_token_pool.req_to_token[req.kv.req_pool_idx, :end])

    def is_tainted(self, req: Req, end: int) -> bool:
        """Whether any row the request attends to is not what an exact prefill gives."""
        tokens = tuple(req.full_untruncated_fill_ids[:end])
        return not torch.equal(self.rows_of(req, end), oracle(tokens))

    def check_prefix(self, req: Req, end: int) -> None:
        """Every row a request is about to attend to is right, and exact where promised."""
        tokens = tuple(req.full_untruncated_fill_ids[:end])
        if self.krul.selector is None or getattr(req, LOSSY_TOKENS, 0) == 0:
            assert torch.equal(self.rows_of(req, end), oracle(tokens)), "rows are not exact"
        else:
            assert_plausible(self.rows_of(req, end), tokens, 0)

    # ---- invariants ------------------------------------------------------------

    def check(self, idle: bool | None = None) -> None:
        """Tree, locks, rows, store and ledger agree with each other and with the oracle."""
        idle = not self.running if idle is None else idle
        cache, store = self.cache, self.krul.store
        self.sealed()
        cache.sanity_check()
        private = 0
        for req in self.running:
            held = req.kv.kv_allocated_len - req.kv.cache_protected_len if req.kv.holds_kv else 0
            private += -(-held // self.page_size) * self.page_size
        held = cache.full_evictable_size() + cache.full_protected_size() + private
        assert self.allocator.available_size() + held == self.rows, "rows leaked or freed twice"
        names: Counter[int] = Counter()
        for node in self.nodes():
            data = full_data(node)
            if idle:
                assert data.lock_ref == 0, "a lock outlived its request"
                assert data.host_lock_ref == 0, "a host lock outlived its load"
            if data.host_value is not None:
                assert len(data.host_value) == len(node.key)
                names.update(data.host_value.tolist())
            self._check_rows(node, data)
        assert all(count == 1 for count in names.values()), "two nodes name one stored token"
        self._check_store(store, names)

    def _check_rows(self, node, data) -> None:
        tokens = self.path_tokens(node)
        begin = len(tokens) - len(node.key)
        if data.value is not None:
            rows = self.gather(data.value)
            exact = marks.exact_tokens(node)
            upto = begin + exact
            assert torch.equal(rows[:, :, :exact], oracle(tokens[:upto])[:, :, begin:]), (
                "rows that count as exact are lossy"
            )
            if exact < len(node.key):
                assert_plausible(rows[:, :, exact:], tokens, upto)
        if data.host_value is None or not self.damaged.isdisjoint(self.segment_ids(node)):
            return
        out = torch.full((2, LAYERS, len(node.key), HEADS, DIM), torch.nan)

        def sink(layer: int, first: int, k: torch.Tensor, v: torch.Tensor) -> None:
            out[0, layer, first : first + len(k)] = k
            out[1, layer, first : first + len(v)] = v

        runs = slot_runs(data.host_value)
        # As a restore does before it reads: the budget holds for this reading too.
        self.krul.store.make_room_to_read({run.segment for run in runs})
        assert self.krul.loader.load(runs, sink).ok, "an undamaged segment could not be read"
        first = 0
        for run in runs:
            part = out[:, :, first : first + run.tokens]
            lo, hi = begin + first, begin + first + run.tokens
            if self.krul.store.get(run.segment).exact:
                assert torch.equal(part, oracle(tokens)[:, :, lo:hi]), "an exact segment is not"
            else:
                assert_plausible(part, tokens[:hi], lo)
            first += run.tokens

    def _check_store(self, store: MemoryStore, names: Counter[int]) -> None:
        segments = list(store._segments.values())
        live = Counter(name >> 24 for name in names)
        assert live == {s.id: s.live_tokens for s in segments}, "tree and store disagree"
        counted = {
            "tier": sum(s.resident_bytes for s in segments),
            "staging": sum(s.staged_bytes for s in segments),
            "index": sum(s.index_bytes for s in segments),
        }
        held = store.ledger.snapshot()
        assert {kind: held[kind] for kind in counted} == counted, "the ledger does not add up"
        kept = [s for s in segments if s.state is not SegmentState.LOST]
        sealed = [s for s in kept if s.state is SegmentState.SEALED]
        assert store.totals() == {
            "segments": len(kept),
            "sealed_segments": len(sealed),
            "lossy_segments": sum(not s.exact for s in kept),
            "stored_tokens": sum(s.live_tokens for s in kept),
            "raw_bytes": sum(s.raw_bytes for s in sealed),
            "stored_bytes": sum(s.stored_bytes for s in sealed),
        }, "the running totals differ from a recount"
        assert store.lost_count == sum(s.state is SegmentState.LOST for s in segments)
