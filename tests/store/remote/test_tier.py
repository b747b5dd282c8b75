"""What is sent to a real server comes back, whole or not at all."""

from __future__ import annotations

import time

import pytest
from remote_kit import FINGERPRINT, came, ids_of, offer, pull, send

from krul_sglang.store.disk.entry import Namespace
from krul_sglang.store.remote.keys import LISTED

TALK = ids_of(1, 700)
STOPS = [10, 63, 64, 200, 700]


def entries(server) -> dict[bytes, bytes]:
    """Keys of what is stored, by the position where it ends."""
    keys = server.client().keys("krul:1:*:kv:*")
    return {int(key.split(b".")[1]) + int(key.split(b".")[2]): key for key in keys}


def test_a_conversation_comes_back(tier, make_tier) -> None:
    sent = send(tier, TALK, STOPS)
    other = make_tier()
    one = pull(other, TALK)
    assert came(one) == sent
    assert [arrival.entry.start for arrival in one.arrivals] == [0, *STOPS[:-1]]
    assert one.nbytes > sum(map(len, sent))
    assert other.stats.pulled == len(STOPS)
    assert other.stats.pulled_bytes == one.nbytes == tier.stats.sent_bytes


def test_only_what_continues_is_brought(tier) -> None:
    sent = send(tier, TALK, STOPS)
    assert came(pull(tier, TALK, covered=64, starts=(0, 64))) == sent[3:]
    # Inside an entry: that one too, as it covers more.
    assert came(pull(tier, TALK, covered=100, starts=(0, 64, 100))) == sent[3:]
    assert came(pull(tier, TALK, covered=100, starts=(100,))) == []
    assert came(pull(tier, TALK, covered=700, starts=(0, 700))) == []


def test_a_conversation_that_parts_is_served_as_far_as_it_agrees(tier) -> None:
    sent = send(tier, TALK, STOPS)
    parted = TALK.copy()
    parted[300] += 1
    assert came(pull(tier, parted)) == sent[:4]
    parted[5] += 1
    assert came(pull(tier, parted)) == []


@pytest.mark.parametrize("length", [1, 5, 63, 64, 65, 1024, 5000])
def test_every_length_is_found(tier, length) -> None:
    ids = ids_of(2, length)
    sent = send(tier, ids, [length])
    assert came(pull(tier, ids)) == sent


def test_the_same_run_is_sent_once(tier, make_tier, server) -> None:
    send(tier, TALK, STOPS)
    other = make_tier()
    send(other, TALK, STOPS)
    assert (other.stats.sent, other.stats.present) == (0, len(STOPS))
    # Bit-exact tokens make it another one, worth storing.
    sent = send(other, TALK[:10], [10], exact=10, payload=b"finer" * 40)
    assert other.stats.sent == 1
    send(tier, TALK[:10], [10], exact=4)
    assert tier.stats.present == 1
    assert came(pull(tier, TALK[:10])) == sent, "the smaller of the two"


def test_what_is_gone_is_sent_again(tier, server) -> None:
    send(tier, TALK, STOPS)
    server.client().delete(entries(server)[200])
    send(tier, TALK, STOPS)
    assert tier.stats.present == len(STOPS) - 1
    assert len(came(pull(tier, TALK))) == len(STOPS)


@pytest.mark.parametrize(
    "namespace", [Namespace("a", None), Namespace(None, "a"), Namespace(None, "")]
)
def test_another_namespace_is_a_miss(tier, namespace) -> None:
    sent = send(tier, TALK, STOPS)
    assert pull(tier, TALK, namespace=namespace).arrivals == []
    own = send(tier, TALK[:300], [300], namespace=namespace, payload=b"mine" * 99)
    assert came(pull(tier, TALK, namespace=namespace)) == own
    assert came(pull(tier, TALK)) == sent


def test_another_fingerprint_is_a_miss(tier, make_tier) -> None:
    send(tier, TALK, STOPS)
    assert pull(make_tier(fingerprint=FINGERPRINT[::-1]), TALK).arrivals == []


def flip(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda raw: flip(raw, 0), id="magic"),
        pytest.param(lambda raw: flip(raw, 5), id="version"),
        pytest.param(lambda raw: flip(raw, 40), id="header"),
        pytest.param(lambda raw: flip(raw, len(raw) // 2), id="payload"),
        pytest.param(lambda raw: flip(raw, len(raw) - 1), id="last byte"),
        pytest.param(lambda raw: raw[:-1], id="short"),
        pytest.param(lambda raw: raw[: len(raw) // 3], id="shorter"),
        pytest.param(lambda raw: raw + b"\0", id="long"),
        pytest.param(lambda raw: b"", id="empty"),
        pytest.param(lambda raw: bytes(len(raw)), id="zeros"),
    ],
)
def test_damaged_bytes_are_a_miss_and_removed(tier, server, damage) -> None:
    sent = send(tier, TALK, STOPS)
    key = entries(server)[200]
    server.client().set(key, damage(server.client().get(key)))
    one = pull(tier, TALK)
    assert came(one) == sent[:3]
    assert tier.stats.damaged == 1
    assert 200 not in entries(server)
    assert not tier.degraded
    assert came(pull(tier, TALK)) == sent[:3]
    send(tier, TALK, STOPS)
    assert came(pull(tier, TALK)) == sent, "and is stored anew"


def test_every_flipped_bit_of_a_header_is_a_miss(tier, server, record_property) -> None:
    ids = ids_of(3, 70)
    send(tier, ids, [70], payload=b"x" * 20)
    key, client = entries(server)[70], server.client()
    whole = client.get(key)
    flips = 0
    for at in range(len(whole) - 20):
        client.set(key, flip(whole, at))
        assert pull(tier, ids).arrivals == [], f"byte {at}"
        flips += 1
        send(tier, ids, [70], payload=b"x" * 20)
    assert tier.stats.damaged == flips
    record_property("counts", {"header_bytes_flipped": flips, "believed": 0})


def test_swapped_keys_are_a_miss(tier, server) -> None:
    """Entries of the same size and run, so that only their token ids tell them apart."""
    other, client = ids_of(4, 700), server.client()
    (payload,) = send(tier, TALK, [700])
    one = entries(server)[700]
    size = client.strlen(one)
    send(tier, other, [700], payload=payload)
    (two,) = set(client.keys("krul:1:*:kv:*")) - {one}
    filler = bytes(len(payload) + size - client.strlen(two))
    client.delete(two)
    pull(tier, other)  # it is forgotten
    send(tier, other, [700], payload=filler)
    (two,) = set(client.keys("krul:1:*:kv:*")) - {one}
    a, b = client.get(one), client.get(two)
    assert len(a) == len(b)
    assert came(pull(tier, other)) == [filler]
    client.mset({one: b, two: a})
    assert pull(tier, TALK).arrivals == []
    assert pull(tier, other).arrivals == []
    assert tier.stats.damaged == 2


@pytest.mark.parametrize("kind", ["a list", "a string under a list's key", "nonsense names"])
def test_keys_of_another_kind_are_a_miss(tier, server, kind) -> None:
    sent = send(tier, TALK, STOPS)
    client = server.client()
    if kind == "a list":
        key = entries(server)[200]
        client.delete(key)
        client.rpush(key, "a", "b")
    else:
        for key in client.keys("krul:1:*:at:*"):
            if kind == "nonsense names":
                client.zadd(key, {"../../etc/passwd": 1, b"\xff\xfe": 2, "a" * 10_000: 3})
            elif client.zcard(key) and b".200." not in b"".join(client.zrange(key, 0, -1)):
                continue
    if kind == "a string under a list's key":
        (listed,) = [
            key
            for key in client.keys("krul:1:*:at:*")
            if entries(server)[200].rpartition(b":")[2] in client.zrange(key, 0, -1)
        ]
        client.set(listed, "x")
    expected = sent if kind == "nonsense names" else sent[:3]
    assert came(pull(tier, TALK)) == expected
    assert not tier.degraded


def test_a_list_is_bounded(tier, server) -> None:
    """Conversations that part between two marks share a list."""
    ids = ids_of(5, 100)
    for n in range(LISTED + 20):
        ids[70] = n
        offer(tier, ids.copy(), 0, payload=b"z")
    assert tier.wait_sent(30)
    (key,) = server.client().keys("krul:1:*:at:*")
    assert server.client().zcard(key) == LISTED
    assert came(pull(tier, ids)) == [b"z"], "the newest are kept"


def test_what_is_used_is_kept(make_tier, server) -> None:
    tier = make_tier(f"{server.url}?ttl=100")
    send(tier, TALK, STOPS)
    client = server.client()
    keys = client.keys("krul:1:*")
    assert all(90 <= client.ttl(key) <= 100 for key in keys)
    for key in keys:
        client.expire(key, 50)
    assert len(came(pull(tier, TALK))) == len(STOPS)
    until = time.monotonic() + 20  # it is done when nobody waits any more
    while not all(client.ttl(key) > 90 for key in keys):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_server_that_evicts(make_tier, server) -> None:
    """Whatever it lets go of, what comes back is right."""
    server.client().config_set("maxmemory", "6mb")
    server.client().config_set("maxmemory-policy", "allkeys-lru")
    tier = make_tier()
    sent = {n: send(tier, ids_of(n, 3000), [1000, 2000, 3000]) for n in range(10, 80)}
    assert server.client().info("stats")["evicted_keys"] > 0
    assert tier.stats.unsent == 0
    whole = 0
    for n, payloads in sent.items():
        found = came(pull(tier, ids_of(n, 3000)))
        assert found == payloads[: len(found)]
        whole += found == payloads
    assert 0 < whole < len(sent)
    assert tier.stats.damaged == 0
    assert not tier.degraded


def test_a_server_that_was_started_again(tier, server) -> None:
    sent = send(tier, TALK, STOPS)
    server.kill()
    server.start()
    assert pull(tier, TALK).arrivals == []
    assert send(tier, TALK, STOPS) == sent
    assert came(pull(tier, TALK)) == sent
