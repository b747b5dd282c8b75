"""A model's first start calibrates by itself, says so, and serves with what it made."""

from __future__ import annotations

import random

import pytest
from tiny_model import write_model

pytestmark = pytest.mark.server


def come_back(server) -> dict:
    """Three conversations that evict each other, the first one again; the krul block."""
    rng = random.Random(1)
    prompts = [[rng.randrange(1, 90) for _ in range(100)] for _ in range(3)]
    first, *_ = [server.generate(prompt, 2) for prompt in prompts]
    again = server.generate(prompts[0], 2)
    assert again["meta_info"]["cached_tokens_details"]["host"] > 0
    assert len(again["output_ids"]) == len(first["output_ids"])
    return server.krul()


def test_the_first_start_calibrates(serve, tmp_path):
    model = write_model(tmp_path / "model", "llama", head_dim=64, max_position_embeddings=4096)
    flags = ("--enable-krul", "--max-total-tokens", "192")
    with serve(*flags, env={"XDG_CACHE_HOME": str(tmp_path)}, model=model) as server:
        assert "Krul: calibrating model (it has no profile yet)" in server.log.read_text()
        (path,) = (tmp_path / "krul").glob("*.safetensors")
        state = come_back(server)
    assert state["policy"] == "predictive"
    assert state["memory"]["profile"] > 0
    assert state["lossy_segments"] > 0
    assert state["protected_tokens"] == state["lost_segments"] == 0
    assert path.stat().st_size > state["memory"]["profile"]


@pytest.mark.long
def test_a_rope_that_cannot_be_undone_is_stored_losslessly(serve, tmp_path):
    """The default policy serves the model all the same: it says so, and counts every segment."""
    rope = {"rope_type": "dynamic", "factor": 1.0, "alpha": 1000.0, "rope_theta": 10000.0}
    model = write_model(tmp_path / "model", "llama", head_dim=64, rope_parameters=rope)
    flags = ("--enable-krul", "--max-total-tokens", "192")
    with serve(*flags, env={"XDG_CACHE_HOME": str(tmp_path)}, model=model) as server:
        state = come_back(server)
        log = server.log.read_text()
    assert "cannot be undone" in log
    assert not (tmp_path / "krul").exists(), "nothing was calibrated"
    assert state["policy"] == "predictive"
    assert state["fallbacks"] > 0
    assert state["memory"]["profile"] == 0
    assert state["protected_tokens"] == state["lost_segments"] == 0
