"""What rides on the prefix cache: KV events, grammars, namespaces."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest

from krul_sglang.live_server import free_port

pytestmark = [pytest.mark.server, pytest.mark.long]

KRUL = ("--enable-krul", "--krul-policy", "lossless", "--krul-recompute", "never")
BARE = ("--skip-tokenizer-init",)
SMALL, LARGE = ("--max-total-tokens", "192"), ("--max-total-tokens", "4096")


def test_kv_events(serve, tiny, talk, ids, host_hits):
    """The publisher reports blocks that go to the host and come back; hashes are consistent."""
    import msgspec
    import zmq

    port = free_port()
    config = {"publisher": "zmq", "endpoint": f"tcp://*:{port}", "topic": "kv"}
    socket = zmq.Context.instance().socket(zmq.SUB)
    socket.setsockopt_string(zmq.SUBSCRIBE, "kv")
    socket.connect(f"tcp://127.0.0.1:{port}")
    events: list[dict[str, Any]] = []
    flags = (*BARE, *KRUL, *SMALL, "--kv-events-config", json.dumps(config))
    with serve(*flags, model=tiny("qwen3", 64, 4, "yarn")) as server:
        done = talk(server)
        assert host_hits(done) > 0
        while socket.poll(3000):
            batch = msgspec.msgpack.decode(socket.recv_multipart()[-1])
            events += batch[1]
        assert server.krul()["protected_tokens"] == 0
    socket.close(0)
    seen = {(event["type"], event.get("medium")) for event in events}
    assert ("BlockStored", "GPU") in seen
    assert ("BlockRemoved", "GPU") in seen
    assert ("BlockStored", "CPU_PINNED") in seen
    held: dict[str, set[int]] = {"GPU": set(), "CPU_PINNED": set()}
    for event in events:
        if event["type"] == "AllBlocksCleared":
            held = {medium: set() for medium in held}
            continue
        hashes, medium = set(event["block_hashes"]), event["medium"]
        if event["type"] == "BlockStored":
            held[medium] |= hashes
        else:
            assert hashes <= held[medium], "a block is removed that was never stored"
            held[medium] -= hashes
    # What the last turns left behind: one conversation on the device, the others stored.
    assert held["GPU"]
    assert held["CPU_PINNED"] - held["GPU"]


def test_structured_output(serve):
    """Regex and JSON schema on restored prefixes: valid, and equal to a fresh prefill."""
    rng = random.Random(6)
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    grammars = (
        {"regex": r"(yes|no), [a-z]{3,6}\."},
        {"json_schema": json.dumps(schema)},
    )
    with serve(*KRUL, "--max-total-tokens", "224") as server:
        pasts = [[rng.randrange(500, 40000) for _ in range(90)] for _ in range(3)]
        for past in pasts:
            past += server.generate(past, 8)["output_ids"]
        answers = []
        for grammar in grammars:
            for past in pasts:
                answer = server.generate(past, 24, **grammar)
                assert answer["meta_info"]["cached_tokens_details"]["host"] > 0
                answers.append(answer)
        for answer in answers[:3]:
            assert re.fullmatch(grammars[0]["regex"], answer["text"])
        for answer in answers[3:]:
            assert answer["text"].lstrip().startswith("{")
        server.flush()
        for grammar in grammars:
            for past in pasts:
                fresh = server.generate(past, 24, **grammar)
                assert fresh["output_ids"] == answers.pop(0)["output_ids"]
                server.flush()


def test_cache_namespaces(serve, tiny, talk, ids, host_hits):
    """The same tokens under other keys (a LoRA adapter's id is one) never share stored KV."""
    with serve(*BARE, *KRUL, *SMALL, model=tiny("qwen3", 64, 4, "yarn")) as server:
        runs = [
            talk(server, turns=2, body=body)
            for body in ({}, {"extra_key": "a"}, {"extra_key": "b"}, {"cache_salt": "a"})
        ]
        for done in runs:
            assert ids(done) == ids(runs[0])
            assert all(past[0]["meta_info"]["cached_tokens"] == 0 for past in done)
            assert host_hits(done) > 0
        assert server.krul()["protected_tokens"] == 0
