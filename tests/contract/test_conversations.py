"""What the tree's conversations are said to hold, token by token; the way of a question."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import time
from array import array
from types import SimpleNamespace

import pytest
from kv_oracle import ROUNDING
from tree_rig import Rig

from krul_sglang.runtime import conversations, questions
from krul_sglang.runtime.marks import full_data

END = 9


def hashed(tokens, extra_key=None, cache_salt=None) -> str:
    space = json.dumps([extra_key, cache_salt]).encode()
    return hashlib.blake2b(space + array("q", tokens).tobytes(), digest_size=6).hexdigest()


def recount(rig: Rig, leaf) -> dict:
    """From single tokens: where each is, whether it is exact, its share of its segment."""
    nodes = list(reversed(list(rig.cache.path(leaf.id))))
    device = stored = exact = 0
    shares, raw, names = [], [], []
    for node in nodes:
        data = full_data(node)
        mark = "krul_exact_in_store" if data.value is None else "krul_exact_on_device"
        exact += data.metadata.get(mark, len(node.key))
        device += len(node.key) if data.value is not None else 0
        for slot in [] if data.host_value is None else data.host_value.tolist():
            stored += 1
            segment = rig.krul.store.get(slot >> 24)
            if segment.id not in names:
                names.append(segment.id)
            shares.append(segment.stored_bytes / segment.tokens)
            raw.append(segment.raw_bytes / segment.tokens)
    return {
        "id": hashed(rig.path_tokens(leaf)),
        "tokens": len(rig.path_tokens(leaf)),
        "device_tokens": device,
        "stored_tokens": stored,
        "exact_tokens": exact,
        "lossy_tokens": len(rig.path_tokens(leaf)) - exact,
        "segments": len(names),
        "stored_bytes": pytest.approx(sum(shares), abs=len(names)),
        "raw_bytes": sum(raw),
    }


def leaves(rig: Rig) -> list:
    return [node for node in rig.nodes() if not node.children]


def listed(rig: Rig, **argument: str) -> dict:
    return conversations.list_newest(rig.cache, argument)


def found(rig: Rig, name: str) -> dict:
    return conversations.find(rig.cache, {"id": name})


def busy(make_rig, page_size: int = 1) -> Rig:
    """Conversations that share an opening, branch in the middle of a stored segment, and are on
    the device, stored, both, exact and lossy."""
    rig = make_rig(page_size, lossy=ROUNDING, turn_ends=[END])
    opening = [5, 6, 7, 8, END]
    rig.turn([*opening, *range(100, 150)])
    rig.turn([*opening, *range(200, 260)])
    rig.evict()
    rig.sealed()
    rig.turn([*opening, *range(100, 130), *range(400, 420)])
    rig.turn([*opening, *range(200, 260), *range(500, 520)])
    rig.evict(30)
    rig.turn(list(range(600, 640)))
    rig.sealed()
    return rig


@pytest.mark.parametrize("page_size", [1, 16])
def test_every_figure_is_that_of_a_recount(make_rig, page_size: int) -> None:
    rig = busy(make_rig, page_size)
    body = listed(rig)
    assert body["total"] == len(body["conversations"]) == len(leaves(rig)) >= 3
    for leaf in leaves(rig):
        wanted = recount(rig, leaf)
        line = next(one for one in body["conversations"] if one["id"] == wanted["id"])
        assert {name: line[name] for name in wanted} == wanted
        assert line["ratio"] is None or line["ratio"] > 1
    for name in ("device_tokens", "stored_tokens", "exact_tokens", "lossy_tokens"):
        assert any(one[name] for one in body["conversations"])
    rig.check()


def test_the_newest_come_first_and_are_the_ones_asked_for(make_rig) -> None:
    rig = busy(make_rig)
    ordered = sorted(leaves(rig), key=lambda leaf: -leaf.last_access_time)
    names = [hashed(rig.path_tokens(leaf)) for leaf in ordered]
    assert [one["id"] for one in listed(rig)["conversations"]] == names
    two = listed(rig, limit="2")
    assert [one["id"] for one in two["conversations"]] == names[:2]
    assert two["total"] == len(names)
    for limit in ("0", "201", "-1", "many", ""):
        with pytest.raises(ValueError, match="from 1 to 200"):
            listed(rig, limit=limit)
    rig.match(rig.request([*rig.path_tokens(ordered[-1]), 1]))
    assert listed(rig, limit="1")["conversations"][0]["id"] == names[-1]


def test_ages_are_seconds_since_the_last_use(make_rig, monkeypatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("krul_sglang.runtime.access.time.monotonic", lambda: now[0])
    rig = make_rig()
    rig.turn(range(20))
    now[0] += 100
    rig.turn(range(50, 70))
    now[0] += 7
    assert [one["age_seconds"] for one in listed(rig)["conversations"]] == [7.0, 107.0]
    rig.match(rig.request([*range(20), 1, 2, 3]))
    assert [one["age_seconds"] for one in listed(rig)["conversations"]] == [0.0, 7.0]


def test_ages_stay_known_however_many_notes_there_are(monkeypatch) -> None:
    from krul_sglang.runtime import access

    now = [0.0]
    monkeypatch.setattr("krul_sglang.runtime.access.time.monotonic", lambda: now[0])
    monkeypatch.setattr(access, "NOTES", 8)
    clock, counts = access.AccessClock(), []
    for _ in range(100):
        now[0] += 10
        clock.note()
        counts.append((access.get_and_increase_time_counter(), now[0]))
    assert len(clock._times) <= 8
    assert clock.age(counts[-1][0]) == 0
    ages = [clock.age(count) for count, _ in counts]
    assert ages == sorted(ages, reverse=True)
    assert all(age >= now[0] - then for age, (_, then) in zip(ages, counts, strict=True))
    assert clock.age(-1.0) == now[0]


def test_namespaces_tell_the_same_tokens_apart(make_rig) -> None:
    rig = make_rig()
    tokens = list(range(20))
    for extra_key, salt in ((None, None), ("adapter", None), (None, "tenant")):
        req = rig.request(tokens)
        req.extra_key, req.cache_salt = extra_key, salt
        rig.match(req)
        assert rig.admit(req)
        rig.prefill(req)
        rig.decode(req, 1)
        rig.finish(req)
    told = {(one["id"], one["namespace"]) for one in listed(rig)["conversations"]}
    spaces = ((None, None), ("adapter", None), (None, "tenant"))
    assert told == {(hashed(tokens, *space), hashed([], *space)) for space in spaces}


def test_a_conversation_is_found_by_how_its_id_begins(make_rig) -> None:
    rig = busy(make_rig)
    names = [one["id"] for one in listed(rig)["conversations"]]
    for name in names:
        assert found(rig, name)["detail"]["id"] == name
    assert sorted(found(rig, "")["ids"]) == sorted(names)
    assert "detail" not in found(rig, "")
    assert found(rig, "nothing") == {"ids": []}


def test_segments_and_layers_add_up(make_rig) -> None:
    rig = busy(make_rig)
    for line in listed(rig)["conversations"]:
        body = found(rig, line["id"])["detail"]
        assert {name: body[name] for name in line if name not in ("segments", "age_seconds")} == {
            name: value for name, value in line.items() if name not in ("segments", "age_seconds")
        }
        rows = body["segments"]
        assert len(rows) == line["segments"]
        assert sum(row["tokens"] for row in rows) == line["stored_tokens"]
        assert [row["start"] for row in rows] == sorted(row["start"] for row in rows)
        for name in ("stored_bytes", "raw_bytes"):
            assert sum(row[name] for row in rows) == line[name]
        layers = sum(layer["stored_bytes"] for layer in body["layers"])
        assert layers + body["header_bytes"] == line["stored_bytes"]
        assert sum(layer["raw_bytes"] for layer in body["layers"]) == line["raw_bytes"]
    assert json.loads(json.dumps(body)) == body


def test_asking_changes_nothing(make_rig) -> None:
    rig = busy(make_rig)

    def state() -> list:
        return [
            (node.id, node.last_access_time, dict(full_data(node).metadata)) for node in rig.nodes()
        ]

    before, held = state(), rig.krul.store.totals()
    for line in listed(rig)["conversations"]:
        found(rig, line["id"])
    assert state() == before
    assert rig.krul.store.totals() == held
    rig.check()


def test_what_is_lost_or_damaged_is_said(make_rig) -> None:
    rig = make_rig()
    rig.turn(range(40))
    rig.evict()
    rig.sealed()
    (leaf,) = leaves(rig)
    (name,) = rig.segment_ids(leaf)
    rig.damage(name, at=20)  # in the header
    body = found(rig, hashed(rig.path_tokens(leaf)))["detail"]
    assert [row["state"] for row in body["segments"]] == ["sealed", "damaged"]
    rig.krul.store.mark_lost(name)
    (line,) = listed(rig)["conversations"]
    assert line["lost_tokens"] == len(leaf.key)
    body = found(rig, line["id"])["detail"]
    assert [row["state"] for row in body["segments"]] == ["sealed", "lost"]
    assert line["stored_bytes"] == body["segments"][0]["stored_bytes"]


def test_a_thousand_nodes_hold_the_scheduler_up_for_milliseconds(make_rig) -> None:
    rig = make_rig(rows=8192, host_memory=1 << 26)
    for start in range(0, 2000, 4):  # 500 conversations of 12 tokens, half of them stored
        rig.turn([start // 40, *range(start + 10_000, start + 10_008)])
    rig.evict(2000)
    rig.sealed()
    assert len(rig.nodes()) >= 1000
    began = time.process_time()
    body = listed(rig, limit="200")
    seconds = time.process_time() - began
    assert body["total"] >= 500
    assert seconds < 0.25  # 0.007 measured


# ---- the way of a question ---------------------------------------------------------


def test_a_question_is_answered_in_place_of_the_state(make_rig) -> None:
    from sglang.srt.managers.io_struct import GetInternalStateReq

    rig = busy(make_rig)

    def reply(rid: str | None) -> dict | None:
        return questions.answer(rig.cache, GetInternalStateReq(rid=rid))

    assert reply(None) is reply("") is reply("some-request") is None
    body = reply('krul:["conversations", {"limit": "1"}]')[questions.ANSWER]["body"]
    assert len(body["conversations"]) == 1
    for rid, status in (
        ('krul:["conversations", {"limit": "x"}]', 400),
        ("krul:{", 400),
        ('krul:["nothing", {}]', 500),
        ('krul:["conversation", {}]', 500),
    ):
        said = reply(rid)[questions.ANSWER]
        assert said["status"] == status
        assert "\n" not in said["error"]


class Manager:
    """Stands for a TokenizerManager: the schedulers are called at once."""

    def __init__(self, *rigs: Rig, backend: str = "krul") -> None:
        self._rigs = rigs
        self.server_args = SimpleNamespace(radix_cache_backend=backend)

    def auto_create_handle_loop(self) -> None:
        pass

    async def get_internal_state_communicator(self, request) -> list:
        states = [questions.answer(rig.cache, request) or {} for rig in self._rigs]
        return [SimpleNamespace(internal_state=state) for state in states]


@pytest.fixture
def http(monkeypatch):
    """``http(manager, keys)(path, key)``: status and body from an app with Krul's routes."""
    import httpx
    from fastapi import FastAPI
    from sglang.srt.utils.auth import add_api_key_middleware

    def build(manager: Manager, **keys: str):
        app = FastAPI()
        monkeypatch.setitem(sys.modules, questions.HTTP_SERVER, SimpleNamespace(app=app))
        questions.add_routes(None, manager)
        count = len(app.routes)
        questions.add_routes(None, manager)
        assert len(app.routes) == count, "once only"
        if keys:
            add_api_key_middleware(app, **{"api_key": None, "admin_api_key": None, **keys})

        def get(path: str, key: str | None = None):
            headers = {"Authorization": f"Bearer {key}"} if key else {}

            async def ask():
                transport = httpx.ASGITransport(app)
                async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
                    return await client.get(path, headers=headers)

            answer = asyncio.run(ask())
            return answer.status_code, answer.json()

        return get

    return build


def test_routes_answer_for_all_replicas(make_rig, http) -> None:
    one, other = busy(make_rig), busy(make_rig)
    other.turn([*range(700, 730)])
    get = http(Manager(one, other))
    status, body = get("/krul/conversations?limit=3")
    assert status == 200
    assert body["total"] == len(leaves(one)) + len(leaves(other))
    assert len(body["conversations"]) == 3
    ages = [line["age_seconds"] for line in body["conversations"]]
    assert ages == sorted(ages)
    only = hashed([*range(700, 730), 1, 2])
    status, body = get(f"/krul/conversations/{only[:6]}")
    assert (status, body["id"], body["dp_rank"]) == (200, only, 1)
    # Both replicas know this one; it is one conversation, not an ambiguous id.
    both = hashed([*range(600, 640), 1, 2])
    assert get(f"/krul/conversations/{both}")[0] == 200


def test_routes_say_in_one_line_what_is_wrong(make_rig, http) -> None:
    rig = busy(make_rig)
    get = http(Manager(rig))
    for path, status, named in (
        ("/krul/conversations?limit=x", 400, "limit=x"),
        ("/krul/conversations/feedfeedfeed", 404, "no conversation has this id"),
    ):
        found_status, body = get(path)
        assert found_status == status
        assert named in body["error"]
    names = [hashed(rig.path_tokens(leaf)) for leaf in leaves(rig)]
    shared = next((a[0] for a in names for b in names if a != b and a[0] == b[0]), None)
    if shared:
        assert "conversations begin so" in get(f"/krul/conversations/{shared}")[1]["error"]


def test_the_routes_are_the_operators(make_rig, http) -> None:
    get = http(Manager(busy(make_rig)), api_key="user", admin_api_key="admin")
    for path in ("/krul/conversations", "/krul/conversations/feed"):
        assert get(path)[0] == get(path, "user")[0] == 401
        assert get(path, "admin")[0] in (200, 404)


def test_no_routes_without_krul_or_http_server(make_rig, http, monkeypatch) -> None:
    get = http(Manager(busy(make_rig), backend="radix"))
    assert get("/krul/conversations") == (404, {"detail": "Not Found"})
    monkeypatch.delitem(sys.modules, questions.HTTP_SERVER)
    assert questions.add_routes(None, Manager()) is None


def test_tokens_are_never_told(make_rig) -> None:
    """No list of numbers is as long as a conversation's tokens, no text is in the answers."""
    rig = busy(make_rig)
    for line in listed(rig)["conversations"]:
        body = found(rig, line["id"])["detail"]
        assert body.keys() - line.keys() == {
            *("header_bytes", "class_factors", "classed_tokens", "layers", "similarity")
        }
        text = {key: value for key, value in body.items() if isinstance(value, str)}
        assert text.keys() == {"id", "namespace"}
