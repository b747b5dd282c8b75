"""The ledger tells the truth: what the store says it holds is what the process grew by."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.process
@pytest.mark.parametrize("codec", ["lossless", "pair_merge"])
def test_ledger_agrees_with_rss(codec):
    """Within 10 % after 45 segments of mixed sizes, a third of them released again."""
    child = Path(__file__).parent / "rss_child.py"
    done = subprocess.run(
        [sys.executable, str(child), codec], capture_output=True, text=True, check=True
    )
    figures = json.loads(done.stdout)
    assert figures["ledger"] > 50e6
    assert figures["rss"] == pytest.approx(figures["ledger"], rel=0.1)
