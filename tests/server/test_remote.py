"""Two servers that share nothing but a Redis server: what one stored, the other restores."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import requests
from dialogue import KRUL, SMALL_POOL
from redis_server import RedisServer

from krul_sglang.live_server import LiveServer

pytestmark = pytest.mark.server

LENGTH, ANSWER, TALKS = 150, 6, 3


def talk(seed: int) -> list[int]:
    rng = random.Random(f"remote {seed}")
    return [rng.randrange(500, 40000) for _ in range(LENGTH)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Iterator[RedisServer]:
    running = RedisServer(tmp_path_factory.mktemp("redis"))
    yield running
    running.kill()


@pytest.fixture(scope="module")
def stored(serve, shared) -> list[list[int]]:
    """Conversations that another server computed, evicted and sent; it is gone since."""
    talks = [talk(n) for n in range(TALKS)]
    with serve(*KRUL, *SMALL_POOL, "--krul-remote", shared.url) as server:
        for prompt in [*talks, talk(-1)]:
            server.generate(prompt, 1)
        wait_sent(server, TALKS)
    return talks


@pytest.fixture(scope="module")
def server(serve, shared, stored) -> Iterator[LiveServer]:
    """One that has computed none of it. Its disk tier is its own."""
    flags = (*KRUL, *SMALL_POOL, "--krul-remote", f"{shared.url}?ttl=1h", "--enable-metrics")
    with serve(*flags) as running:
        yield running


def wait_sent(server: LiveServer, count: int) -> None:
    until = time.monotonic() + 30
    while server.krul()["remote"]["sent"] < count:
        assert time.monotonic() < until, server.krul()
        time.sleep(0.05)


def wait_idle(server: LiveServer) -> None:
    """Until what was evicted is encoded and sent."""
    until = time.monotonic() + 30
    while True:
        state = server.krul()
        if not state["segments"] - state["sealed_segments"] + state["remote"]["waiting"]:
            return
        assert time.monotonic() < until, state
        time.sleep(0.05)


def hits(answer: dict) -> int:
    return (answer["meta_info"].get("cached_tokens_details") or {}).get("host", 0)


def test_another_server_restores_what_one_stored(server, stored, plain_server) -> None:
    for n, prompt in enumerate(stored):
        turn = [*prompt, 700 + n, 800 + n]
        answer = server.generate(turn, ANSWER)
        assert answer["output_ids"] == plain_server.generate(turn, ANSWER)["output_ids"]
        assert hits(answer) >= LENGTH - 1
    state = server.krul()
    assert state["pulled_tokens"] >= TALKS * (LENGTH - 1)
    assert state["remote"]["pulled"] >= TALKS
    assert state["remote"]["damaged"] == state["lost_segments"] == 0
    assert state["memory"]["remote"] == 0
    metrics = requests.get(f"{server.url}/metrics", timeout=30).text
    pulled = [line for line in metrics.splitlines() if "krul_pulled_tokens_total{" in line]
    assert float(pulled[0].split()[-1]) == state["pulled_tokens"]


def test_a_burst_is_served_and_brings_nothing_twice(server, shared, stored, plain_server) -> None:
    before = server.krul()["remote"]["pulled"]
    other = talk(77)
    turns = [[*other, 900 + n] for n in range(4)]
    answers: dict[int, dict] = {}

    def ask(n: int) -> None:
        answers[n] = server.generate(turns[n], ANSWER)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(turns))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for n, turn in enumerate(turns):
        assert answers[n]["output_ids"] == plain_server.generate(turn, ANSWER)["output_ids"]
    assert server.krul()["remote"]["pulled"] == before, "nobody has it"


def test_damaged_bytes_are_computed_anew(server, shared, plain_server) -> None:
    prompt = talk(50)
    server.generate(prompt, 1)
    evicted = server.krul()["evicted_tokens"]
    server.generate(talk(51), 1)
    assert server.krul()["evicted_tokens"] >= evicted + LENGTH
    wait_idle(server)
    server.flush()
    client = shared.client()
    for key in client.keys("krul:1:*:kv:*"):
        raw = bytearray(client.get(key))
        raw[len(raw) * 2 // 3] ^= 8
        client.set(key, bytes(raw))
    turn = [*prompt, 5, 6]
    answer = server.generate(turn, ANSWER)
    assert answer["output_ids"] == plain_server.generate(turn, ANSWER)["output_ids"]
    state = server.krul()
    assert state["remote"]["damaged"] >= 1
    assert hits(answer) == 0


def test_a_server_that_dies_or_never_answers_delays_nobody_for_long(
    server, shared, plain_server
) -> None:
    turn = [*talk(60), 5, 6]
    expected = plain_server.generate(turn, ANSWER)["output_ids"]
    shared.kill()
    assert server.generate(turn, ANSWER)["output_ids"] == expected
    assert server.krul()["remote"]["degraded"]
    # Somebody else listens there, and never answers.
    with socket.create_server(("127.0.0.1", shared.port), backlog=16):
        time.sleep(2.5)  # by now it has been tried again
        began = time.monotonic()
        turn = [*talk(61), 5, 6]
        answer = server.generate(turn, ANSWER)
        assert time.monotonic() - began < 30
        assert answer["output_ids"] == plain_server.generate(turn, ANSWER)["output_ids"]
    shared.start()
    until = time.monotonic() + 70
    while server.krul()["remote"]["degraded"]:
        assert time.monotonic() < until, "it was not tried again"
        time.sleep(0.2)


def test_no_server_at_start_is_a_warning(serve, plain_server, tmp_path) -> None:
    """And a weight update leaves the remote tier alone."""
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        url = f"redis://user:secret@127.0.0.1:{reserved.getsockname()[1]}"
    with serve(*KRUL, *SMALL_POOL, "--krul-remote", url) as running:
        turn = talk(70)
        assert (
            running.generate(turn, ANSWER)["output_ids"]
            == (plain_server.generate(turn, ANSWER)["output_ids"])
        )
        assert running.krul()["remote"]["degraded"]
        text = running.log.read_text()
    assert text.count("the connection fails") == 1
    assert "secret" not in text
