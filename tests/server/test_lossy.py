"""The lossy policy: smaller, reported, and a miss for whoever demands exact KV."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from dialogue import CONVERSATIONS, SMALL_POOL, Dialogue, outputs

from krul_sglang.live_server import LiveServer

pytestmark = pytest.mark.server

# A busy machine may find a hundred tokens sooner computed than decoded, and rightly so.
LOAD_ALL = ("--krul-recompute", "never")
EXACT = {"custom_params": {"krul": "exact"}}


@pytest.fixture(scope="module")
def lossy_server(serve, chat_profile):
    """Krul with its default policy and a pool too small for the working set."""
    flags = ("--krul-profile", str(chat_profile), *LOAD_ALL, *SMALL_POOL)
    with serve("--enable-krul", *flags) as server:
        yield server


def test_lossy_restores_are_smaller_and_reported(lossy_server):
    """Fewer bytes than raw, and every request is told how many of its tokens are lossy."""
    lossy_server.flush()
    done = Dialogue(lossy_server).run()
    lossy = [turn.hits("lossy") for turns in done for turn in turns[1:]]
    assert all(count > 0 for count in lossy)
    for turns in done:
        for turn in turns:
            assert turn.hits("lossy") <= turn.hits("device") + turn.hits("host")
    state = lossy_server.krul()
    assert state["policy"] == "predictive"
    assert state["lossy_segments"] > 0
    assert state["ratio"] > 3  # against float32 rows
    assert state["ratio"] == pytest.approx(state["raw_bytes"] / state["stored_bytes"], abs=1e-3)
    assert state["protected_tokens"] == 0


def test_exact_on_demand(lossy_server, reference):
    """A request that demands exact KV gets a never-evicted run's answer, whatever is stored."""
    lossy_server.flush()
    Dialogue(lossy_server).run()  # leaves lossy segments and lossy rows behind
    done = Dialogue(lossy_server, sampling=EXACT).run()
    assert outputs(done) == reference
    assert all(turn.hits("lossy") == 0 for turns in done for turn in turns)
    state = lossy_server.krul()
    assert state["recomputed_tokens"] > 0
    assert state["protected_tokens"] == 0


def inspect(server: LiveServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`krul inspect` as a user runs it."""
    command = [sys.executable, "-m", "krul_sglang.cli", "inspect", "--url", server.url]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


def test_inspect_shows_what_is_stored(lossy_server, tmp_path):
    """Conversations evicted under pressure by others: a list, one in detail, JSON, a picture."""
    lossy_server.flush()
    Dialogue(lossy_server).run(turns=2)
    lossy_server.generate([7] * 150, 1)  # the last of them leaves too
    listed = json.loads(inspect(lossy_server, "--json").stdout)
    lines = {line["id"]: line for line in listed["conversations"] if line["lossy_tokens"]}
    assert len(lines) == CONVERSATIONS
    name, line = lines.popitem()
    assert 90 < line["tokens"] == line["exact_tokens"] + line["lossy_tokens"]
    assert line["stored_tokens"] > 60
    assert line["age_seconds"] < 120
    table = inspect(lossy_server)
    assert table.returncode == 0
    assert name in table.stdout

    found = json.loads(inspect(lossy_server, name[:6], "--json").stdout)
    assert found["id"] == name
    assert len(found["layers"]) == 30
    layers = sum(layer["stored_bytes"] for layer in found["layers"])
    assert layers + found["header_bytes"] == found["stored_bytes"] == line["stored_bytes"]
    assert found["ratio"] > 3  # against float32 rows
    assert [layer["references"] for layer in found["layers"]] == [[], *([n] for n in range(29))]
    assert all(0 < layer["error"] < 1 for layer in found["layers"])
    assert found["similarity"]["measure"] == "correlation"
    assert found["similarity"]["layers"] == list(range(0, 30, 2))

    shown = inspect(lossy_server, "--detail", "--png", str(tmp_path / "newest.png"))
    assert shown.returncode == 0, shown.stderr
    for said in ("Segments", "Layers", "quantized tokens", "Similarity of layers over"):
        assert said in shown.stdout
    assert (tmp_path / "newest.png").stat().st_size > 20_000


def test_inspect_says_in_one_line_what_is_wrong(lossy_server, plain_server):
    for server, arguments, said in (
        (lossy_server, ("feedfeedfeed",), "no conversation has this id"),
        (lossy_server, ("nonsense",), "no conversation's id"),
        (lossy_server, ("--url", "http://127.0.0.1:9"), "cannot be reached"),
        (plain_server, (), "runs without Krul; start it with --enable-krul"),
    ):
        done = inspect(server, *arguments)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("krul inspect: error: ")
        assert said in line


def test_finished_requests_say_what_they_attended_to(lossy_server):
    """Requests side by side, one of them cut off by its client: all that finish are measured."""
    lossy_server.flush()
    before = lossy_server.krul()["measured_requests"]

    def ask(seed: int) -> dict:
        return lossy_server.generate([1000 + (7 * i + seed) % 3000 for i in range(60)], 24)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(0, 400, 100)))
        sampling = {"max_new_tokens": 2000, "ignore_eos": True}
        body = {"input_ids": [5] * 60, "sampling_params": sampling, "stream": True}
        url = lossy_server.url + "/generate"
        with requests.post(url, json=body, timeout=60, stream=True) as cut_off:
            assert next(cut_off.iter_lines()).startswith(b"data:")
    assert all(answer["meta_info"]["completion_tokens"] == 24 for answer in answers)
    state = lossy_server.krul()
    assert state["measured_requests"] - before >= 4
    assert state["memory"]["taps"] > 0


def test_attention_can_be_left_alone(serve, chat_profile):
    flags = ("--krul-profile", str(chat_profile), "--krul-attention", "off", *SMALL_POOL)
    with serve("--enable-krul", *flags) as server:
        server.generate(list(range(1000, 1060)), 24)
        state = server.krul()
    assert state["measured_requests"] == state["memory"]["taps"] == 0


def test_the_papers_selection_serves(serve):
    """Its pairs come from attention measured in the server; what it restores is reported."""
    with serve("--enable-krul", "--krul-policy", "paper", *LOAD_ALL, *SMALL_POOL) as server:
        done = Dialogue(server).run()
        state = server.krul()
        shown = json.loads(inspect(server, "--detail", "--json").stdout)
    assert shown["similarity"]["measure"] == "distance"
    assert sum(bool(layer["references"]) for layer in shown["layers"]) >= 2
    assert all(turn.hits("lossy") > 0 for turns in done for turn in turns[1:])
    assert state["measured_requests"] > 0
    assert state["lossy_segments"] > 0
    assert state["lost_segments"] == state["protected_tokens"] == 0
