"""The ways in: sglang.Engine, the frontend language, a start from the repository root."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from dialogue import KRUL, SMALL_POOL

from krul_sglang.live_server import server_environment

pytestmark = pytest.mark.server

PROGRAMS = Path(__file__).parent / "programs"
ROOT = Path(__file__).resolve().parents[2]


def run_program(name: str, *arguments: str, cwd: Path) -> dict:
    """Run a program of this folder in a child process; its RESULT line as JSON."""
    done = subprocess.run(
        [sys.executable, str(PROGRAMS / name), *arguments],
        capture_output=True,
        text=True,
        env=server_environment(),
        cwd=cwd,
        timeout=280,
        check=False,
    )
    line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT")), None)
    assert line is not None, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(line.removeprefix("RESULT"))


def test_engine(chat_model, tmp_path):
    """engine_kwargs() is all an offline program needs; the second round is restored."""
    rng = random.Random(4)
    prompts = [[rng.randrange(500, 40000) for _ in range(100)] for _ in range(3)]
    result = run_program("engine.py", str(chat_model), json.dumps(prompts), cwd=tmp_path)
    first, second = result["answers"][:3], result["answers"][3:]
    assert [a["ids"] for a in first] == [a["ids"] for a in second]
    assert all(a["host"] == 0 for a in first)
    # All but what the later prompts left on the device (and the last, recomputed token).
    assert sum(a["host"] for a in second) >= 200
    assert result["krul"]["restored_tokens"] == sum(a["host"] for a in second)


def test_frontend_language_program(lossless_server, tmp_path):
    """A chat program is evicted between its turns, restored, and answers the same."""
    lossless_server.flush()
    result = run_program("chat.py", lossless_server.url, cwd=tmp_path)
    assert result["evicted"] == result["plain"]
    assert all(details["host"] > 0 for details in result["details"][1:])


def serves_from_root(serve_from, env: dict[str, str]) -> None:
    with serve_from(*KRUL, *SMALL_POOL, env=env, cwd=ROOT) as server:
        assert server.generate([1, 2, 3], 2)["output_ids"]
        assert server.krul()["policy"] == "lossless"


def test_start_from_the_repository_root(serve):
    """The folders kernels/ and demo/ beside the server shadow no package."""
    serves_from_root(serve, {})


@pytest.mark.long
def test_start_from_the_repository_root_with_pypi_kernels(serve, tmp_path):
    """The same where the PyPI package called `kernels` is installed."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path)]
    if subprocess.run([*pip, "kernels<0.15,>=0.14.1"], check=False, timeout=120).returncode:
        pytest.skip("the package index does not serve `kernels`")
    serves_from_root(serve, {"PYTHONPATH": str(tmp_path)})
