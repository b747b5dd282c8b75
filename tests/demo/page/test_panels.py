"""The panels of the page: what they show of what the server says."""

from __future__ import annotations

import re

import pytest
from web.compare import Outcome
from web.compare_panel import compare_panel
from web.lanes_panel import lanes_panel
from web.observer import Sample
from web.sessions import Session, Standing, standing
from web.similarity_panel import similarity_panel
from web.storage_panel import POINTS, storage_panel, thinned
from web.strategy_panel import strategy_panel
from web.turn_panel import turn_panel, verdict
from web.turns import Turn


def layer(number: int, **changes) -> dict:
    return {
        "layer": number, "references": [number - 1] if number else [], "dropped": 0.0,
        "step": 0.0002, "stored_bytes": 1000 * (number + 1), "ratio": 30.0,
        "classes": [0.1, 0.2, 0.3, 0.4], **changes,
    }  # fmt: skip


def detail(**changes) -> dict:
    return {
        "codecs": ["predictive"], "stored_tokens": 90, "stored_bytes": 10_000,
        "class_factors": [0.35, 0.59, 1.0, 1.68],
        "layers": [layer(n) for n in range(6)],
        "segments": [
            {"state": "sealed", "codec": "predictive", "step": 0.0002, "tokens": 90},
        ],
        "similarity": {
            "measure": "correlation", "layers": [0, 2, 4], "tokens": 90,
            "matrix": [[1.0, 0.5, None], [0.5, 1.0, -0.2], [None, -0.2, 1.0]],
        },
        **changes,
    }  # fmt: skip


def test_the_heat_map_has_a_cell_a_layer_and_an_arc_a_reference() -> None:
    drawn = strategy_panel(detail())
    assert drawn.count("<path") == 5
    assert drawn.count("<i ") == 6 * 6, "step, four classes, bytes"
    assert "dropped" not in drawn
    dropped = strategy_panel(detail(layers=[layer(n, dropped=n / 10) for n in range(6)]))
    assert dropped.count("<i ") == 6 * 7
    assert "50 % dropped" in dropped
    plain = [layer(n, references=[], step=None, classes=None) for n in range(6)]
    exact = strategy_panel(detail(layers=plain, class_factors=[], codecs=["lossless"]))
    assert exact.count("<i ") == 6
    assert "stands alone" in exact


@pytest.mark.parametrize("panel", [strategy_panel, similarity_panel])
def test_panels_without_anything_say_what_to_do(panel) -> None:
    assert "k-empty" in panel({})


def test_the_matrix_shades_what_is_alike() -> None:
    drawn = similarity_panel(detail())
    assert drawn.count('<i style="--v:1.00"') == 3
    assert drawn.count('<i style="--v:0.00"') == 2, "a negative correlation is not alike"
    assert drawn.count("k-none") == 2
    found = {"measure": "distance", "layers": [0, 1], "tokens": 9, "matrix": [[0, 4], [4, 0]]}
    drawn = similarity_panel(detail(similarity=found))
    assert drawn.count('<i style="--v:1.00"') == drawn.count('<i style="--v:0.00"') == 2


def test_lanes_cover_the_restore_and_show_its_bubbles() -> None:
    trace = {
        "tokens": 90, "recomputed_tokens": 0, "new_tokens": 10, "stored_bytes": 10_000,
        "makespan_seconds": 1.0, "bubble_seconds": {"load": 0.25, "compute": 0.5},
        "forward": [0.1, 1.0], "waits": [[0.1, 0.2], [0.5, 0.5]],
        "loads": [{"fetch": [[[-0.5, -0.1]], []], "decode": [[[0.0, 0.2]], [[0.2, 0.75]]]}],
    }  # fmt: skip
    drawn = lanes_panel(trace)
    assert "loading idle 25 %, computing idle 50 %" in drawn
    assert "left:20.00%;width:55.00%" in drawn
    assert drawn.count('class="k-wait"') == 1, "the second layer was there already"
    assert "link" not in drawn, "it was fetched before the restore began"
    assert "k-empty" in lanes_panel(None)


def test_storage_is_stacked_and_thinned() -> None:
    history = [Sample(n, {"memory": 10 * n, "disk": 5}, 3, 100 * n) for n in range(1000)]
    assert POINTS <= len(thinned(history)) <= 2 * POINTS
    assert thinned(history)[-1] is history[-1]
    drawn = storage_panel(history)
    assert drawn.count("k-area") == 3
    assert "17 min ago" in drawn
    assert "k-empty" in storage_panel(history[:1])


def test_the_verdict_says_what_the_guard_chose() -> None:
    held = Standing("stored", tokens=100, stored=90)
    krul = {"quality": {"budget": 0.01, "step": 0.0002}, "fallbacks": 0}
    assert "at the budget&#x27;s step" in verdict(held, krul, detail())
    finer = [{"state": "sealed", "codec": "predictive", "step": 0.0001, "tokens": 60},
             {"state": "sealed", "codec": "lossless", "step": None, "tokens": 30}]  # fmt: skip
    said = verdict(held, {**krul, "fallbacks": 2}, detail(segments=finer))
    assert "2.0 times finer" in said
    assert "33 % of the tokens exact" in said
    assert "2 lossless fallbacks" in said
    assert "nothing to judge" in verdict(held, krul, {})


def test_the_turn_panel_shows_counts_and_times() -> None:
    one = Session().current
    assert "k-empty" in turn_panel(one, standing(one, []), {}, {})
    one.turns = [Turn(100, 4, 80, 80, 6, 10, ttft=0.5, recompute_ttft=2.0)]
    drawn = turn_panel(one, standing(one, []), {}, {})
    assert re.findall(r'data-count="(\w+)">(\d+)', drawn) == [
        ("device", "4"), ("restored", "80"), ("recomputed", "6"), ("new", "10"),
    ]  # fmt: skip
    assert "4.0 times sooner" in drawn


def test_compared_policies_are_rows_with_bars() -> None:
    outcomes = [
        Outcome("recompute", "done", [3.0, 5.0, 4.0], 0, 640, same=1.0),
        Outcome("predictive", "failed", error="it ended"),
    ]
    drawn = compare_panel(outcomes, "busy")
    assert drawn.count("<tr ") == 5
    assert "4.00 s" in drawn
    assert "it ended" in drawn
    assert 'role="alert"' in drawn
