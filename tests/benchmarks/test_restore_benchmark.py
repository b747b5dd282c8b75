"""The restore benchmark: what its figures are computed from, and that it refuses non-results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import hicache_cpu
import krul_link
import pytest
import restore
from restore_cells import UNTHROTTLED, Bandwidth, Cell, Results, agreement, percentile, times
from restore_peers import Answer, Shape
from restore_plan import Prompts
from restore_report import BEGIN, END, Run, fill, table

from krul_sglang.restore.cost import Rate
from krul_sglang.restore.pipeline import Link

BENCHMARKS = Path(hicache_cpu.__file__).parent
FACTS = {"settings": {"model": "m", "dtype": "float32", "repeats": 2}}
SHAPE = Shape(history=1000, turn=64, answer=16, turns=10)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("unthrottled", None),
        ("balanced", 10e6),
        ("balanced/4", 2.5e6),
        ("4*balanced", 40e6),
        ("16MB/s", 16e6),
    ],
)
def test_bandwidths(text, rate):
    assert Bandwidth.parse(text).rate(10e6) == rate


@pytest.mark.parametrize("text", ["", "fast", "balanced/0", "0*balanced", "balanced*4", "-3MB/s"])
def test_a_bad_bandwidth_is_one_line(text):
    with pytest.raises(ValueError, match=r"expected unthrottled, .* 16MB/s$"):
        Bandwidth.parse(text)


def test_times():
    assert percentile([3, 1, 2], 50) == 2
    assert percentile(list(range(1, 101)), 99) == 99
    assert percentile([5.0], 99) == 5.0
    few = times([3.0, 1.0, 2.0])
    assert (few["ttft_p50"], few["ttft_min"], few["ttft_max"], few["repeats"]) == (2.0, 1.0, 3.0, 3)
    assert few["ttft_p99"] is None, "three samples have no 99th percentile"
    assert times([float(i) for i in range(100)])["ttft_p99"] == 98.0


def test_agreement_pairs_answers_in_order():
    assert agreement([[1, 2], [3, 4]], [[1, 2], [3, 5], [9, 9]]) == 0.75
    assert agreement([[1, 2]], []) is None


def answer(**found: int) -> Answer:
    nothing = {"ttft": 1.0, "device": 0, "host": 0, "storage": 0, "recomputed": 0, "output": []}
    return Answer(**nothing | found)


@pytest.mark.parametrize(
    ("policy", "found", "problem"),
    [
        ("recompute", {}, None),
        ("recompute", {"host": 992}, "from the host tier"),
        ("hicache_host", {"host": 992}, None),
        ("hicache_file", {"storage": 992}, None),
        ("hicache_file", {"host": 992}, "from the host tier"),
        ("lossless", {"host": 992}, None),
        ("lossless", {"device": 16, "host": 976}, "still on the device"),
        ("lossless", {"host": 500}, "only 500 of 992 tokens"),
        ("partial", {"host": 496, "recomputed": 496}, None),
        ("lossless", {"host": 496, "recomputed": 496}, "496 tokens were computed again"),
    ],
)
def test_an_answer_that_is_no_measurement_says_why(policy, found, problem):
    said = answer(**found).problem(policy, SHAPE)
    assert said is None if problem is None else problem in said


def test_the_pool_holds_one_history_and_its_turn_but_not_two():
    assert SHAPE.pool % 16 == 0
    assert 1000 + 64 + 16 < SHAPE.pool < 2 * SHAPE.pages


def test_what_is_kept_has_room_for_two_histories_and_every_turn_in_whole_pages():
    assert SHAPE.kept >= 2 * 1008 + 10 * 80


def test_conversations_alternate_and_turns_are_new():
    prompts = Prompts([[1, 2, 3, 4], [1, 2, 8, 9]], [[5], [6], [7]])
    assert [prompts.of(n, 3) for n in range(3)] == [[1, 2, 3, 5], [1, 2, 8, 6], [1, 2, 3, 7]]


def row(policy: str, history: int = 512, name: str = "balanced", **figures: object) -> dict:
    rate = None if name == "unthrottled" else 5e6
    cell = {"policy": policy, "history": history, "bandwidth": rate, "bandwidth_name": name}
    return cell | figures


def test_a_file_is_continued(tmp_path):
    path = tmp_path / "out.json"
    done, failed = Cell("lossless", 512, "balanced"), Cell("paper", 512, "balanced")
    results = Results(path, FACTS)
    results.put(row("lossless", ttft_p50=1.0))
    results.put(row("paper", error="gone"))
    again = Results(path, FACTS)
    assert again.find(done)["ttft_p50"] == 1.0
    assert again.find(failed) is None, "an error is measured again"
    again.put(row("paper", ttft_p50=2.0))
    assert len(json.loads(path.read_text())["rows"]) == 2
    assert Results(path, FACTS).find(failed)["ttft_p50"] == 2.0


@pytest.mark.parametrize("place", ["file/out.json", "/proc/nowhere/out.json"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^--json .*out\.json: cannot be written: "):
        Results(tmp_path / place, FACTS)


def test_a_file_of_other_settings_is_refused(tmp_path):
    path = tmp_path / "out.json"
    Results(path, FACTS).put(row("lossless"))
    with pytest.raises(ValueError, match="made with other settings"):
        Results(path, {"settings": {"repeats": 5}})
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a result"):
        Results(path, FACTS)


def test_the_table(tmp_path):
    figures = {"ttft_p50": 1.5, "ttft_min": 1.25, "ttft_max": 2.0, "ttft_p99": None}
    kept = {"raw_bytes": 24_000_000, "restored_tokens": 512.0, "recomputed_tokens": 0.0}
    data = FACTS | {
        "machine": {"cpu": "A CPU", "cores": 2, "gpu": None},
        "versions": {"sglang": "0.5.23"},
        "rows": [
            row("recompute", name="unthrottled", **figures, balanced=16e6, stored_bytes=0, **kept)
            | {"recomputed_tokens": 512, "restored_tokens": 0, "agreement": None},
            row("lossless", **figures, **kept, stored_bytes=20_000_000, agreement=1.0),
            row("paper", error="the server is gone\nmore"),
        ],
    }
    text = table(Run(data))
    assert "balanced at 16.00 MB/s" in text
    assert "| `lossless` | 20.00 | 1.20x | 512 + 0 | 100.0% | 1.50 (1.25 - 2.00) |" in text
    assert "| `recompute` | - | - | 0 + 512 | - | 1.50 (1.25 - 2.00) |" in text
    assert "A CPU, 2 cores; sglang 0.5.23" in text
    assert "Not measured: paper, 512 tokens, balanced: the server is gone" in text
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    fill(page, text)
    assert page.read_text() == f"before\n{BEGIN}\n{text}{END}\nafter\n"


def test_the_link_carries_one_thing_after_the_other(tmp_path):
    rate = tmp_path / "rate.json"
    rate.write_text("1e6")
    link = hicache_cpu.Link(rate)
    first, second = link.carry(1e5, 2e5)
    assert second - first == pytest.approx(0.2)
    (third,) = link.carry(1e5)
    assert third - second == pytest.approx(0.1, abs=0.01)
    rate.write_text("null")
    assert link.carry(1e9, 1e9) == [third, third], "memory carries at once what it is given next"


def test_a_rate_holds_every_link_and_memory_has_none_without():
    memory, disk = Link("memory", 1e12), Link("disk")
    krul = SimpleNamespace(
        loader=SimpleNamespace(_pipeline=SimpleNamespace(links={"memory": memory, "disk": disk})),
        planner=SimpleNamespace(load=SimpleNamespace(links={"memory": Rate(1e-12)})),
    )
    links, believed = krul.loader._pipeline.links, krul.planner.load.links
    krul_link.hold(krul, 5e6)
    assert (memory.bandwidth, disk.bandwidth) == (5e6, 5e6)
    assert {tier: rate.seconds for tier, rate in believed.items()} == {"memory": 2e-7, "disk": 2e-7}
    krul_link.hold(krul, None)
    assert list(links) == ["disk"]
    assert disk.bandwidth is None
    assert list(believed) == ["disk"]
    krul_link.hold(krul, 1e6)
    assert links["memory"] is memory
    assert memory.bandwidth == 1e6


def test_orders_are_obeyed_once(tmp_path, monkeypatch):
    """And a cache that is not Krul's leaves them, which the client finds."""
    evicted = []
    cache = SimpleNamespace(
        evict=lambda params: evicted.append(params.num_tokens), evictable_size=lambda: 116
    )
    controller = SimpleNamespace(scheduler=SimpleNamespace(tree_cache=cache))
    order = tmp_path / "link.json"
    monkeypatch.setenv(krul_link.LINK_FILE, str(order))
    order.write_text('{"keep": 100}')
    krul_link.obey(controller, None)
    assert order.exists()
    cache.krul = SimpleNamespace()
    for _ in range(2):
        krul_link.obey(controller, None)
    assert evicted == [16]
    assert not order.exists()
    order.write_text('{"keep": 120}')
    krul_link.obey(controller, None)
    assert evicted == [16], "there is room"
    assert not order.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--policies", "lossles"], "did you mean lossless?"),
        (["--bandwidths", "fast"], "bandwidth 'fast': expected unthrottled"),
        (["--histories", "9000"], "history 9000: expected 64 to"),
        (["--policies", "partial", "--recompute", "2"], "--krul-recompute=2: not accepted"),
        (["--p99-cell", "lossless"], "expected POLICY:HISTORY:BANDWIDTH"),
        (["--p99-cell", "paper:512:balanced"], "paper:512:balanced: not among what is measured"),
        (["--repeats", "0"], "--repeats 0: expected at least 1"),
    ],
)
def test_bad_flags_are_one_line(tmp_path, monkeypatch, capsys, options, said):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 8192}')
    line = ["restore.py", "--model", str(tmp_path), "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", [*line, "--policies", "recompute", *options])
    assert restore.main() == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.server
@pytest.mark.long
def test_every_peer_brings_a_history_back(chat_model, chat_profile, tmp_path):
    """All policies on live servers, throttled, HiCache's tiers shown by their own counters."""
    out = tmp_path / "out.json"
    command = [sys.executable, BENCHMARKS / "restore.py", "--model", chat_model, "--json", out]
    command += ["--profile", chat_profile, "--histories", "512", "--repeats", "1"]
    command += ["--bandwidths", "balanced", "--alive", "3"]
    subprocess.run(command, check=True)
    rows = {row["policy"]: row for row in json.loads(out.read_text())["rows"]}
    assert all(row["ttft_p50"] > 0 for row in rows.values())
    for exact in ("hicache_host", "hicache_file", "lossless", "lossless_disk"):
        assert rows[exact]["restored_tokens"] >= 496
        assert rows[exact]["agreement"] >= 0.9
    assert rows["predictive"]["stored_bytes"] * 10 < rows["hicache_host"]["stored_bytes"]
    # At the balanced rate raw bytes take about as long as computing them.
    ratio = rows["hicache_host"]["ttft_p50"] / rows["recompute"]["ttft_p50"]
    assert 0.7 < ratio < 1.6
    assert Results(out, {}).find(Cell("recompute", 512, UNTHROTTLED.name))
