"""Damaged memory: an exact answer, and the damage does not come back."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from dialogue import KRUL

pytestmark = pytest.mark.server

FAULTS = Path(__file__).parent / "faults"


def test_a_damaged_middle_segment_is_recomputed_and_stored_anew(serve, tmp_path):
    """Damage the middle of a stored conversation, return, evict, return again."""
    order = tmp_path / "damage"
    rng = random.Random(2)

    def tokens(n: int) -> list[int]:
        return [rng.randrange(500, 40000) for _ in range(n)]

    # Several turns, so that the conversation is several stored segments.
    turns = [tokens(40) for _ in range(4)]
    other = tokens(240)  # leaves no room for anything else
    with serve(
        *KRUL,
        "--max-total-tokens",
        "256",
        env={"PYTHONPATH": str(FAULTS), "FAULT_FILE": str(order)},
    ) as server:
        history: list[int] = []
        for turn in turns:
            history += turn
            history += server.generate(history, 4)["output_ids"]
        question = history + tokens(6)

        def evict() -> None:
            server.generate(other, 1)

        def come_back() -> dict:
            return server.generate(question, 6)

        evict()
        whole = come_back()
        stored = whole["meta_info"]["cached_tokens_details"]["host"]
        assert stored >= 0.9 * (len(history) - 1)

        evict()
        order.touch()
        assert server.krul()["segments"] >= 3  # and damages the middle one
        assert not order.exists()
        damaged = come_back()
        assert damaged["output_ids"] == whole["output_ids"]
        state = server.krul()
        assert state["lost_segments"] == 1
        assert state["recomputed_tokens"] > 0
        assert damaged["meta_info"]["cached_tokens"] < whole["meta_info"]["cached_tokens"]

        evict()
        again = come_back()
        assert again["output_ids"] == whole["output_ids"]
        details = again["meta_info"]["cached_tokens_details"]
        assert details["host"] + details["device"] >= 0.9 * (len(question) - 1)
        after = server.krul()
        assert after["lost_segments"] == 1  # no second miss
        assert after["recomputed_tokens"] == state["recomputed_tokens"]
        assert after["protected_tokens"] == 0
