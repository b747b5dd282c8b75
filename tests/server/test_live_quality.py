"""Twenty conversations on a live server agree with a run that was never evicted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.server, pytest.mark.long]

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def benchmark(name: str, *options: object) -> None:
    subprocess.run([sys.executable, BENCHMARKS / name, *options], check=True)


def test_restored_conversations_agree(chat_model, chat_profile, tmp_path):
    """Chats and program texts that the calibration never saw; the ratio is of sealed bytes."""
    texts, out = tmp_path / "texts.jsonl", tmp_path / "live.json"
    benchmark("quality.py", "--collect", texts, "--per-source", "10")
    files = ("--model", chat_model, "--profile", chat_profile, "--conversations", texts)
    benchmark("live_quality.py", *files, "--json", out)
    figures = json.loads(out.read_text())
    assert len(figures["conversations"]) == 20
    assert figures["restored_least"] > 900
    assert figures["top1"] >= 0.95
    krul = figures["krul"]
    assert krul["stored_bytes"] == krul["memory"]["tier"]
    assert krul["ratio"] == pytest.approx(krul["raw_bytes"] / krul["stored_bytes"], abs=1e-3)
    assert krul["ratio"] > 16  # of float32 rows
