"""A model's first start calibrates by itself, says so, and serves with what it made."""

from __future__ import annotations

import random

import pytest
from tiny_model import write_model

pytestmark = pytest.mark.server


def test_the_first_start_calibrates(serve, tmp_path):
    model = write_model(tmp_path / "model", "llama", head_dim=64, max_position_embeddings=4096)
    flags = ("--enable-krul", "--max-total-tokens", "192")
    rng = random.Random(1)
    prompts = [[rng.randrange(1, 90) for _ in range(100)] for _ in range(3)]
    with serve(*flags, env={"XDG_CACHE_HOME": str(tmp_path)}, model=model) as server:
        assert "Krul: calibrating model (it has no profile yet)" in server.log.read_text()
        (path,) = (tmp_path / "krul").glob("*.safetensors")
        for prompt in prompts:
            server.generate(prompt, 2)
        again = server.generate(prompts[0], 2)
        assert again["meta_info"]["cached_tokens_details"]["host"] > 0
        state = server.krul()
    assert state["policy"] == "predictive"
    assert state["memory"]["profile"] > 0
    assert state["lossy_segments"] > 0
    assert state["protected_tokens"] == state["lost_segments"] == 0
    assert path.stat().st_size > state["memory"]["profile"]
