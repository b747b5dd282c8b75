"""The chat programs of demo/programs, against one live server."""

from __future__ import annotations

import json
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
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


MODULES = ("session", "endpoint", "outcome")


@dataclass
class Done:
    """How a program ended, and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """``run(name, *arguments)``: a program in this process, as importing sglang takes longer
    than most of them. Their modules are gone afterwards."""

    def start(name: str, *arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", [str(PROGRAMS / f"{name}.py"), *arguments])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as ended:
            code = int(ended.code or 0)
        return Done(code, *capsys.readouterr())

    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield start
    for name in MODULES:
        sys.modules.pop(name, None)


def fails(done: Done, code: int) -> str:
    """The one line on stderr of a program that ended with ``code``."""
    assert done.code == code, done.out + done.err
    (line,) = done.err.splitlines()
    return line


@pytest.fixture(scope="module")
def live(serve) -> Iterator[LiveServer]:
    """A pool that holds about one conversation; two would not be evicted by each other."""
    krul = ("--enable-krul", "--krul-policy", "lossless", "--krul-recompute", "never")
    with serve(*krul, "--max-total-tokens", "512") as server:
        yield server


@pytest.mark.server
@pytest.mark.parametrize("name", SMALL)
def test_what_was_evicted_comes_back(live: LiveServer, run, name: str) -> None:
    before = live.krul()
    done = run(name, "--url", live.url, "--answer", "4", "--json", *SMALL[name])
    assert done.code == 0, done.err
    found = json.loads(done.out)
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
    # A prompt of random tokens may begin as another one did, and restore a token.
    assert found["restored_tokens"] <= after["restored_tokens"] - before["restored_tokens"]
    assert after["evicted_tokens"] > before["evicted_tokens"]


@pytest.mark.server
def test_one_command_prints_the_table(live: LiveServer) -> None:
    """As a user runs it."""
    url = live.url.removeprefix("http://")
    done = subprocess.run(
        [sys.executable, PROGRAMS / "support.py", "--url", url, "--answer", "2", "--turns", "2"],
        capture_output=True,
        text=True,
        env=server_environment(),
        timeout=400,
        check=False,
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
def test_without_comparing_nothing_is_asked_twice(live: LiveServer, run) -> None:
    done = run("agent", "--url", live.url, "--turns", "2", "--json", "--no-compare")
    found = json.loads(done.out)
    assert found["restored_tokens"] > 0
    assert all(turn["without"] is None for turn in found["turns"])


@pytest.mark.server
def test_a_template_nobody_knows_is_one_line(live: LiveServer, run) -> None:
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
def test_what_cannot_be_is_one_line(run, arguments: tuple[str, ...], said: str) -> None:
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


@pytest.fixture
def poor():
    """``poor(krul)``: the address of a server of that class."""
    servers = []

    def start(krul: bool) -> str:
        servers.append(HTTPServer(("127.0.0.1", 0), type("_", (Poor,), {"krul": krul})))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.process
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_crowd_that_thinks_can_be_ended(poor, end: signal.Signals) -> None:
    url = poor(True)
    crowd = [sys.executable, PROGRAMS / "crowd.py", "--url", url, "--think", "1000"]
    child = subprocess.Popen(crowd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        until = time.monotonic() + 200
        while Path(f"/proc/{child.pid}/task").is_dir() and time.monotonic() < until:
            if len(list(Path(f"/proc/{child.pid}/task").iterdir())) > 32:  # all users are there
                break
            time.sleep(0.2)
        child.send_signal(end)
        said, _ = child.communicate(timeout=60)
        assert child.returncode == 130, said
        assert "Traceback" not in said
    finally:
        child.kill()


@pytest.mark.process
def test_a_program_that_is_ended_takes_its_server_along(chat_model: Path) -> None:
    support = [sys.executable, PROGRAMS / "support.py", "--model", chat_model]
    child = subprocess.Popen(support, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        until = time.monotonic() + 200
        while not (started := psutil.Process(child.pid).children()) and time.monotonic() < until:
            time.sleep(0.2)
        assert started, "it starts a server"
        child.send_signal(signal.SIGTERM)
        said, _ = child.communicate(timeout=60)
        assert child.returncode == 130, said
        assert not psutil.wait_procs(started, timeout=20)[1]
    finally:
        child.kill()


@pytest.mark.process
@pytest.mark.parametrize(
    ("krul", "code", "said"), [(True, 1, "the server is gone"), (False, 2, "runs without Krul")]
)
def test_a_server_that_fails_is_one_line(run, poor, krul: bool, code: int, said: str) -> None:
    """It dies under a program's own thread, which must not be waited for."""
    assert said in fails(run("support", "--url", poor(krul)), code)
