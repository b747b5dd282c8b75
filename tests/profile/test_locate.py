"""The profile a server finds or makes by itself: once, by one process, whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import write_model

from krul_sglang.profile.base import ProfileError
from krul_sglang.profile.locate import default_path, ensure, load_ranks

pytestmark = pytest.mark.process

MODEL = {"max_position_embeddings": 4096, "hidden_size": 32, "head_dim": 8}
CHILD = (
    "import sys; from krul_sglang.profile.locate import ensure; "
    "ensure(sys.argv[1], 1, lambda line: print('TOLD', line, flush=True))"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), "llama", **MODEL)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def child(model: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(model)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_made_once_and_again_when_damaged(model: Path, cache: Path) -> None:
    told: list[str] = []
    path = ensure(model, 1, told.append)
    assert path == default_path(model)
    assert path.is_relative_to(cache)
    assert len(told) == 1
    assert "no profile yet" in told[0]
    (made,) = load_ranks(model, path, 1)
    assert ensure(model, 1, told.append) == path
    assert len(told) == 1
    path.write_bytes(path.read_bytes()[:-1000])
    ensure(model, 1, told.append)
    assert "damaged" in told[1]
    # Of the same model and the same texts: calibration draws nothing at random.
    assert load_ranks(model, path, 1)[0].id == made.id


def test_two_servers_calibrate_once(model: Path, cache: Path) -> None:
    both = [child(model) for _ in range(2)]
    lines = [line for process in both for line in process.communicate(timeout=200)[0].splitlines()]
    told = sorted(line for line in lines if line.startswith("TOLD"))
    assert [process.returncode for process in both] == [0, 0]
    assert len(told) == 2
    assert told[0].startswith("TOLD another process calibrates")
    assert told[1].startswith("TOLD calibrating")
    load_ranks(model, default_path(model), 1)


@pytest.mark.long
def test_killed_half_way_it_is_made_anew(model: Path, cache: Path) -> None:
    process = child(model)
    # Calibration prints its stages; this one is half way.
    assert any(line.startswith("sampling") for line in process.stdout)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=20)
    with pytest.raises(ProfileError):
        load_ranks(model, default_path(model), 1)
    load_ranks(model, ensure(model, 1, lambda line: None), 1)
