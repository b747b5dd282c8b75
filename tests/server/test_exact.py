"""Lossless: what comes back is what left, token for token."""

from __future__ import annotations

import random
import threading
import time

import pytest
import requests
from dialogue import ANSWER, Dialogue, outputs

pytestmark = pytest.mark.server


def page_size(server) -> int:
    return int(server.command[server.command.index("--page-size") + 1])


def test_returning_turns_are_restored_and_answers_are_equal(lossless_server, reference):
    """Every returning turn restores >= 90 % of what was evicted; ids equal a never-evicted run."""
    lossless_server.flush()
    done = Dialogue(lossless_server).run()
    assert outputs(done) == reference
    page = page_size(lossless_server)
    restored = 0
    for turns in done:
        for turn in turns[1:]:
            usable = turn.cached_before // page * page
            evicted = usable - turn.hits("device")
            assert turn.hits("host") >= 0.9 * evicted
            assert turn.hits("lossy") == 0
            restored += turn.hits("host")
    assert restored > 0
    state = lossless_server.krul()
    assert state["protected_tokens"] == 0
    assert state["restored_tokens"] >= restored
    assert state["dropped_tokens"] == 0
    assert state["lost_segments"] == 0


def test_metrics_agree_with_server_info(lossless_server):
    """/metrics and /server_info tell the same totals."""
    time.sleep(2)  # they may be a second old, and an idle scheduler looks once a second
    state = lossless_server.krul()
    text = requests.get(f"{lossless_server.url}/metrics", timeout=30).text
    for name in ("evicted_tokens", "restored_tokens"):
        line = next(x for x in text.splitlines() if x.startswith(f"sglang:krul_{name}_total{{"))
        assert float(line.rsplit(" ", 1)[1]) == state[name]


def test_flush_cache_forgets_everything(lossless_server):
    """After /flush_cache nothing is stored and nothing is hit."""
    Dialogue(lossless_server, seed=5).run(turns=2)
    lossless_server.flush()
    state = lossless_server.krul()
    assert state["stored_tokens"] == state["segments"] == 0
    assert state["memory"]["tier"] == state["memory"]["staging"] == state["memory"]["index"] == 0
    rng = random.Random(5)
    ids = [rng.randrange(500, 40000) for _ in range(70)]
    assert lossless_server.generate(ids, 1)["meta_info"]["cached_tokens"] == 0


def test_aborts_and_flushes_leave_the_cache_consistent(lossless_server):
    """Concurrent turns, aborted at random, with flushes in between: no leak, no lock left."""
    rng = random.Random(3)
    pasts = [[rng.randrange(500, 40000) for _ in range(40)] for _ in range(6)]

    def turn(ids: list[int], rid: str) -> None:
        # An aborted request answers with an error; that is this test's point.
        requests.post(
            f"{lossless_server.url}/generate",
            json={
                "input_ids": ids,
                "rid": rid,
                "sampling_params": {"temperature": 0, "max_new_tokens": ANSWER},
            },
            timeout=120,
        )

    for round_ in range(10):
        threads = []
        for index, past in enumerate(rng.sample(pasts, 4)):
            cut = rng.randrange(10, len(past))
            ids = past[:cut] + [rng.randrange(500, 40000) for _ in range(8)]
            thread = threading.Thread(target=turn, args=(ids, f"r{round_}-{index}"))
            thread.start()
            threads.append(thread)
        for index in rng.sample(range(4), 2):
            requests.post(
                f"{lossless_server.url}/abort_request",
                json={"rid": f"r{round_}-{index}"},
                timeout=30,
            )
        for thread in threads:
            thread.join()
        if round_ % 4 == 3:
            lossless_server.flush()
    assert lossless_server.krul()["protected_tokens"] == 0
    lossless_server.generate(pasts[0], 1)
