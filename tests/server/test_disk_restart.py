"""A server on the directory of one that was killed: yesterday's conversations come back."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import requests
from dialogue import KRUL, SMALL_POOL

from krul_sglang.live_server import LiveServer

pytestmark = pytest.mark.server

LENGTH, ANSWER = 150, 6


def talks(count: int) -> list[list[int]]:
    rng = random.Random(21)
    opening = [rng.randrange(500, 40000) for _ in range(20)]  # a system prompt, say
    return [
        [*opening, *(rng.randrange(500, 40000) for _ in range(LENGTH - 20))] for _ in range(count)
    ]


def disk(server: LiveServer) -> dict:
    return server.krul()["tiers"]["disk"]


def wait_written(server: LiveServer) -> None:
    until = time.monotonic() + 60
    while True:
        state = server.krul()
        waiting = state["segments"] - state["sealed_segments"] + state["tiers"]["disk"]["unwritten"]
        if not waiting:
            return
        assert time.monotonic() < until, state
        time.sleep(0.1)


def kill_mid_load(server: LiveServer, prompt: list[int]) -> None:
    """SIGKILL to the whole server while it restores a conversation."""

    def ask() -> None:
        with pytest.raises(requests.RequestException):
            server.generate(prompt, ANSWER)

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.5)  # the link takes seconds
    assert asking.is_alive()
    os.killpg(server.process.pid, signal.SIGKILL)
    asking.join(30)
    server.stop()  # reaps it


def restart(serve, plain: LiveServer, root: Path, count: int) -> None:
    flags = (*KRUL, *SMALL_POOL, "--krul-dir", str(root))
    first = talks(count)
    with serve(*flags, "--krul-link-bandwidth", "2MB/s", killed=True) as server:
        for prompt in first:
            server.generate(prompt, 1)
        server.generate([*range(1000, 1200)], 1)
        wait_written(server)
        held = disk(server)
        assert held["bytes"] > 0
        assert not held["degraded"]
        stored = sum(file.stat().st_size for file in root.rglob("*.krul"))
        assert stored <= held["bytes"] <= stored + 4096 * held["entries"]
        kill_mid_load(server, [*first[0], 9, 9, 9])
    with serve(*flags) as server:
        assert disk(server)["entries"] == held["entries"]
        # Whose segment holds the opening that all share returns last.
        for n, prompt in reversed(list(enumerate(first))):
            turn = [*prompt, 700 + n, 800 + n]
            answer = server.generate(turn, ANSWER)
            assert answer["output_ids"] == plain.generate(turn, ANSWER)["output_ids"]
            details = answer["meta_info"]["cached_tokens_details"]
            assert details["host"] + details["device"] >= LENGTH - 1
            assert details["host"] >= LENGTH - 21
        state = server.krul()
        assert state["lost_segments"] == 0
        assert state["tiers"]["disk"]["damaged"] == 0
        assert state["adopted_tokens"] >= count * (LENGTH - 21)
    assert not list(root.rglob(".tmp-*"))


def test_a_killed_server_leaves_its_conversations(serve, plain_server, tmp_path) -> None:
    restart(serve, plain_server, tmp_path / "tier", 4)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_fifty_conversations_survive_a_kill(serve, plain_server, tmp_path) -> None:
    restart(serve, plain_server, tmp_path / "tier", 50)
