"""benchmarks/ranking.py: the replay counts what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ranking import Disk, day, rankings, replay

TURNS = day(40, 0.5, seed=3)
WHOLE = sum(turn.adds.footprint for turn in TURNS) * 2


@pytest.mark.parametrize("number", range(len(rankings())))
def test_with_room_for_all_everything_is_found(number) -> None:
    tokens, seconds = replay(TURNS, Disk(WHOLE, rankings()[number]))
    assert tokens.asked > 0
    assert (tokens.share, seconds.share) == (1, 1)


@pytest.mark.parametrize("number", range(len(rankings())))
def test_a_budget_is_kept_and_costs_hits(number) -> None:
    disk = Disk(WHOLE / 40, rankings()[number])
    tokens, _ = replay(TURNS, disk)
    assert disk.index.used <= disk.limit
    assert 0 < tokens.share < 1


def test_without_room_nothing_is_found() -> None:
    tokens, seconds = replay(TURNS, Disk(0, rankings()[0]))
    assert (tokens.hit, seconds.hit) == (0, 0)


def test_a_second_visit_is_what_is_written() -> None:
    always, second = (Disk(WHOLE, rankings()[0]) for _ in range(2))
    replay(TURNS, always)
    tokens, _ = replay(TURNS, second, memory=WHOLE, admit="second-visit")
    assert tokens.share == 1, "memory had it until it came back"
    once = {t.adds for t in TURNS} - {
        name for t in TURNS if len(t.history) > 1 for name in t.history
    }
    assert any(name in always for name in once)
    returned = {t.adds for t in TURNS if len(t.history) > 1}
    assert not any(name in second for name in once - returned)


def test_the_command(tmp_path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "ranking.py"
    out = tmp_path / "ranking.json"
    command = [sys.executable, script, "--conversations", "12", "--seeds", "1"]
    done = subprocess.run([*command, "--json", out], capture_output=True, text=True, check=True)
    assert "second-visit" in done.stdout
    assert len(json.loads(out.read_text())["rows"]) == 60
    bad = subprocess.run([*command, "--seeds", "0"], capture_output=True, text=True, check=False)
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: ")
