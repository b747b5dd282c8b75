"""Two ranks over gloo: they match, drop and give up alike, whichever of them is in trouble."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kv_oracle import LAYERS

pytestmark = pytest.mark.process

CHILD = Path(__file__).parent / "rank_child.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each rank reported; every collective has a timeout, so a disagreement ends."""
    store = tmp_path_factory.mktemp("gloo") / "store"
    children = [
        subprocess.Popen(
            [sys.executable, str(CHILD), str(rank), str(store)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # `make` sets PYTHONSAFEPATH, which keeps a script's own folder off the path.
            env={**os.environ, "PYTHONPATH": str(CHILD.parent)},
        )
        for rank in range(2)
    ]
    results = []
    try:
        outputs = [child.communicate(timeout=240) for child in children]
    finally:
        for child in children:
            child.kill()
    for child, (out, err) in zip(children, outputs, strict=True):
        assert child.returncode == 0, err[-3000:]
        results.append(json.loads(out.splitlines()[-1]))
    return results


def test_both_ranks_decide_alike(ranks) -> None:
    # Which load was late is each rank's own affair.
    first, second = (
        {name: {**outcome, "late": None} for name, outcome in rank.items()} for rank in ranks
    )
    assert first == second


def test_what_one_rank_cannot_read_is_lost_on_both_and_stored_anew(ranks) -> None:
    assert ranks[0]["damage_on_one_rank"] == {"missed": 0, "again": 64}


def test_the_tighter_budget_decides(ranks) -> None:
    """The newest conversation is what both ranks still have."""
    outcome = ranks[0]["budget_short_on_one_rank"]
    assert outcome == {"stored": [0, 0, 48], "dropped": 0}


def test_a_victim_too_large_for_one_rank_is_dropped_on_both(ranks) -> None:
    assert ranks[0]["victim_too_large_for_one_rank"] == {"dropped": 64, "nodes": 0}


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_load_that_fails_under_way_on_one_rank_fails_on_both(ranks, layer: int) -> None:
    """The first request loads 64 tokens, the second finds them on the device; then neither."""
    outcome = {"loaded": [64, 0, 0, 0], "anew": [2, 0], "late": False}
    assert ranks[0][f"fails at layer {layer}"] == outcome


def test_bytes_that_are_bad_on_one_rank_are_computed_on_both(ranks) -> None:
    outcome = {"loaded": [64, 0, 0, 0], "anew": [2, 0], "late": False}
    assert ranks[0]["bad bytes"] == outcome


def test_a_load_that_stalls_on_one_rank_is_given_up_on_both(ranks) -> None:
    """Only one rank knows it until they agree."""
    for rank, late in enumerate((False, True)):
        outcome = {"loaded": [64, 0, 0, 0], "anew": [2, 0], "late": late}
        assert ranks[rank]["stalls"] == outcome
