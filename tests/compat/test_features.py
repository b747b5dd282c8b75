"""SGLang's features together with Krul: everything is restored and nothing changes.

One server per set of independent flags, lossless, with a pool that evicts every
conversation between its turns. The answers are those of plain SGLang with a large pool.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from typing import Any

import pytest
import requests

pytestmark = [pytest.mark.server, pytest.mark.long]

KRUL = ("--skip-tokenizer-init", "--enable-krul", "--krul-policy", "lossless")
KRUL += ("--krul-recompute", "never")
LONG_ANSWER = 64
SMALL = ("--max-total-tokens", "192")


@dataclass
class Reference:
    """What plain SGLang answers when it never evicts."""

    done: list
    batched: list
    logprobs: list


def continued(done: list) -> list[dict[str, Any]]:
    """A further turn of each conversation that asks for its new tokens' log-probabilities."""
    requests_ = []
    for number, past in enumerate(done):
        history = past[-1]["prompt"] + past[-1]["output_ids"]
        prompt = [*history, 100 + number, 200, 300, 400 + number]
        requests_.append(
            {
                "input_ids": prompt,
                "sampling_params": {"temperature": 0, "max_new_tokens": 4},
                "return_logprob": True,
                "logprob_start_len": len(history) - 1,
                "top_logprobs_num": 2,
            }
        )
    return requests_


def logprobs(server: Any, done: list, host_hits: Any) -> tuple[list[list[float]], int]:
    """Input and output log-probabilities of :func:`continued`, and the restored tokens."""
    rows, restored = [], 0
    for body in continued(done):
        answer = server.post("/generate", body)
        meta = answer["meta_info"]
        restored += host_hits(answer)
        rows.append(
            [
                value
                for value, *_ in meta["input_token_logprobs"] + meta["output_token_logprobs"]
                if value is not None
            ]
        )
    return rows, restored


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("qwen3", 64, 4, "yarn")


@pytest.fixture(scope="module")
def reference(serve, model, talk, host_hits) -> Reference:
    with serve("--skip-tokenizer-init", "--max-total-tokens", "4096", model=model) as server:
        done = talk(server)
        rows, _ = logprobs(server, done, host_hits)
        server.flush()
        return Reference(done, talk(server, together=True, seed=8), rows)


def settled(server: Any) -> dict[str, Any]:
    """The krul block; asserts that nothing is locked, lost or dropped."""
    state = server.krul()
    assert state["protected_tokens"] == state["lost_segments"] == state["dropped_tokens"] == 0
    return state


FLAGS = {
    "chunked-prefill": ("--chunked-prefill-size", "32"),
    "mixed-chunk-lfu": (
        *("--chunked-prefill-size", "32", "--enable-mixed-chunk"),
        *("--radix-eviction-policy", "lfu"),
    ),
    "no-chunks-no-overlap-slru": (
        *("--chunked-prefill-size", "-1", "--disable-overlap-schedule"),
        *("--radix-eviction-policy", "slru"),
        # SGLang's own guess, which allows for prefills of any length, leaves nothing.
        *("--mem-fraction-static", "0.5"),
    ),
    "lpm-priority": (
        *("--schedule-policy", "lpm"),
        *("--radix-eviction-policy", "priority"),
    ),
    "tlru-page16": (
        *("--page-size", "16", "--radix-eviction-policy", "tlru"),
        *("--radix-eviction-policy-config", '{"threshold": 64, "next_prompt_estimate": 16}'),
    ),
    "fcfs-lru": ("--schedule-policy", "fcfs", "--radix-eviction-policy", "lru"),
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_scheduling(serve, model, reference, talk, ids, host_hits, flags):
    """Chunked prefill on, off and mixed; overlap on and off; every eviction policy."""
    with serve(*KRUL, *SMALL, *flags, model=model) as server:
        done = talk(server)
        assert ids(done) == ids(reference.done)
        assert host_hits(done) > 0
        again = talk(server, together=True, seed=8)
        assert ids(again) == ids(reference.batched)
        assert settled(server)["restored_tokens"] == host_hits(done) + host_hits(again)


def test_logprobs_of_a_restored_prefix(serve, model, reference, talk, ids, host_hits):
    """return_logprob: the same numbers on a restored prefix as on one never evicted."""
    with serve(*KRUL, *SMALL, model=model) as server:
        done = talk(server)
        rows, restored = logprobs(server, done, host_hits)
        settled(server)
    assert restored > 0
    assert [len(row) for row in rows] == [len(row) for row in reference.logprobs]
    for row, expected in zip(rows, reference.logprobs, strict=True):
        assert row == pytest.approx(expected, abs=1e-4)


def test_session_radix_cache(serve, model, reference, talk, ids, host_hits):
    """Sessions whose KV is evicted last, then closed: still restored, nothing held."""
    with serve(*KRUL, *SMALL, "--enable-session-radix-cache", model=model) as server:
        done = talk(server, sessions=True)
        assert ids(done) == ids(reference.done)
        assert host_hits(done) > 0
        for number in range(len(done)):
            requests.post(
                f"{server.url}/close_session", json={"session_id": f"s{number}"}, timeout=30
            ).raise_for_status()
        settled(server)
        assert ids(talk(server, together=True, seed=8)) == ids(reference.batched)


def test_data_parallel(serve, model, reference, talk, ids, host_hits, two_ranks):
    """Two replicas, each with a cache of its own; every conversation stays on one."""
    with serve(*KRUL, *SMALL, "--dp-size", "2", model=model, env=two_ranks) as server:
        for rank in (0, 1):
            done = talk(server, body={"routed_dp_rank": rank})
            assert ids(done) == ids(reference.done)
            assert host_hits(done) > 0
        answer = requests.get(f"{server.url}/server_info", timeout=60).json()
        blocks = [state["krul"] for state in answer["internal_states"]]
        assert len(blocks) == 2
        assert all(block["restored_tokens"] > 0 for block in blocks)
        listed = requests.get(f"{server.url}/krul/conversations", timeout=60).json()
        assert {line["dp_rank"] for line in listed["conversations"]} == {0, 1}


def test_several_http_workers(serve, model, reference, talk, ids, host_hits):
    """Each of them answers requests, and questions about what is stored."""
    with serve(*KRUL, *SMALL, "--tokenizer-worker-num", "2", model=model) as server:
        done = talk(server)
        assert ids(done) == ids(reference.done)
        assert host_hits(done) > 0
        for _ in range(8):  # whichever of them takes the connection
            listed = requests.get(f"{server.url}/krul/conversations", timeout=60).json()
            assert listed["total"] >= len(done)


def test_pause_and_release(serve, model, reference, talk, ids, host_hits):
    """Paused in place, retracted, and the KV released: the answers stay the same."""
    with serve(*KRUL, *SMALL, model=model) as server:
        done = talk(server, turns=2)
        prompt = done[0][-1]["prompt"]
        plain = server.generate(prompt, LONG_ANSWER)["output_ids"]
        for mode in ("in_place", "retract"):
            talk(server, turns=1, seed=21)  # pushes the prompt's KV off the device
            assert streamed_over_a_pause(server, prompt, mode) == plain
        for path in ("/release_memory_occupation", "/resume_memory_occupation"):
            server.post(path, {"tags": ["kv_cache"]})
        assert ids(talk(server)) == ids(reference.done)
        settled(server)


def streamed_over_a_pause(server: Any, prompt: list[int], mode: str) -> list[int]:
    """Output ids of a streamed answer that is paused once its first token arrived."""
    first, tokens = threading.Event(), []

    def stream() -> None:
        body = {
            "input_ids": prompt,
            "sampling_params": {"temperature": 0, "max_new_tokens": LONG_ANSWER},
            "stream": True,
        }
        with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=120) as got:
            for line in got.iter_lines():
                if line.startswith(b"data: {"):
                    tokens[:] = json.loads(line[6:])["output_ids"]
                    first.set()

    reader = threading.Thread(target=stream)
    reader.start()
    assert first.wait(60)
    requests.post(f"{server.url}/pause_generation", json={"mode": mode}, timeout=60)
    assert len(tokens) < LONG_ANSWER, "the answer ended before the pause"
    requests.post(f"{server.url}/continue_generation", json={}, timeout=60)
    reader.join(120)
    return tokens
