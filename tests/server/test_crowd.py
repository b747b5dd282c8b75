"""Many conversations return at once to a pool that holds a few, with the default policy: all are
answered, nothing that keeps their queries or their KV outgrows its bound."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

pytestmark = pytest.mark.server

PROMPT, ANSWER, ROUNDS = 80, 4, 4
POOL, MEMORY = 1024, 112_000_000
BOOKS = 100_000
"""Bytes beside the queries: a byte a pool row and layer, positions, whose lane is whose."""


@pytest.fixture(scope="module")
def server(serve, chat_profile):
    flags = ("--krul-profile", str(chat_profile), "--krul-host-memory", f"{MEMORY // 10**6}MB")
    with serve("--enable-krul", *flags, "--max-total-tokens", str(POOL)) as server:
        yield server


def scheduler_of(server) -> psutil.Process:
    children = psutil.Process(server.process.pid).children(recursive=True)
    return next(child for child in children if "scheduler" in " ".join(child.cmdline()))


@pytest.mark.parametrize("crowd", [16, pytest.param(64, marks=pytest.mark.long)])
def test_a_crowd_returns(server, crowd: int) -> None:
    rng = random.Random(crowd)
    prompts = [[rng.randrange(500, 40000) for _ in range(PROMPT)] for _ in range(crowd)]
    before, process, resident = server.krul(), scheduler_of(server), []
    assert crowd * PROMPT > POOL, "the pool would hold all of them"
    with ThreadPoolExecutor(crowd) as pool:
        for _ in range(ROUNDS):
            answers = list(pool.map(lambda prompt: server.generate(prompt, ANSWER), prompts))
            for prompt, answer in zip(prompts, answers, strict=True):
                assert len(answer["output_ids"]) == ANSWER
                prompt += answer["output_ids"]
            resident.append(process.memory_info().rss)
    after = server.krul()
    assert after["protected_tokens"] == 0, "a request still holds the tree"
    assert after["restored_tokens"] - before["restored_tokens"] > crowd * PROMPT
    assert after["restore"]["failed"] == before["restore"]["failed"]
    memory = after["memory"]
    assert memory["prefetch"] == 0, "staging of a request that is over"
    assert memory["peak"] <= memory["limit"] == MEMORY
    # Lanes for a few requests, whoever gets them; the others are stored by the profile alone.
    assert 0 < memory["taps"] == before["memory"]["taps"] <= MEMORY / 16 + BOOKS
    assert resident[-1] <= 1.05 * resident[1], "memory grows with every round"
