"""Model families: what is evicted comes back exactly, for each shape of KV and each rope.

Eight models cover 44 of the 53 pairs of (family, head size, GQA ratio, rope); no eight can
cover more, because family x ratio and family x rope have twelve pairs each.
"""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.server

KRUL = ("--enable-krul", "--krul-policy", "lossless", "--krul-recompute", "never")
PLAIN = ("--skip-tokenizer-init", "--enable-cache-report")
# Holds one conversation at its end (138 tokens) and a bit.
SMALL, LARGE = ("--max-total-tokens", "192"), ("--max-total-tokens", "4096")

FAMILIES = [
    ("qwen3", 64, 4, "yarn"),
    ("llama", 64, 1, "llama3"),
    ("llama", 128, 4, "default"),
    ("mistral", 64, 1, "default"),
    ("mistral", 128, 4, "llama3"),
    ("qwen2", 64, 7, "llama3"),
    ("qwen2", 128, 1, "yarn"),
    ("qwen3", 128, 7, "default"),
]
SHORT = (("qwen3", 64, 4, "yarn"),)  # the chat model of the other tests is a Llama


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f in SHORT else pytest.mark.long) for f in FAMILIES],
    ids=lambda f: "-".join(map(str, f)),
)
def test_restores_exactly(serve, tiny, talk, ids, host_hits, family):
    """Restored in every conversation; token ids equal a server's that never evicts."""
    model = tiny(*family)
    with serve(*PLAIN, *LARGE, model=model) as server:
        reference = talk(server)
    assert host_hits(reference) == 0
    assert len({tuple(out) for past in ids(reference) for out in past}) == 9, "answers too alike"
    with serve(*PLAIN, *SMALL, *KRUL, model=model) as server:
        done = talk(server)
        state = server.krul()
    assert ids(done) == ids(reference)
    for past in done:
        for turn in past[1:]:
            # Every conversation was evicted between its turns, wholly or in part.
            assert host_hits(turn) >= turn["before"] // 2
    assert state["restored_tokens"] == host_hits(done)
    assert state["protected_tokens"] == state["lost_segments"] == state["dropped_tokens"] == 0
