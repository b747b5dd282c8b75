"""The disk tier's benchmark runs, and compares what it says it does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import disk_tier
import pytest


def run(monkeypatch, capsys, root: Path, *flags: str) -> dict:
    monkeypatch.setattr(disk_tier, "BATCH_BYTES", 400_000)
    monkeypatch.setattr(sys, "argv", ["disk_tier.py", "--root", str(root), *flags])
    disk_tier.main()
    return json.loads(capsys.readouterr().out)


def test_it_compares_and_leaves_nothing(monkeypatch, capsys, tmp_path) -> None:
    flags = ("--sizes", "20K,100K", "--entries", "300", "--repeats", "2")
    result = run(monkeypatch, capsys, tmp_path / "work", *flags)
    assert list(result["sizes"]) == ["20480", "102400"]
    for found in result["sizes"].values():
        for title in ("write", "write synced"):
            for against in ("plain", "crc"):
                ratio = found[title][f"tier/{against}"]
                assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"] < 5
        for title in ("read", "read cold"):
            assert 0 < found[title]["tier/plain"]["median"] < 5
    assert result["start_up"]["300"]["seconds"]["median"] > 0
    assert list((tmp_path / "work").iterdir()) == []


def test_a_directory_that_is_in_use_is_refused(monkeypatch, capsys, tmp_path) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, capsys, tmp_path)
    assert ended.value.code == 2
    assert "not empty" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "kept"
