"""SGLang's own unified radix cache kit, run on Krul's class.

The package ships the kit's fixtures (configurations, builders, steps, a tree core that
can be inspected), not the cases; the cases here drive those fixtures. The kit names the
cache class in one place, ``fixtures.UnifiedRadixCache``: that name is pointed at Krul.
Everything in the kit is either in USED or, with its reason, in SKIPPED.
"""

from __future__ import annotations

import ast
import inspect
from array import array
from dataclasses import replace

import pytest
from sglang.srt.arg_groups.choices import RADIX_EVICTION_POLICY_CHOICES
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
from sglang_kit import (
    CONFIGS,
    KIT_FOLDER,
    CacheConfig,
    CustomTestCase,
    UnifiedRadixCacheFixtures,
    core,
    finish_req,
    fixtures,
    kv_events,
)
from tree_rig import build_krul

from krul_sglang.runtime.cache import KrulRadixCache
from krul_sglang.runtime.component import KrulFullComponent

FULL = ComponentType.FULL
FULL_CONFIGS = [cfg for cfg in CONFIGS if cfg.components == (FULL,)]
HYBRID = "hybrid models are refused at start"
HICACHE = "needs HiCache's host pool, which --enable-krul refuses at start"
SWA = "sliding windows are refused at start"
MAMBA = "Mamba state is refused at start"
CORE = "exercises the tree core alone; no cache class takes part"
LIVE = "scores a served 8B-class model; the live-server tests compare token ids instead"

USED = {
    "UnifiedRadixCacheFixtures",
    "UnifiedRadixCacheKVEventsFixtures",
    "UnifiedRadixCacheDecoderSwaBoundedReplayHoldBackFixtures",
    "DisabledUnifiedRadixCacheFixtures",
}
SKIPPED = {
    **{cfg.label: HYBRID for cfg in CONFIGS if len(cfg.components) > 1},
    "UnifiedRadixCacheHiCacheFixtures": HICACHE,
    "UnifiedRadixCacheStorageFixtures": HICACHE,
    "UnifiedRadixCacheStorageAttachBackfillFixtures": HICACHE,
    "UnifiedRadixPrefetchCorruptionFixtures": HICACHE,
    "AnchorLockOutcomePolicyFixtures": HICACHE,
    "StreamingSessionLockLifecycleFixtures": "streaming sessions are refused at start",
    "UnifiedRadixCacheLoadBackFixtures": MAMBA,
    "UnifiedMambaLRUMatchRefreshFixtures": MAMBA,
    "MambaCheckpointGridFixtures": MAMBA,
    "MambaFinishedOvershootCheckpointFixtures": MAMBA,
    "UnifiedRadixCacheInt8MambaCheckpointFixtures": MAMBA,
    "UnifiedRadixAllocationEvictionRealComponentsFixtures": f"{SWA}; {MAMBA}",
    "UnifiedRadixCacheCoreFixtures": SWA,
    "SWADraftHistoryFixtures": SWA,
    "SWAWindowUnderBigramKeyFixtures": SWA,
    "ResumableInsertWalkSWAFixtures": SWA,
    "SegmentLockProtocolFixtures": SWA,
    "SegmentLockFuzzFixtures": f"{SWA}; test_tree_fuzz.py takes its place",
    "UnifiedTreeCoreLoadBackPendingFixtures": CORE,
    "UnifiedLRUListBoundedRefreshFixtures": CORE,
    "FakeFullComponent": "stands in for FULL in the disabled tree, where it is used",
    "PagedFullComponent": "replaces the FULL component; Krul brings its own",
    "ExtraPoolFullComponent": HICACHE,
    "RustUnifiedTreeCoreInspector": "Krul selects the Python core: the Rust one has no node_by_id",
    "UnifiedRadixTreeTestMixin": LIVE,
    "AccuracyTwoPassMixin": LIVE,
    "_init_hicache": HICACHE,
    "_build_hicache_fixture": HICACHE,
    "_load_back_node": HICACHE,
    "_finish_pending_loads": HICACHE,
    "_release_ongoing_load_back_locks": HICACHE,
    "_skip_unsupported_hicache_test": HICACHE,
    "_simulate_backup": "writes rows where Krul keeps slot ids; _backup_node is real",
    "_simulate_backup_tree": "as _simulate_backup; _backup_tree is real",
    "_set_aux_host_tombstone": SWA,
    "_swa_finalize_setup": SWA,
    "_swa_anchor_chain_tokens": SWA,
    "_swa_anchor_setup": SWA,
    "_match_tokens_for_chain": SWA,
    "_evict_device_component": SWA,
}
STEPS = {
    "_make_req",
    "_apply_match_to_req",
    "_make_seq",
    "_alloc",
    "_make_inflight_req",
    "_insert",
    "_path_chain",
    "_backup_node",
    "_backup_tree",
    "_get_full_kv_pool",
    "_fill_full_kv",
    "_snapshot_full_kv",
    "_build_chain_pages",
    "_load_back_through_admission",
}


def kit_names() -> set[str]:
    """Configurations, the classes of every kit module, and the shared steps.

    Read from the source: the live part imports packages that serving does not need.
    """
    names = {cfg.label for cfg in CONFIGS}
    for file in (*KIT_FOLDER.glob("*.py"), KIT_FOLDER.parent / "unified_radix_cache_kit.py"):
        classes = [n for n in ast.parse(file.read_text()).body if isinstance(n, ast.ClassDef)]
        names |= {cls.name for cls in classes}
    names |= {n for n, f in vars(UnifiedRadixCacheFixtures).items() if callable(f)}
    # What every case stands on rather than a case: the record, its data, the inspector.
    return names - {
        "CacheConfig",
        "LoraReq",
        "UnifiedTreeCoreInspector",
        "UnifiedTreeCoreInspectionInterface",
    }


def test_nothing_of_the_kit_is_skipped_silently() -> None:
    used = USED | STEPS | {cfg.label for cfg in FULL_CONFIGS}
    assert used.isdisjoint(SKIPPED)
    assert kit_names() == used | SKIPPED.keys()
    assert len(FULL_CONFIGS) == 5


def test_every_step_named_as_used_is_used() -> None:
    source = inspect.getsource(KitCase) + inspect.getsource(UnifiedRadixCacheFixtures)
    assert [step for step in STEPS if f"self.{step}(" not in source] == []


@pytest.mark.parametrize("reason", sorted(set(SKIPPED.values())))
def test_skipped(reason: str) -> None:
    names = [name for name, why in SKIPPED.items() if why == reason]
    pytest.skip(f"{len(names)} of the kit's {len(kit_names())}: {reason} ({', '.join(names)})")


class KitCase(UnifiedRadixCacheFixtures, CustomTestCase):
    """Cases on the kit's FULL-only configurations."""

    caches: list[KrulRadixCache]

    def _callTestMethod(self, method):
        method()

    def setUp(self) -> None:
        self.caches = []
        patch = pytest.MonkeyPatch()
        patch.setattr(fixtures, "UnifiedRadixCache", self._krul)
        self.addCleanup(patch.undo)
        self.addCleanup(lambda: [cache.release_host_resources() for cache in self.caches])

    def _krul(self, params):
        params.component_registry_override = {FULL: KrulFullComponent}
        krul = build_krul(params.token_to_kv_pool_allocator.get_kvcache(), host_memory=1 << 26)
        self.caches.append(KrulRadixCache(params, krul))
        return self.caches[-1]

    def build(self, cfg: CacheConfig, **kwargs):
        self.cfg = cfg
        return fixtures.build_fixture(cfg, **kwargs)

    def every_config(self):
        """Every FULL-only configuration, without and with SGLang's session radix cache."""
        for cfg in FULL_CONFIGS:
            for sessions in core.session_radix_cache_test_values():
                with self.subTest(cfg.label, sessions=sessions):
                    yield cfg, *self.build(cfg, enable_session_radix_cache=sessions)

    def idle(self, cache, allocator) -> None:
        cache.sanity_check()
        held = cache.full_evictable_size() + cache.full_protected_size()
        assert allocator.available_size() + held == self.cfg.kv_size
        assert cache.full_protected_size() == 0

    def test_insert_then_match_in_whole_pages(self) -> None:
        for cfg, cache, allocator, pool in self.every_config():
            seq = self._make_seq(1, 3)
            self._insert(cache, allocator, pool, seq)
            match = fixtures.match_prefix(cache, [*seq, 7])
            assert match.device_prefix_len == len(seq)
            assert match.host_hit_length == 0
            short = fixtures.match_prefix(cache, seq[:-1])
            assert short.device_prefix_len == (len(seq) - 1) // cfg.page_size * cfg.page_size
            self.idle(cache, allocator)

    def test_namespaces_do_not_mix(self) -> None:
        for _, cache, allocator, pool in self.every_config():
            seq = self._make_seq(1, 1)
            self._insert(cache, allocator, pool, seq, extra_key="lora")
            self._insert(cache, allocator, pool, seq, cache_salt="salt")
            assert fixtures.match_prefix(cache, seq).device_prefix_len == 0
            cache.evict(EvictParams(num_tokens=self.cfg.kv_size))
            for key in ({"extra_key": "lora"}, {"cache_salt": "salt"}):
                found = cache.match_prefix(MatchPrefixParams(key=RadixKey(array("q", seq), **key)))
                assert found.host_hit_length == len(seq)
            self.idle(cache, allocator)

    def test_a_lock_keeps_its_path_on_the_device(self) -> None:
        for _, cache, allocator, pool in self.every_config():
            chain = self._build_chain_pages(cache, allocator, pool, 3)
            other = self._make_seq(9000, 1)
            self._insert(cache, allocator, pool, other)
            receipt = cache.inc_lock_ref(chain[1])
            cache.evict(EvictParams(num_tokens=self.cfg.kv_size))
            cache.sanity_check()
            on_device = [fixtures.node_device_value(cache, n, FULL) is not None for n in chain]
            assert on_device == [True, True, False]
            assert fixtures.node_host_value(cache, chain[2], FULL) is not None
            cache.dec_lock_ref(chain[1], receipt.to_dec_params())
            cache.evict(EvictParams(num_tokens=self.cfg.kv_size))
            assert allocator.available_size() == self.cfg.kv_size
            self.idle(cache, allocator)

    def test_an_explicit_backup_makes_eviction_a_demotion(self) -> None:
        for _, cache, allocator, pool in self.every_config():
            chain = self._build_chain_pages(cache, allocator, pool, 2)
            self._backup_node(cache, chain[-1])
            self._insert(cache, allocator, pool, self._make_seq(9000, 1))
            self._backup_tree(cache)
            ids = [fixtures.node_host_value(cache, n, FULL).tolist() for n in chain]
            cache.evict(EvictParams(num_tokens=self.cfg.kv_size))
            assert ids == [fixtures.node_host_value(cache, n, FULL).tolist() for n in chain]
            assert self._path_chain(cache, chain[-1]) == chain
            self.idle(cache, allocator)

    def test_evicted_rows_come_back_through_admission(self) -> None:
        for _, cache, allocator, pool in self.every_config():
            seq = self._make_seq(1, 3)
            self._insert(cache, allocator, pool, seq)
            node = fixtures.match_prefix(cache, seq).last_device_node
            rows = fixtures.node_device_value(cache, node, FULL)
            self._fill_full_kv(allocator, rows, marker=3)
            before = self._snapshot_full_kv(allocator, rows)
            cache.evict(EvictParams(num_tokens=self.cfg.kv_size))
            self._fill_full_kv(allocator, rows, marker=99)

            req = self._load_back_through_admission(cache, pool, seq)
            assert req.host_hit_length == len(seq)
            found = fixtures.match_prefix(cache, seq)
            assert found.device_prefix_len == len(seq)
            rows = cache.path_device_indices(found.last_device_node)
            after = self._snapshot_full_kv(allocator, rows)
            assert all(a.equal(b) for a, b in zip(before, after, strict=True))
            self.idle(cache, allocator)

    def test_a_request_finishes_into_the_tree(self) -> None:
        for cfg, cache, allocator, pool in self.every_config():
            tokens = [*self._make_seq(1, 2), 5000]
            req, _ = self._make_inflight_req(cache, allocator, pool, tokens[:-1], tokens[-1:])
            finish_req(cache, req, len(tokens))
            assert (
                fixtures.match_prefix(cache, tokens).device_prefix_len
                == len(tokens) // cfg.page_size * cfg.page_size
            )
            self.idle(cache, allocator)

    def test_every_eviction_policy_stores_and_restores(self) -> None:
        for policy in RADIX_EVICTION_POLICY_CHOICES:
            with self.subTest(policy):
                cache, allocator, pool = self.build(
                    replace(FULL_CONFIGS[0], eviction_policy=policy)
                )
                for i in range(4):
                    self._insert(cache, allocator, pool, self._make_seq(1000 * i, 20), priority=i)
                for _ in range(4):
                    cache.evict(EvictParams(num_tokens=20))
                    cache.sanity_check()
                assert allocator.available_size() == self.cfg.kv_size
                for i in range(4):
                    found = fixtures.match_prefix(cache, self._make_seq(1000 * i, 20))
                    assert found.host_hit_length == 20
                self.idle(cache, allocator)

    def test_device_events_follow_the_rows(self) -> None:
        events = kv_events.UnifiedRadixCacheKVEventsFixtures
        for cfg in FULL_CONFIGS:
            with self.subTest(cfg.label):
                cache, allocator, pool = self.build(cfg, enable_kv_cache_events=True)
                seq = self._make_seq(1, 2)
                self._insert(cache, allocator, pool, seq)
                stored = events._event_hashes(self, events._stored_events(self, cache, "GPU"))
                assert len(stored) == 2
                cache.evict(EvictParams(num_tokens=cfg.kv_size))
                gone = events._event_hashes(self, events._removed_events(self, cache, "GPU"))
                assert set(gone) == set(stored)
                self._load_back_through_admission(cache, pool, seq)
                back = events._event_hashes(self, events._stored_events(self, cache, "GPU"))
                assert set(back) == set(stored)
                self.idle(cache, allocator)

    def test_a_match_leaves_one_token_to_compute(self) -> None:
        steps = core.UnifiedRadixCacheDecoderSwaBoundedReplayHoldBackFixtures
        for cfg, cache, allocator, pool in self.every_config():
            seq = self._make_seq(1, 2)
            self._insert(cache, allocator, pool, seq)
            assert steps._matched_len(self, cache, [*seq, 7]) == len(seq)
            held = (len(seq) - 1) // cfg.page_size * cfg.page_size
            assert steps._matched_len(self, cache, seq) == held

    def test_a_disabled_tree_holds_nothing(self) -> None:
        steps = core.DisabledUnifiedRadixCacheFixtures()
        _, allocator, _ = self.build(FULL_CONFIGS[0])
        krul = build_krul(allocator.get_kvcache())
        cache = KrulRadixCache(steps._params(disable=True), krul)
        self.caches.append(cache)
        found = cache.match_prefix(MatchPrefixParams(key=RadixKey(array("q", [1, 2, 3]))))
        assert found.device_prefix_len + found.host_hit_length == 0
        assert cache.evict(EvictParams(num_tokens=8)).num_tokens_evicted == 0
        assert krul.store.ledger.used == 0
