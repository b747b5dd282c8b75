"""The lossy policy: smaller, reported, and a miss for whoever demands exact KV."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from dialogue import SMALL_POOL, Dialogue, outputs

pytestmark = pytest.mark.server

EXACT = {"custom_params": {"krul": "exact"}}


@pytest.fixture(scope="module")
def lossy_server(serve, chat_profile):
    """Krul with its default policy and a pool too small for the working set."""
    with serve("--enable-krul", "--krul-profile", str(chat_profile), *SMALL_POOL) as server:
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


def test_finished_requests_say_what_they_attended_to(lossy_server):
    """Requests side by side, one of them cut off by its client: all that finish are measured."""
    lossy_server.flush()
    before = lossy_server.krul()["measured_requests"]

    def ask(seed: int) -> dict:
        return lossy_server.generate([1000 + (7 * i + seed) % 3000 for i in range(60)], 24)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(0, 400, 100)))
        body = {"input_ids": [5] * 60, "sampling_params": {"max_new_tokens": 2000}}
        with pytest.raises(requests.exceptions.Timeout):
            requests.post(lossy_server.url + "/generate", json=body, timeout=2)
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
    with serve("--enable-krul", "--krul-policy", "paper", *SMALL_POOL) as server:
        done = Dialogue(server).run()
        state = server.krul()
    assert all(turn.hits("lossy") > 0 for turns in done for turn in turns[1:])
    assert state["measured_requests"] > 0
    assert state["lossy_segments"] > 0
    assert state["lost_segments"] == state["protected_tokens"] == 0
