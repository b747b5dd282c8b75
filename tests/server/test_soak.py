"""Random multi-turn load under pressure in every tier for minutes (row 15): nothing grows, nothing
leaks, and answers at the end are those of a server that has nothing stored."""

from __future__ import annotations

import random
import statistics
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import requests
from dialogue import KRUL

from krul_sglang.live_server import LiveServer

pytestmark = [pytest.mark.server, pytest.mark.long, pytest.mark.timeout(3600)]

CLIENTS, CONVERSATIONS = 4, 24
LONGEST, ANSWER = 500, 6
MEMORY, DISK = "24MB", "40MB"
POOL = 1600
"""Tokens on the device: three conversations or so."""


@dataclass
class Client:
    """A user with several conversations; now and then one walks away in the middle."""

    server: LiveServer
    seed: int
    until: float
    talks: list[list[int]] = field(default_factory=list)
    turns: int = 0
    left: int = 0

    def run(self) -> None:
        rng = random.Random(self.seed)
        self.talks = [[] for _ in range(CONVERSATIONS // CLIENTS)]
        while time.monotonic() < self.until:
            number = rng.randrange(len(self.talks))
            talk = self.talks[number]
            if len(talk) > LONGEST:
                talk = []
            talk = [*talk, *(rng.randrange(500, 40000) for _ in range(rng.randrange(10, 120)))]
            if rng.random() < 0.1:
                self._walk_away(talk)
                continue
            answer = self.server.generate(talk, ANSWER)
            self.talks[number] = [*talk, *answer["output_ids"]]
            self.turns += 1

    def _walk_away(self, ids: list[int]) -> None:
        sampling = {"temperature": 0, "max_new_tokens": 200}
        body = {"input_ids": ids, "sampling_params": sampling, "stream": True}
        with requests.post(f"{self.server.url}/generate", json=body, stream=True) as stream:
            next(stream.iter_lines())
        self.left += 1


def footprint(server: LiveServer) -> tuple[int, int]:
    """Resident bytes and open files of the scheduler, which is the largest of its processes."""
    found = psutil.Process(server.process.pid)
    sizes = [(one.memory_info().rss, one.num_fds()) for one in [found, *found.children(True)]]
    return max(sizes)


def test_row_15_nothing_grows(serve, tmp_path: Path, request) -> None:
    seconds = 60 * request.config.getoption("--soak-minutes")
    flags = (*KRUL, "--max-total-tokens", str(POOL), "--krul-host-memory", MEMORY)
    disk = ("--krul-dir", str(tmp_path / "tier"), "--krul-disk", DISK)
    with serve(*flags, *disk) as server:
        began = time.monotonic()
        clients = [Client(server, seed, began + seconds) for seed in range(CLIENTS)]
        threads = [threading.Thread(target=client.run) for client in clients]
        for thread in threads:
            thread.start()
        samples = []
        while any(thread.is_alive() for thread in threads):
            samples.append((time.monotonic() - began, *footprint(server)))
            time.sleep(1)
        for client in clients:
            for talk in client.talks[:2]:
                _answers_as_if_nothing_were_stored(server, [*talk, 7, 8])
        state = server.krul()
        turns, left = (sum(getattr(c, what) for c in clients) for what in ("turns", "left"))
        rss, files = (_halves(samples, seconds, column) for column in (1, 2))
        print(
            f"\nsoak: {seconds:.0f} s, {turns} turns, {left} abandoned; restored "
            f"{state['restored_tokens']} tokens, evicted {state['evicted_tokens']}, demoted "
            f"{state['tiers']['memory']['demoted_segments']} segments, evicted from disk "
            f"{state['tiers']['disk']['evicted']}, lost {state['lost_segments']}; "
            f"RSS {rss[0] / 1e6:.0f} -> {rss[1] / 1e6:.0f} MB, "
            f"files {files[0]:.0f} -> {files[1]:.0f}"
        )
        assert turns > 20
        assert left > 0
        assert state["restored_tokens"] > 0
        assert state["tiers"]["memory"]["demoted_segments"] > 0
        assert state["tiers"]["disk"]["evicted"] > 0
        # What the disk made way with between a match and its restore; nothing else is lost.
        assert state["lost_segments"] <= state["tiers"]["disk"]["vanished"]
        assert state["tiers"]["disk"]["damaged"] == 0
        assert state["memory"]["peak"] <= state["memory"]["limit"]
        assert state["tiers"]["disk"]["bytes"] <= state["tiers"]["disk"]["limit"]
        assert state["protected_tokens"] == 0
        assert rss[1] <= 1.03 * rss[0] + 16e6, "memory grows"
        assert files[1] <= files[0] + 2, "files are left open"


def _halves(samples: list[tuple], seconds: float, column: int) -> tuple[float, float]:
    """Medians of the second and the last quarter of the time."""
    parts = ((0.25, 0.5), (0.75, 1.0))
    found = [
        statistics.median(s[column] for s in samples if a * seconds <= s[0] <= b * seconds)
        for a, b in parts
    ]
    return found[0], found[1]


def _answers_as_if_nothing_were_stored(server: LiveServer, ids: list[int]) -> None:
    sampling = {"temperature": 0, "max_new_tokens": ANSWER}
    stored = server.generate(ids, ANSWER)
    salt = {"input_ids": ids, "sampling_params": sampling, "cache_salt": f"fresh {ids[:4]}"}
    fresh = server.post("/generate", salt)
    assert fresh["meta_info"]["cached_tokens"] == 0
    assert stored["output_ids"] == fresh["output_ids"]
