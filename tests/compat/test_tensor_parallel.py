"""Tensor parallelism: two ranks evict and restore alike, each its own heads."""

from __future__ import annotations

import random

import pytest
from tiny_model import write_model

pytestmark = pytest.mark.server

PLAIN = ("--skip-tokenizer-init",)


def test_two_ranks_restore_exactly(serve, tiny, talk, host_hits, two_ranks):
    """Token ids equal those of a prefill with nothing cached; SGLang's rank check stays quiet."""
    # Compares, in every step, what the ranks decided; a difference ends the server.
    env = {**two_ranks, "SGLANG_ENABLE_RANK_CONSENSUS_CHECKER": "1"}
    model = tiny("qwen2", 64, 2, "default", kv_heads=2)
    krul = ("--enable-krul", "--krul-policy", "lossless", "--krul-recompute", "never")
    flags = ("--max-total-tokens", "192", "--tp-size", "2")
    with serve(*PLAIN, *krul, *flags, model=model, env=env) as server:
        done = talk(server)
        state = server.krul()
        for past in done:
            for turn in past:
                server.flush()
                fresh = server.generate(turn["prompt"], len(turn["output_ids"]))
                assert fresh["meta_info"]["cached_tokens"] == 0
                assert fresh["output_ids"] == turn["output_ids"]
        log = server.log.read_text(errors="replace")
    for past in done:
        for turn in past[1:]:
            assert host_hits(turn) >= turn["before"] // 2
    assert state["restored_tokens"] == host_hits(done)
    assert state["protected_tokens"] == state["lost_segments"] == state["dropped_tokens"] == 0
    assert "mismatch" not in log.lower()


@pytest.mark.long
def test_each_rank_stores_with_its_own_profile(serve, two_ranks, tmp_path):
    """The first start calibrates both ranks; what comes back is reported as lossy."""
    model = write_model(tmp_path / "model", "llama", max_position_embeddings=4096)
    env = {**two_ranks, "SGLANG_ENABLE_RANK_CONSENSUS_CHECKER": "1"}
    env["XDG_CACHE_HOME"] = str(tmp_path)
    flags = ("--enable-krul", "--krul-recompute", "never")
    flags += ("--max-total-tokens", "192", "--tp-size", "2")
    rng = random.Random(5)
    prompts = [[rng.randrange(1, 90) for _ in range(100)] for _ in range(3)]
    with serve(*flags, model=model, env=env) as server:
        for prompt in prompts:
            server.generate(prompt, 2)
        for prompt in prompts:
            details = server.generate(prompt, 2)["meta_info"]["cached_tokens_details"]
            assert details["lossy"] > 0
        state = server.krul()
    assert len(list((tmp_path / "krul").glob("*.rank?of2.safetensors"))) == 2
    assert state["restored_tokens"] > 150
    assert state["memory"]["profile"] > 0
    assert state["protected_tokens"] == state["lost_segments"] == 0
