"""`sglang serve`, SGLang's recommended command, serves and restores like the older one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from krul_sglang.live_server import LiveServer


@pytest.mark.server
def test_sglang_serve_restores(tiny, talk, host_hits):
    """Started through the console script, from the environment instead of flags."""
    script = Path(sys.executable).with_name("sglang")
    flags = ["--dtype", "float32", "--skip-tokenizer-init", "--max-total-tokens", "192"]
    env = {"KRUL_ENABLED": "1", "KRUL_POLICY": "lossless"}
    model = tiny("qwen3", 64, 4, "yarn")
    with LiveServer(model, flags, entry=(str(script), "serve"), env=env) as server:
        done = talk(server, turns=2)
        state = server.krul()
    assert state["policy"] == "lossless"
    assert state["restored_tokens"] == host_hits(done) > 0
