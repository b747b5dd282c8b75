"""The README's figures are those of the committed results: `make docs` would change nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from pages import ROOT

SCRIPT = ROOT / "benchmarks" / "headline.py"
RESTORE = ROOT / "docs" / "restore.json"


def written(folder: Path, *options: str) -> str:
    """What the script makes of the README."""
    copy = folder / "README.md"
    copy.write_text((ROOT / "README.md").read_text())
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--readme", str(copy), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return copy.read_text()


def test_the_readme_is_what_the_results_say(tmp_path: Path) -> None:
    assert written(tmp_path) == (ROOT / "README.md").read_text(), "run `make docs`"


def test_another_result_is_another_table(tmp_path: Path) -> None:
    """Nothing in the table is written by hand."""
    found = json.loads(RESTORE.read_text())
    for row in found["rows"]:
        row["ttft_p50"] = 101.0
    other = tmp_path / "restore.json"
    other.write_text(json.dumps(found))
    page = written(tmp_path, "--restore", str(other))
    table = [line for line in page.splitlines() if line.startswith("|") and " s (" in line]
    assert len(table) == 4
    assert all(line.count("101.0 s (") == 2 for line in table)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "headline.png"
    written(tmp_path, "--png", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (ROOT / "docs" / "headline.png").is_file()


def test_a_missing_result_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--restore", str(tmp_path / "none.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'none.json'}: No such file or directory\n"
