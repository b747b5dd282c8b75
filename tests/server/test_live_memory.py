"""What a live server says it holds is what its scheduler process really grew by."""

from __future__ import annotations

import random
import time

import psutil
import pytest
import requests

pytestmark = [pytest.mark.server, pytest.mark.long]


def scheduler_of(server) -> psutil.Process:
    children = psutil.Process(server.process.pid).children(recursive=True)
    return next(child for child in children if "scheduler" in child.name())


def settled(server, process: psutil.Process) -> tuple[int, int]:
    """Resident bytes and the ledger's bytes, once nothing waits to be encoded."""
    deadline, last = time.monotonic() + 60, -1
    while time.monotonic() < deadline:
        memory, rss = server.krul()["memory"], process.memory_info().rss
        if memory["staging"] == 0 and rss == last:
            break
        last = rss
        time.sleep(0.5)  # between two readings that have to agree
    return rss, sum(memory[kind] for kind in ("tier", "staging", "index"))


@pytest.mark.parametrize(
    # Enough of them that a tenth of what they come to is more than the allocator's noise.
    ("policy", "prompts", "least"),
    [("lossless", 16, 250e6), ("predictive", 32, 40e6)],
)
def test_the_ledger_agrees_with_the_process(serve, chat_profile, policy, prompts, least) -> None:
    rng = random.Random(0)

    def fill(count: int) -> None:
        for _ in range(count):
            body = {
                "input_ids": [rng.randrange(1000, 40000) for _ in range(500)],
                "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            }
            requests.post(server.url + "/generate", json=body, timeout=120).raise_for_status()

    flags = ("--krul-policy", policy, "--krul-profile", str(chat_profile))
    with serve("--enable-krul", *flags, "--max-total-tokens", "1024") as server:
        process = scheduler_of(server)
        fill(8)  # what SGLang itself allocates on the way comes first
        resident, held = settled(server, process)
        fill(prompts)
        grown, more = (
            b - a for a, b in zip((resident, held), settled(server, process), strict=True)
        )
    assert more > least
    assert grown == pytest.approx(more, rel=0.10)
