"""The remote tier behind the tree: what one rig stored, another brings while a request waits."""

from __future__ import annotations

import time

import pytest
from redis_server import RedisServer
from remote_queue import Queue
from tree_rig import Rig

from krul_sglang.runtime import epoch, marks
from krul_sglang.store.remote.writing import QUEUE_SHARE
from krul_sglang.strategy.base import Strategy

HISTORY = list(range(1000, 1090))
ROUNDING = Strategy("rounding")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = RedisServer(tmp_path_factory.mktemp("redis"))
    yield running
    running.kill()


@pytest.fixture
def url(server) -> str:
    server.client().flushall()
    return server.url


def stored(rig: Rig, tokens=HISTORY) -> None:
    """A conversation that has left the device and is on the server."""
    rig.turn(tokens, answer=[7])
    rig.evict()
    rig.sent()


def brought(rig: Rig, tokens=HISTORY, tail: int = 7, **kwargs) -> int:
    """Tokens restored for a turn that waits in the queue first; its rows are right."""
    req = rig.request([*tokens, tail], **kwargs)
    Queue(rig, req).until_free(req)
    rig.match(req)
    assert rig.admit(req)
    rig.prefill(req)
    rig.decode(req, 8)
    rig.finish(req)
    nothing_left(rig)
    rig.check()
    return req.host_loaded_length


def nothing_left(rig: Rig) -> None:
    """What was pulled is given back: by a thread, perhaps a moment after the answer."""
    deadline = time.monotonic() + 10
    while rig.krul.store.ledger.snapshot()["remote"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert rig.krul.store.ledger.snapshot()["remote"] == 0
    assert not rig.cache.pulls._held


@pytest.mark.parametrize("page_size", [1, 16])
def test_another_server_finds_what_one_stored(make_rig, url, page_size) -> None:
    first = make_rig(page_size, remote=url)
    stored(first)
    stored(first, range(2000, 2070))
    rig = make_rig(page_size, remote=url)
    whole = len(HISTORY) // page_size * page_size
    assert brought(rig) == whole
    assert rig.krul.counters.pulled_tokens == whole
    assert brought(rig, range(2000, 2070)) == 70 // page_size * page_size
    assert brought(rig, range(5000, 5070)) == 0
    rig.evict()
    rig.sent()
    before = rig.krul.store.remote.stats.sent_bytes
    assert brought(rig, tail=9) == whole, "it is here by now"
    assert rig.krul.counters.pulled_tokens == whole + 70 // page_size * page_size
    assert rig.krul.store.remote.stats.sent_bytes == before
    assert first.krul.counters.pulled_tokens == 0


def test_what_is_here_is_not_asked_for(make_rig, url) -> None:
    rig = make_rig(remote=url)
    stored(rig)
    assert brought(rig) == len(HISTORY)
    short = rig.request(range(60))
    exact = make_rig(remote=url, lossy=ROUNDING)
    demanding = exact.request([*HISTORY, 7], exact=True)
    for one, req in ((rig, short), (exact, demanding)):
        queue = Queue(one, req)
        assert queue.step() == [req]
        assert queue.held == 0
    assert rig.krul.store.remote.stats.asked == 0


def test_only_what_is_missing_is_brought(make_rig, url) -> None:
    first = make_rig(remote=url)
    stored(first, [*range(3000, 3070), *range(100, 200)])
    rig = make_rig(remote=url)
    assert brought(rig, [*range(3000, 3070)]) == 0, "it lies inside a longer one"
    stored(first, [*range(3000, 3070), *range(300, 400)])
    assert brought(rig, [*range(3000, 3070), *range(300, 400)]) > 0
    assert 90 <= rig.krul.counters.pulled_tokens <= 101
    rig.check()


def test_exactness_travels(make_rig, url) -> None:
    settings = {"lossy": ROUNDING, "turn_ends": [1009], "remote": url}
    stored(make_rig(**settings))
    rig = make_rig(**settings)
    req = rig.request([*HISTORY, 7])
    Queue(rig, req).until_free(req)
    assert rig.match(req) == len(HISTORY)
    exact = sum(marks.exact_tokens(node) for node in rig.find(HISTORY))
    assert exact == 10, "up to the end of the first turn"
    assert brought(rig, tail=9) == len(HISTORY)
    rig.evict()
    assert rig.turn([*HISTORY, 10], answer=[8], exact=True).host_loaded_length <= 10
    rig.check()


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_what_is_damaged_there_is_a_miss(make_rig, url, server, damage) -> None:
    stored(make_rig(remote=url))
    client = server.client()
    (key,) = client.keys("krul:1:*:kv:*")
    raw = client.get(key)
    if damage == "remove":
        client.delete(key)
    else:
        bad = bytes([*raw[:-9], raw[-9] ^ 1, *raw[-8:]]) if damage == "flip" else raw[:-9]
        client.set(key, bad)
    rig = make_rig(remote=url)
    assert brought(rig) == 0
    assert rig.krul.store.remote.stats.damaged == (damage != "remove")
    rig.evict()
    rig.sent()
    again = make_rig(remote=url)
    assert brought(again, [*HISTORY, 7]) == len(HISTORY) + 1, "it was stored anew"


@pytest.mark.parametrize("key", [{"extra_key": "a"}, {"cache_salt": "a"}])
def test_another_namespace_is_a_miss(make_rig, url, key) -> None:
    stored(make_rig(remote=url))
    assert brought(make_rig(remote=url), **key) == 0


def test_what_was_brought_is_on_the_disk_too(make_rig, url, tmp_path) -> None:
    stored(make_rig(remote=url))
    rig = make_rig(remote=url, disk=tmp_path / "tier")
    assert brought(rig) == len(HISTORY)
    rig.written()
    rig.krul.store.demote(1 << 40)
    assert rig.krul.store.ledger.snapshot()["tier"] == 0
    rig.evict()
    assert brought(rig, tail=9) == len(HISTORY)
    rig.close()
    alone = make_rig(disk=tmp_path / "tier")
    assert alone.turn([*HISTORY, 7], answer=[8]).host_loaded_length == len(HISTORY)


def test_memory_makes_room(make_rig, url) -> None:
    """Stored conversations of its own leave, oldest first."""
    stored(make_rig(remote=url))
    rig = make_rig(remote=url, host_memory=150_000)
    for n in range(10, 22):
        rig.turn(range(n * 1000, n * 1000 + 90), answer=[7])
        rig.evict()
        rig.sent()
    held = rig.krul.store.totals()["segments"]
    assert brought(rig) == len(HISTORY)
    snapshot = rig.krul.store.ledger.snapshot()
    # What waits to be sent is counted twice while the tier has it too.
    assert snapshot["peak"] <= snapshot["limit"] * (1 + 1 / QUEUE_SHARE)
    assert rig.krul.store.totals()["segments"] <= held


def test_what_has_no_room_is_not_brought(make_rig, url) -> None:
    stored(make_rig(remote=url))
    rig = make_rig(remote=url, host_memory=20_000)
    assert brought(rig) == 0


def test_requests_of_one_conversation_bring_it_once(make_rig, url) -> None:
    stored(make_rig(remote=url))
    rig = make_rig(remote=url)
    requests = [rig.request([*HISTORY, n]) for n in range(5)]
    queue = Queue(rig, *requests)
    queue.until_free(*requests)
    assert queue.waiting_queue == requests, "each kept its place"
    assert rig.krul.store.remote.stats.pulled == 1
    assert [rig.match(req) for req in requests] == [len(HISTORY)] * 5
    nothing_left(rig)


def test_others_go_on_meanwhile(make_rig, url) -> None:
    stored(make_rig(remote=url))
    rig = make_rig(remote=url)
    held, short = rig.request([*HISTORY, 7]), rig.request(range(50))
    queue = Queue(rig, held, short)
    assert queue.step() == [short]
    assert queue.waiting_queue == [held, short]
    queue.until_free(held, short)


@pytest.mark.parametrize("when", ["looking", "found", "fetched"])
@pytest.mark.parametrize("what", ["aborted", "flushed", "new weights"])
def test_what_is_given_up_leaves_nothing_behind(make_rig, url, when, what) -> None:
    stored(make_rig(remote=url))
    rig = make_rig(remote=url)
    req = rig.request([*HISTORY, 7])
    queue = Queue(rig, req)
    assert queue.step() == []
    pull = rig.cache.pulls._held[0].pull
    if when != "looking":
        while not pull.names:
            time.sleep(0.001)
    if when == "fetched":
        queue.step()
        while not pull.arrivals:
            time.sleep(0.001)
    if what == "aborted":
        queue.waiting_queue = []
    elif what == "flushed":
        rig.cache.reset()
    else:
        epoch.begin(rig.cache)
    queue.step()
    nothing_left(rig)
    assert pull.remaining == 0 or not pull.arrived(pull.arrivals, 0)
    if what == "new weights":
        assert rig.krul.store.remote is None
        assert rig.match(req) == 0
        assert queue.step() == [req]
        rig.turn(HISTORY, answer=[1])
        rig.evict()
    rig.check()


def test_a_server_that_dies_is_a_miss(make_rig, tmp_path) -> None:
    server = RedisServer(tmp_path)
    try:
        stored(make_rig(remote=server.url))
        rig = make_rig(remote=server.url)
        server.kill()
        assert brought(rig) == 0
        assert rig.krul.store.remote.degraded
        # Not even asked again, until it answers.
        req = rig.request([*range(50), *HISTORY])
        assert Queue(rig, req).step() == [req]
        rig.evict()
        rig.sealed()
        server.start()
        assert rig.krul.store.remote.wait_sent(20), "what waited is sent when it is back"
        assert not rig.krul.store.remote.degraded
        assert brought(make_rig(remote=server.url), [*HISTORY, 7]) == len(HISTORY) + 1
    finally:
        server.kill()
