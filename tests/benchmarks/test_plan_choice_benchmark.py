"""The benchmark of the planner's choice: its points, its conclusions, its file and its picture."""

from __future__ import annotations

import json
import sys

import plan_choice
import pytest
from plan_cells import (
    Sample,
    beside,
    conclude,
    hopeless,
    link_seconds,
    moved_after,
    points,
    settled_after,
)
from plan_control import Order
from plan_plot import plot
from plan_returns import PHASES, Plan
from plan_run import line
from restore_cells import Bandwidth, Cell, Results


def sample(load: int, ttft: float, **figures) -> Sample:
    usual = {
        "number": 0,
        "forced": None,
        "load": load,
        "chosen": load,
        "ttft": ttft,
        "predicted": ttft,
        "makespan": ttft,
        "computing": ttft,
        "load_bubble": 0.1,
        "compute_bubble": 0.2,
        "stored_bytes": 1000,
        "expected": [[0, 2.0], [64, 1.0]],
        "believed": 500.0,
    }
    return Sample(**usual | figures)


def forced(load: int, *seconds: float) -> list[Sample]:
    return [sample(load, ttft, forced=load, number=n) for n, ttft in enumerate(seconds)]


def test_points_are_whole_pages_from_nothing_to_everything():
    assert points(1024, 9) == [0, 128, 256, 384, 512, 640, 768, 896, 1024]
    assert points(100, 3) == [0, 48, 96], "the last page is not full, and not stored"
    assert points(32, 9) == [0, 16, 32]


def test_points_beside_a_choice_are_whole_pages_of_the_history():
    assert beside(500, 1024) == [368, 432, 560, 624]
    assert beside(0, 512) == [32, 64]
    assert beside(512, 512) == [448, 480]


def test_points_that_the_link_rules_out():
    assert link_seconds(256, 512, 1000, 100) == 5
    # A byte takes 10 ms: everything 10 s, half of it 5 s.
    assert hopeless([0, 256, 512], 512, 1000, 100, best=2.0) == {512: 10}
    assert hopeless([0, 256, 512], 512, 1000, 100, best=4.0) == {}


def test_the_planner_is_compared_with_the_best_point():
    own = [sample(64, 1.0), sample(64, 1.2, number=1), sample(128, 1.1, number=2)]
    tried = [*forced(0, 3.0, 3.0, 3.0), *forced(64, 1.0, 1.0, 1.4), *forced(128, 1.5, 1.5, 0.5)]
    found = conclude(own, tried, {512: 9.0})
    assert found["best_load"] == 64
    assert found["best_p50"] == 1.0
    assert found["planner_load"] == 64
    assert found["ratio"] == pytest.approx(1.1)
    assert found["round_ratios"] == pytest.approx([1.0, 1.2, 1.1 / 1.4])
    assert not found["within"]
    assert found["undecided"], "the rounds lie on both sides of the claim"
    assert [point["load"] for point in found["points"]] == [0, 64, 128]
    assert found["skipped"] == [{"load": 512, "link_seconds": 9.0}]


def test_a_setting_where_the_planner_is_right():
    found = conclude([sample(0, 1.02)] * 3, [*forced(0, 1.0, 1.0, 1.0), *forced(64, 2, 2, 2)], {})
    assert found["within"]
    assert not found["undecided"]


def test_the_worst_prediction_counts_and_bubbles_are_shares():
    own = [sample(64, 1.0, predicted=1.1), sample(64, 1.0, predicted=0.7, makespan=1.0)]
    found = conclude(own, forced(64, 1.0, 1.0), {})
    assert found["prediction_error"] == pytest.approx(-0.3)
    assert found["bubble_share"] == pytest.approx({"load": 0.1, "compute": 0.2})


def test_where_nothing_was_loaded_there_are_no_bubbles():
    nothing = [sample(0, 1.0, load_bubble=None, compute_bubble=None)]
    assert conclude(nothing, forced(0, 1.0), {})["bubble_share"] == {"load": None, "compute": None}


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ([512, 448, 512], [512, 256], 2),
        ([512, 448, 512], [448, 512], None),
        ([0, 0, 0, 64, 64, 64], [0], 1),  # what it chose long ago is not usual any more
    ],
)
def test_after_how_many_restores_the_choice_moved(before, after, found):
    assert moved_after([sample(n, 1) for n in before], [sample(n, 1) for n in after]) == found


def test_from_which_restore_on_the_choice_stays():
    def settled(*loads: int) -> int:
        return settled_after([sample(load, 1.0) for load in loads])

    assert settled(512, 512, 448, 384, 384) == 3
    assert settled(0, 512, 0) == 3
    assert settled(64, 0) == 1


def test_an_order_is_read_as_it_was_put(tmp_path):
    path = tmp_path / "order.json"
    Order(5e6, load=64, points=[0, 64]).put(path)
    read = json.loads(path.read_text())
    assert read == {
        "bandwidth": 5e6,
        "relearn": False,
        "load": 64,
        "teach": True,
        "points": [0, 64],
        "evict": True,
    }
    assert [one.name for one in tmp_path.iterdir()] == ["order.json"]


def choice_row(**change) -> dict:
    figures = conclude(
        [sample(64, 1.0), sample(64, 1.1)], [*forced(0, 2.0, 2.1), *forced(64, 1.0, 1.0)], {128: 9}
    )
    cell = {"policy": "predictive", "history": 128, "bandwidth": 1e6}
    return cell | {"bandwidth_name": "balanced"} | figures | {"warm_up": []} | change


def cut_row() -> dict:
    samples = {phase: [vars(sample(64, 1.0))] * count for phase, count in PHASES.items()}
    figures = {"moved_after": 2, "settled_after": 3, "moved_back_after": None}
    figures |= {"settled_back_after": 1, "phases": samples}
    cell = {"policy": "predictive", "history": 128, "bandwidth": 1e6}
    return cell | {"bandwidth_name": "balanced, then a tenth"} | figures


FACTS = {
    "machine": {"cpu": "A CPU", "cores": 2, "gpu": None},
    "versions": {"sglang": "0.5.23"},
    "settings": {"model": "m", "dtype": "float32"},
}


def test_the_file_keeps_every_setting_beside_the_others(tmp_path):
    path = tmp_path / "plan.json"
    results = Results(path, FACTS)
    for row in (choice_row(), choice_row(policy="partial"), cut_row()):
        results.put(row)
    again = Results(path, FACTS)
    assert len(again.data["rows"]) == 3
    known = again.find(Cell("predictive", 128, "balanced"))
    assert known["points"][1]["samples"][0]["forced"] == 64
    assert again.find(Cell("predictive", 128, "balanced, then a tenth"))["moved_after"] == 2


def test_rows_are_told_in_a_line():
    assert "best 1.00 s at 64, planner 1.05 s at 64: 1.050" in line(choice_row())
    assert "before 64 64 64 64 64; cut 64" in line(cut_row())
    assert line({"history": 128, "bandwidth_name": "b", "error": "gone"}).endswith("error: gone")


def test_the_summary():
    said = plan_choice.summary([choice_row(), choice_row(within=False), cut_row()])
    assert "1 of 2 settings" in said[0]
    assert "changed at restore 2 and stayed from 3 on; when it was mended, it never" in said[2]
    assert plan_choice.summary([]) == []


def test_the_plot_is_a_png(tmp_path):
    path = tmp_path / "plan.png"
    rows = [choice_row(), choice_row(bandwidth=None), cut_row(), {"error": "gone"}]
    plot(FACTS | {"rows": rows}, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to plot"):
        plot(FACTS | {"rows": [{"error": "gone"}]}, path)


@pytest.fixture
def options(tmp_path, monkeypatch):
    """``options("--points", "9")``: the command line, with a model that has only a length."""
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 8192}')

    def read(*more: str):
        begin = ["plan_choice.py", "--model", str(tmp_path), "--json", str(tmp_path / "out.json")]
        begin += ["--policy", "partial", "--dtype", "float32"]
        monkeypatch.setattr(sys, "argv", [*begin, *more])
        return plan_choice.read_options()

    return read


def test_the_defaults_are_twelve_settings(options):
    plan: Plan = plan_choice.read_plan(options())
    assert len(plan.histories) * len(plan.bandwidths) == 12
    assert plan.cut_history in plan.histories
    assert plan.cut_bandwidth == plan.bandwidths[-1]
    assert all(isinstance(bandwidth, Bandwidth) for bandwidth in plan.bandwidths)


def test_every_return_has_a_turn_of_its_own(options):
    plan = plan_choice.read_plan(options("--repeats", "2", "--points", "3", "--warm-up", "1"))
    assert plan.turns == 3 + 3 * (1 + 8 * (2 + 3 + 4)) + sum(PHASES.values())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--policy", "lossless"], "--policy lossless: expected one of predictive, paper, partial"),
        (["--bandwidths", "fast"], "bandwidth 'fast': expected unthrottled"),
        (["--histories", "a"], "--histories a: expected numbers of tokens"),
        (["--histories", "9000"], "history 9000: expected 64 to"),
        (["--histories", "64", "--points", "9"], "--points 9: a history of 64 has fewer pages"),
        (["--points", "1"], "--points 1: expected at least 2"),
        (["--warm-up", "0"], "--warm-up 0: expected at least 1"),
        (["--cut-history", "100"], "--cut-history 100: not among --histories"),
        (["--cut-bandwidth", "slow"], "bandwidth 'slow': expected"),
        (["--profile", "/nowhere"], "--profile /nowhere: no such file"),
        (["--model", "/nowhere"], "no model in /nowhere"),
    ],
)
def test_bad_flags_are_one_line(options, capsys, more, said):
    options(*more)
    assert plan_choice.main() == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
