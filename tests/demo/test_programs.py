"""The chat programs of demo/programs, each in a process of its own, against one live server."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from krul_sglang.live_server import LiveServer, server_environment

PROGRAMS = Path(__file__).resolve().parents[2] / "demo" / "programs"
SMALL = {
    "support": ("--turns", "2"),
    "documents": ("--turns", "2", "--words", "150"),
    "roleplay": ("--turns", "1"),
    "agent": ("--turns", "3"),
    "crowd": ("--turns", "2", "--users", "6", "--think", "0.1"),
}


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program's exit code and what it printed."""
    return subprocess.run(
        [sys.executable, str(PROGRAMS / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        env=server_environment(),
        timeout=400,
        check=False,
    )


def fails(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line on stderr of a program that ended with ``code``."""
    assert done.returncode == code, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    return line


@pytest.fixture(scope="module")
def live(serve) -> Iterator[LiveServer]:
    """A pool that holds about one conversation; two would not be evicted by each other."""
    krul = ("--enable-krul", "--krul-policy", "lossless", "--krul-recompute", "never")
    with serve(*krul, "--max-total-tokens", "512") as server:
        yield server


@pytest.mark.server
@pytest.mark.parametrize("name", SMALL)
def test_what_was_evicted_comes_back(live: LiveServer, name: str) -> None:
    before = live.krul()
    done = run(name, "--url", live.url, "--answer", "4", "--json", *SMALL[name])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["program"] == name
    assert found["chat_template"] == "chatml"
    assert found["policy"] == "lossless"
    turns = found["turns"]
    for turn in turns:
        assert turn["prompt"] == turn["device"] + turn["restored"] + turn["computed"]
        assert turn["ttft"] > 0
    back = [turn for turn in turns if turn["number"] > 1 or turn["conversation"] in ("stranger",)]
    assert any(turn["restored"] > turn["computed"] for turn in back)
    if name != "crowd":  # where chance decides who is still on the device
        assert all(turn["restored"] for turn in back)
        assert all(turn["without"] > 0 for turn in back if turn["restored"] > turn["computed"])
        assert found["ttft_without"] > 0
    after = live.krul()
    assert found["restored_tokens"] == sum(turn["restored"] for turn in turns)
    # Nothing but what the server says; pressure and comparing restore nothing of their own.
    assert found["restored_tokens"] <= after["restored_tokens"] - before["restored_tokens"]
    assert after["evicted_tokens"] > before["evicted_tokens"]


@pytest.mark.server
def test_the_table_says_where_tokens_came_from(live: LiveServer) -> None:
    done = run(
        "support", "--url", live.url.removeprefix("http://"), "--answer", "2", "--turns", "2"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("A long support dialogue")
    assert lines[1].split("  ")[0] == "conversation"
    second = lines[3].split()
    assert second[:2] == ["Anna", "2"]
    assert second.count("s") == 2, "with and without Krul"
    assert "tokens restored" in lines[4]


@pytest.mark.server
def test_without_comparing_nothing_is_asked_twice(live: LiveServer) -> None:
    done = run("agent", "--url", live.url, "--turns", "2", "--json", "--no-compare")
    found = json.loads(done.stdout)
    assert found["restored_tokens"] > 0
    assert all(turn["without"] is None for turn in found["turns"])


@pytest.mark.server
def test_a_template_nobody_knows_is_one_line(live: LiveServer) -> None:
    line = fails(run("crowd", "--url", live.url, "--chat-template", "chatlm"), 2)
    assert "--chat-template chatlm: unknown; one of" in line


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--url", "http://127.0.0.1:9"), "--url http://127.0.0.1:9: "),
        (("--url", "no address"), "--url http://no address: "),
        (("--model", "nowhere"), "--model nowhere: no model there; run `make model`"),
        (("--turns", "0"), "--turns 0: at least 1"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: tuple[str, ...], said: str) -> None:
    assert said in fails(run("support", *arguments), 2)


class Poor(BaseHTTPRequestHandler):
    """Answers /server_info and /model_info, and drops whoever wants more."""

    krul = True

    def do_GET(self) -> None:
        state = {"krul": {}} if self.krul else {}
        body = {"internal_states": [state], "max_total_num_tokens": 64, "max_req_input_len": 64}
        if "model_info" in self.path:
            body = {"model_path": "TinyLlama-chat"}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def do_POST(self) -> None:
        self.connection.close()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.process
@pytest.mark.parametrize(
    ("krul", "code", "said"), [(True, 1, "the server is gone"), (False, 2, "runs without Krul")]
)
def test_a_server_that_fails_is_one_line(krul: bool, code: int, said: str) -> None:
    """It dies under a program's own thread, which must not be waited for."""
    server = HTTPServer(("127.0.0.1", 0), type("_", (Poor,), {"krul": krul}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        done = run("support", "--url", f"http://127.0.0.1:{server.server_port}")
        assert said in fails(done, code)
    finally:
        server.shutdown()
        server.server_close()
