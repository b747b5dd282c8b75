"""The benchmark of what measuring attention costs: its conclusions, and one conversation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import selection_cost
from selection_cost import Conversation, Turn, conclude


def conversation(*ratios: float, evicted: float) -> Conversation:
    turns = [{"measured": Turn(2 * r, 3 * r), "unmeasured": Turn(2.0, 3.0)} for r in ratios]
    return Conversation(turns, {"measured": evicted, "unmeasured": 1.0})


def test_totals_and_their_interval():
    found = conclude([conversation(1.0, 1.2, evicted=1.5), conversation(1.1, 1.1, evicted=1.1)])
    wall = found["turn_seconds"]
    assert wall["median"] == wall["total"] == pytest.approx(1.1)
    assert wall["range"] == [1.0, 1.2]
    assert wall["total_95"] == pytest.approx([1.1, 1.1]), "both conversations say the same"
    assert found["turn_cpu_seconds"]["total"] == pytest.approx(1.1)
    assert found["eviction_cpu_seconds"]["total"] == pytest.approx(1.3)
    assert found["eviction_cpu_seconds"]["total_95"] == pytest.approx([1.1, 1.5])
    # (3.0 + 3.6 + 1.5 + 3.3 + 3.3 + 1.1) / (4 * 3.0 + 2 * 1.0)
    assert found["all_cpu_seconds"]["total"] == pytest.approx(15.8 / 14)


@pytest.mark.server
@pytest.mark.long
def test_one_conversation(chat_model, chat_profile, tmp_path):
    out = tmp_path / "cost.json"
    options = ["--rounds", "1", "--turns", "1", "--answer", "33", "--json", str(out)]
    command = [sys.executable, str(Path(selection_cost.__file__)), "--model", str(chat_model)]
    subprocess.run([*command, "--profile", str(chat_profile), *options], check=True)
    found = json.loads(out.read_text())
    (own,) = found["taken"]
    assert [set(turn) for turn in own["turns"]] == [{"measured", "unmeasured"}]
    assert set(own["evicted"]) == {"measured", "unmeasured"}
    assert found["taps_bytes"] > 0
