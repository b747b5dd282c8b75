"""Restores that overlap with the forward pass, on a live server: faults, stalls, crowds."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from dialogue import KRUL

pytestmark = pytest.mark.server

FAULTS = Path(__file__).parent / "faults"


class Place:
    """A server, a conversation it has stored, and what the next turns are answered."""

    def __init__(self, server, order: Path) -> None:
        self.server, self.order = server, order
        rng = random.Random(5)
        self.history = [rng.randrange(500, 40000) for _ in range(300)]
        self.other = [rng.randrange(500, 40000) for _ in range(480)]
        self.turns = [[*self.history, n, n + 1, n + 2] for n in (700, 800)]
        server.generate(self.history, 1)
        self.answers = [server.generate(turn, 6)["output_ids"] for turn in self.turns]

    def evict(self) -> None:
        self.server.generate(self.other, 1)
        assert self.server.krul()["protected_tokens"] == 0

    def tell(self, what: str) -> dict:
        self.order.write_text(what)
        state = self.server.krul()
        assert not self.order.exists()
        return state

    def come_back(self) -> None:
        """Two requests at once, on the same nodes, each answered as if nothing had left."""
        with ThreadPoolExecutor(2) as pool:
            found = pool.map(lambda turn: self.server.generate(turn, 6), self.turns)
        assert [answer["output_ids"] for answer in found] == self.answers


@pytest.fixture(scope="module")
def place(serve, tmp_path_factory) -> Place:
    order = tmp_path_factory.mktemp("faults") / "order"
    with serve(
        *KRUL, "--max-total-tokens", "512", "--krul-link-bandwidth", "1GB/s",
        "--krul-recompute", "never",
        env={"PYTHONPATH": str(FAULTS), "FAULT_FILE": str(order)},
    ) as server:  # fmt: skip
        yield Place(server, order)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_a_load_that_fails_under_way_ends_in_the_right_answer(place, share: float) -> None:
    """Lossless payloads lie in the order of the layers: the first, a middle one, the last."""
    place.evict()
    before = place.tell(f"damage {share}")
    place.come_back()
    after = place.server.krul()
    assert after["lost_segments"] == before["lost_segments"] + 1
    assert after["restore"]["failed"] == before["restore"]["failed"] + 1
    assert after["restore"]["requeued"] > before["restore"]["requeued"]
    assert after["recomputed_tokens"] > before["recomputed_tokens"]
    place.evict()
    place.come_back()
    again = place.server.krul()
    assert again["restore"]["failed"] == after["restore"]["failed"], "it was stored anew"
    assert again["restored_tokens"] >= after["restored_tokens"] + 290


def test_a_load_that_stalls_is_computed_instead_and_not_lost(place) -> None:
    place.evict()
    before = place.tell("stall")
    place.come_back()
    after = place.tell("recover")
    assert after["restore"]["late"] > before["restore"]["late"]
    assert after["lost_segments"] == before["lost_segments"]
    place.evict()
    place.come_back()
    assert place.server.krul()["restored_tokens"] >= after["restored_tokens"] + 290


def test_a_request_that_waits_in_the_queue_is_loaded_meanwhile(place) -> None:
    """The pool cannot hold both conversations, so the second waits for the first to end."""
    place.evict()
    before = place.server.krul()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(place.server.generate, place.other[:280], 60)
        while place.server.krul()["protected_tokens"] == 0:
            assert not first.done(), "it ended before the other could wait for it"
        (answer,) = pool.map(lambda turn: place.server.generate(turn, 6), place.turns[:1])
        first.result()
    assert answer["output_ids"] == place.answers[0]
    assert answer["meta_info"]["cached_tokens_details"]["host"] >= 290
    after = place.server.krul()
    assert after["restore"]["prefetches_used"] == before["restore"]["prefetches_used"] + 1
    assert after["memory"]["prefetch"] == 0


def test_the_trace_of_a_restore(place, tmp_path) -> None:
    place.evict()
    place.server.generate(place.turns[0], 6)
    picture = tmp_path / "trace.png"
    krul = [sys.executable, "-m", "krul_sglang.cli", "trace", "--url", place.server.url]
    told = subprocess.run([*krul, "--json", "--png", picture], capture_output=True, check=True)
    (one,) = json.loads(told.stdout)["restores"]
    assert one["tokens"] >= 290
    assert not one["failed"]
    assert len(one["waits"]) == 30
    lane = [span for load in one["loads"] for layer in load["decode"] for span in layer]
    assert all(0 <= begin <= end <= one["makespan_seconds"] for begin, end in lane)
    for layer, (_, went) in enumerate(one["waits"]):
        ready = max(end for load in one["loads"] for _, end in load["decode"][layer])
        assert went >= ready - 1e-5, "the pass went on before its layer was there"
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = subprocess.run([*krul, "--limit", "3"], capture_output=True, text=True, check=True)
    assert len(table.stdout.splitlines()) == 4
    bad = subprocess.run([*krul[:-1], "127.0.0.1:9"], capture_output=True, text=True)
    assert bad.returncode == 2
    assert len(bad.stderr.splitlines()) == 1


@pytest.mark.long
def test_a_crowd_of_returning_conversations(place) -> None:
    """64 at once in a pool that holds a few: all are answered, memory stays flat."""
    rng = random.Random(9)
    prompts = [[rng.randrange(500, 40000) for _ in range(60)] for _ in range(64)]
    scheduler = next(
        child
        for child in psutil.Process(place.server.process.pid).children(recursive=True)
        if "scheduler" in " ".join(child.cmdline())
    )
    peaks = []
    with ThreadPoolExecutor(64) as pool:
        for round_ in range(4):
            lock, found = threading.Lock(), {}

            def ask(n: int, found=found, lock=lock) -> None:
                answer = place.server.generate(prompts[n], 4)
                with lock:
                    found[n] = answer["output_ids"]

            list(pool.map(ask, range(64)))
            assert sorted(found) == list(range(64))
            for n, ids in found.items():
                prompts[n] = [*prompts[n], *ids]
            if round_:
                peaks.append(scheduler.memory_info().rss)
    state = place.server.krul()
    assert state["protected_tokens"] == 0
    assert state["memory"]["peak"] <= state["memory"]["limit"]
    assert state["restored_tokens"] > 64 * 60
    assert peaks[-1] <= 1.1 * peaks[0]
