"""Servers that are down, slow, full or worse: a miss in bounded time, and tried again later."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time

import pytest
from redis_server import RedisServer
from remote_kit import NOBODY as TALK_NAMESPACE
from remote_kit import came, ids_of, offer, pull, send

from krul_sglang.live_server import free_port
from krul_sglang.store.remote import backoff, writing
from krul_sglang.store.remote import pull as pulls
from krul_sglang.store.remote.client import ANSWER_SECONDS
from krul_sglang.store.remote.pull import Pull, Stage
from krul_sglang.store.segment import SegmentState

TALK = ids_of(1, 700)
STOPS = [200, 450, 700]


class Proxy:
    """Stands before a real server and spoils what it says, from the moment it is told to.

    spoil(client, answer): sends what the client gets of an answer's bytes.
    """

    def __init__(self, port: int) -> None:
        self.spoil = None
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        self._open = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                self._open += [client, server]
                threading.Thread(target=self._carry, args=(client, server), daemon=True).start()
                threading.Thread(target=self._answer, args=(server, client), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while sent := source.recv(1 << 16):
                sink.sendall(sent)

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while answer := server.recv(1 << 16):
                if self.spoil is None:
                    client.sendall(answer)
                else:
                    self.spoil(client, answer)

    def close(self) -> None:
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


@pytest.fixture
def proxy(server):
    standing = Proxy(server.port)
    yield standing
    standing.close()


def silent(client: socket.socket, answer: bytes) -> None:
    """Nothing at all."""


def trickling(client: socket.socket, answer: bytes) -> None:
    """A byte now and then, each soon enough for a timeout by the piece."""
    for byte in answer:
        client.sendall(bytes([byte]))
        time.sleep(0.2)


def endless(client: socket.socket, answer: bytes) -> None:
    """More than was asked for, for ever."""
    client.sendall(b"$100000000000\r\n")
    while True:
        client.sendall(bytes(1 << 16))


def nonsense(client: socket.socket, answer: bytes) -> None:
    client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def other_numbers(client: socket.socket, answer: bytes) -> None:
    """Answers of another shape than was asked for."""
    client.sendall(b":1\r\n" * 64)


def closing(client: socket.socket, answer: bytes) -> None:
    client.shutdown(socket.SHUT_RDWR)


SPOILS = [silent, trickling, endless, nonsense, other_numbers, closing]


def ids(spoil) -> str:
    return spoil.__name__


@pytest.mark.parametrize("spoil", SPOILS, ids=ids)
def test_a_look_up_ends(make_tier, proxy, spoil) -> None:
    tier = make_tier(proxy.url)
    sent = send(tier, TALK, STOPS)
    proxy.spoil = spoil
    began = time.monotonic()
    one = Pull(TALK_NAMESPACE, TALK, (0,), 0, worth=20.0)
    tier.look(one)
    while one.stage is Stage.LOOKING:
        time.sleep(0.005)
    assert time.monotonic() - began < ANSWER_SECONDS + 1
    assert one.stage is Stage.OVER
    assert one.arrivals == []
    proxy.spoil = None
    assert recovered(tier) == sent


@pytest.mark.parametrize("spoil", SPOILS, ids=ids)
def test_fetching_ends(make_tier, proxy, spoil) -> None:
    tier = make_tier(proxy.url)
    sent = send(tier, TALK, STOPS)
    one = Pull(TALK_NAMESPACE, TALK, (0,), 0, worth=2.0)
    tier.look(one)
    assert one.wait(Stage.FOUND, timeout=10)
    proxy.spoil = spoil
    began = time.monotonic()
    tier.fetch(one)
    while one.stage is not Stage.OVER:
        time.sleep(0.005)
    assert time.monotonic() - began < 2.0 + 0.5
    assert came(one) == []
    proxy.spoil = None
    assert recovered(tier) == sent


def recovered(tier) -> list[bytes]:
    """What comes once the server is well again."""
    until = time.monotonic() + 10
    while tier.degraded:
        assert time.monotonic() < until, "it was not tried again"
        time.sleep(0.05)
    # A pull that failed before may have removed what it took for damaged; all else is there.
    send(tier, TALK, STOPS)
    return came(pull(tier, TALK))


@pytest.mark.parametrize("spoil", SPOILS, ids=ids)
def test_sending_waits_until_the_server_is_well(make_tier, proxy, spoil, monkeypatch) -> None:
    monkeypatch.setattr(writing, "SEND_SECONDS", 1.0)
    tier = make_tier(proxy.url)
    proxy.spoil = spoil
    offer(tier, TALK[:200], 0)
    time.sleep(0.5)
    proxy.spoil = None
    assert tier.wait_sent(20)
    assert tier.stats.sent + tier.stats.unsent + tier.stats.present == 1


def test_a_server_that_dies_while_it_sends(make_tier, proxy, server) -> None:
    """What arrived before is used."""
    tier = make_tier(proxy.url)
    sent = [
        offer(tier, TALK[:stop], start, payload=bytes([n]) * (3 << 20)).payload
        for n, (start, stop) in enumerate(zip([0, *STOPS], STOPS, strict=False))
    ]
    assert tier.wait_sent(20)
    one = Pull(TALK_NAMESPACE, TALK, (0,), 0, worth=20.0)
    tier.look(one)
    assert one.wait(Stage.FOUND, timeout=10)
    passed = 0

    def dies_midway(client: socket.socket, answer: bytes) -> None:
        nonlocal passed
        passed += len(answer)
        if passed > 5 << 20:
            server.kill()
            client.shutdown(socket.SHUT_RDWR)
        else:
            client.sendall(answer)

    proxy.spoil = dies_midway
    tier.fetch(one)
    assert one.wait(Stage.OVER, timeout=10)
    assert came(one) == sent[:1]
    assert tier.stats.failed == 1


def test_one_line_when_it_fails_and_one_when_it_is_back(make_tier, tmp_path, caplog) -> None:
    server = RedisServer(tmp_path)
    server.kill()
    caplog.set_level(logging.WARNING)
    tier = make_tier(server.url.replace("redis://", "redis://user:secret@"))
    port = server.url.rpartition(":")[2].partition("/")[0]

    def said() -> list[str]:
        """By this tier: one that an earlier test left may still speak of its own server."""
        return [record.message for record in caplog.records if f":{port}/" in record.message]

    assert tier.degraded
    assert not tier.may_ask
    offer(tier, TALK[:200], 0)
    for _ in range(3):
        assert pull(tier, TALK).arrivals == []
    (line,) = said()
    assert "the connection fails" in line
    assert "secret" not in caplog.text
    time.sleep(backoff.FIRST_WAIT)
    caplog.clear()
    server._command += ["--requirepass", "secret"]
    server.start()
    try:
        until = time.monotonic() + 10
        while "password" not in tier.degraded:
            assert time.monotonic() < until, tier.degraded
            time.sleep(0.05)
    finally:
        server.kill()
    # A password that does not fit is a failure like any other.
    assert tier.degraded
    assert said() == []


def test_pauses_grow_until_it_works(caplog) -> None:
    now = 0.0
    health = backoff.Backoff("x", lambda: now)
    assert health.seconds_left == 0
    waits = []
    for _ in range(9):
        health.failed("down")
        waits.append(health.seconds_left)
        now += waits[-1]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    health.succeeded()
    health.failed("down")
    assert health.seconds_left == 1
    assert [r.message.split()[1] for r in caplog.records] == ["fails", "works", "fails"]


def test_a_full_server_takes_nothing_and_serves_on(make_tier, server, caplog) -> None:
    tier = make_tier()
    sent = send(tier, TALK, STOPS)
    server.client().config_set("maxmemory", "1")
    offer(tier, ids_of(2, 100), 0)
    until = time.monotonic() + 5
    while not tier.degraded and time.monotonic() < until:
        time.sleep(0.01)
    assert "maxmemory" in tier.degraded
    assert tier.may_ask
    assert came(pull(tier, TALK)) == sent
    server.client().config_set("maxmemory", "0")
    assert tier.wait_sent(20)
    assert not tier.degraded
    assert tier.stats.unsent == 0
    assert len([r for r in caplog.records if "storing fails" in r.message]) == 1


def test_the_queue_is_bounded(make_tier) -> None:
    """A server that is away does not fill the memory; what it missed is counted."""
    tier = make_tier(f"redis://127.0.0.1:{free_port()}", limit=writing.QUEUE_SHARE * 100_000)
    for n in range(20):
        offer(tier, ids_of(n, 100), 0, payload=bytes(30_000))
    ledger = tier._writer._ledger
    assert tier.unsent == 3
    assert tier.stats.unsent == 17
    assert 90_000 < ledger.snapshot()["remote"] <= 100_000
    tier.close()
    assert tier.wait_sent(10)
    assert ledger.used == 0


def test_what_waits_is_sent_before_the_end(make_tier) -> None:
    tier = make_tier()
    for n in range(20):
        offer(tier, ids_of(n, 500), 0, payload=bytes(300_000))
    tier.close()
    assert (tier.stats.sent, tier.stats.unsent) == (20, 0)


def test_what_memory_let_go_of_is_sent_and_what_is_damaged_is_not(make_tier, proxy) -> None:
    tier = make_tier(proxy.url)
    proxy.spoil = silent
    segments = [offer(tier, ids_of(n, 100), 0) for n in range(3)]
    segments[1].live_tokens, segments[1].payload = 0, None
    segments[2].state = SegmentState.LOST
    proxy.spoil = None
    assert tier.wait_sent(20)
    assert (tier.stats.sent, tier.stats.unsent) == (2, 1)
    assert came(pull(tier, ids_of(1, 100)))
    assert not came(pull(tier, ids_of(2, 100)))


def test_what_takes_longer_than_computing_is_not_fetched(make_tier) -> None:
    tier = make_tier()
    send(tier, TALK, STOPS)
    slow = 1e-3
    one = pull(tier, TALK, worth=5.0, rate=slow)
    assert (one.arrivals, tier.stats.declined) == ([], 1)
    assert len(came(pull(tier, TALK, worth=5.0, rate=1e-9))) == len(STOPS)


def test_what_has_no_room_is_fetched_as_far_as_it_has(make_tier) -> None:
    tier = make_tier()
    sent = send(tier, TALK, STOPS)
    assert came(pull(tier, TALK, room=len(sent[0]) + len(sent[1]) + 5000)) == sent[:2]
    assert came(pull(tier, TALK, room=100)) == []


def test_patience_follows_from_the_rate(make_tier, proxy) -> None:
    """A pull that is expected to take a moment is not waited for as long as one that is not."""
    tier = make_tier(proxy.url)
    send(tier, TALK, STOPS)
    one = Pull(TALK_NAMESPACE, TALK, (0,), 0, worth=60.0, rate=1e-9)
    tier.look(one)
    assert one.wait(Stage.FOUND, timeout=10)
    proxy.spoil = trickling
    began = time.monotonic()
    tier.fetch(one)
    while one.stage is not Stage.OVER:
        time.sleep(0.005)
    assert time.monotonic() - began < pulls.LEAST_PATIENCE + 0.5
