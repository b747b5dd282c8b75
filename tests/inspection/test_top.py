"""`krul top`: what is made of a server's answers, and how it behaves on a terminal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from rich.console import Console

from krul_sglang.inspection import top

RANK = {
    "policy": "predictive",
    "segments": 7,
    "sealed_segments": 5,
    "stored_tokens": 4000,
    "raw_bytes": 46_000_000,
    "stored_bytes": 4_000_000,
    "restores": 3,
    "restored_tokens": 1200,
    "recomputed_tokens": 64,
    "evicted_tokens": 4100,
    "dropped_tokens": 0,
    "lost_segments": 1,
    "restore": {"failed": 2, "late": 1},
    "memory": {"tier": 3_000_000, "staging": 1_500_000, "limit": 5_000_000, "peak": 4_900_000},
    "tiers": {
        "memory": {"bytes": 3_000_000, "limit": 5_000_000},
        "disk": {"bytes": 8_000_000, "limit": 10_000_000, "degraded": ""},
    },
}
LOAD = {
    "num_running_reqs": 2,
    "num_waiting_reqs": 3,
    "num_used_tokens": 1536,
    "max_total_num_tokens": 2048,
    "cache_hit_rate": 0.25,
}
RESTORE = {
    "age_seconds": 12.3,
    "tokens": 480,
    "recomputed_tokens": 64,
    "new_tokens": 17,
    "stored_bytes": 812_340,
    "makespan_seconds": 0.5,
    "predicted_seconds": None,
    "bubble_seconds": {"load": 0.4, "compute": 0.05},
    "failed": False,
}


def shown(now: top.Look, speed=None) -> str:
    out = Console(width=132, file=io.StringIO(), highlight=False)
    out.print(top.frame("http://here", now, speed or {}))
    return out.file.getvalue()


def look(**changes) -> top.Look:
    return top.Look([{**RANK, **changes}], [LOAD], [RESTORE], "model")


def row(text: str, begins: str) -> list[str]:
    """The cells of the line that begins so, after its name."""
    line = next(line for line in text.splitlines() if line.startswith(begins))
    return line.removeprefix(begins).split()


def test_tiers_stand_against_their_budgets() -> None:
    text = shown(look())
    assert row(text, "device")[-5:] == ["1536", "tokens", "2048", "tokens", "75%"]
    # All kinds of memory count, not only what is sealed.
    assert row(text, "memory")[-5:] == ["4.5", "MB", "5", "MB", "90%"]
    assert row(text, "disk")[-5:] == ["8", "MB", "10", "MB", "80%"]
    bars = [line.count("━") for line in text.splitlines() if "MB" in line and "━" in line]
    assert bars == [0.9 * top.BAR, 0.8 * top.BAR]


def test_figures_and_restores() -> None:
    text = shown(look())
    assert "11.5x" in text
    assert row(text, "segments (to be encoded)")[:2] == ["7", "(2)"]
    assert row(text, "requests running, waiting")[:2] == ["2,", "3"]
    assert row(text, "failed, late restores")[:2] == ["2,", "1"]
    assert row(text, "12 s ago")[:3] == ["480", "64", "17"]
    assert row(text, "12 s ago")[-3:] == ["-", "80%", "10%"]


def test_replicas_add_up() -> None:
    both = top.Look([RANK, {**RANK, "tiers": {}}], [LOAD, LOAD], [], "model")
    text = shown(both)
    assert row(text, "memory")[-5:] == ["9", "MB", "10", "MB", "90%"]
    assert row(text, "disk")[-5:] == ["8", "MB", "10", "MB", "80%"]
    assert "2 replicas" in text
    assert "Nothing was restored yet." in text


def test_rates_are_per_second_and_a_new_server_has_none() -> None:
    before = top.Look([RANK], [LOAD], [], "model", at=10.0)
    now = top.Look([{**RANK, "restored_tokens": 1700}], [LOAD], [], "model", at=12.0)
    assert top.rates(before, now)["restored_tokens"] == 250
    assert top.rates(before, now)["restores"] == 0
    assert top.rates(None, now) == {}
    assert top.rates(now, top.Look([RANK], [LOAD], [], "model", at=14.0)) == {}
    assert row(shown(now, top.rates(before, now)), "hit rate of the last prefills")[-2:] == [
        "250.0",
        "1700",
    ]


class Answers(BaseHTTPRequestHandler):
    krul = True

    def do_GET(self) -> None:
        body: dict = {"loads": [LOAD]}
        if self.path == "/server_info":
            body = {"internal_states": [{"krul": RANK} if self.krul else {}]}
        elif self.path.startswith("/krul/restores"):
            body = {"restores": [RESTORE]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving(port: int = 0, krul: bool = True):
    server = HTTPServer(("127.0.0.1", port), type("_", (Answers,), {"krul": krul}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "krul_sglang.cli", "top", *arguments]


def once(port: int) -> subprocess.CompletedProcess[str]:
    url = f"http://127.0.0.1:{port}"
    return subprocess.run(
        command("--once", "--url", url), capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.process
def test_once_prints_or_says_what_is_wrong() -> None:
    with serving() as port:
        done = once(port)
        assert done.returncode == 0, done.stderr
        assert "last restores" in done.stdout
        assert "\x1b" not in done.stdout
    down = once(port)
    assert down.returncode == 2
    (line,) = down.stderr.splitlines()
    assert line.startswith("krul top: error: http://127.0.0.1:")
    assert "cannot be reached" in line
    with serving(krul=False) as port:
        assert "runs without Krul; start it with --enable-krul" in once(port).stderr


class Terminal:
    """`krul top` on a terminal of its own."""

    def __init__(self, url: str) -> None:
        self._end, inner = pty.openpty()
        env = {**os.environ, "TERM": "xterm", "COLUMNS": "132", "LINES": "50"}
        self.process = subprocess.Popen(
            command("--url", url, "--interval", "0.2"),
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env=env,
            start_new_session=True,
        )
        os.close(inner)
        self.text = ""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while block := os.read(self._end, 65536):
                self.text += block.decode(errors="replace")

    def shows(self, what: str, since: int = 0, seconds: float = 30) -> int:
        """Wait for it; returns where the output ended then."""
        until = time.monotonic() + seconds
        while what not in self.text[since:]:
            assert time.monotonic() < until, f"{what!r} not in {self.text[since:]!r}"
            assert self.process.poll() is None, self.text
            time.sleep(0.05)
        return len(self.text)

    def stop(self) -> int:
        os.killpg(self.process.pid, signal.SIGINT)
        code = self.process.wait(20)
        time.sleep(0.2)
        return code


@pytest.mark.process
def test_it_waits_for_a_server_that_is_gone_and_leaves_the_terminal_clean() -> None:
    with serving() as port:
        terminal = Terminal(f"http://127.0.0.1:{port}")
        try:
            seen = terminal.shows("last restores")
            assert "\x1b[?1049h" in terminal.text, "it takes the other screen"
        except BaseException:
            terminal.process.kill()
            raise
    try:
        seen = terminal.shows("cannot be reached", seen)
        assert "asking again every 0.2 s" in terminal.text
        with serving(port):
            while "cannot be reached" in terminal.text[seen:]:
                seen = len(terminal.text)
            seen = terminal.shows("last restores", len(terminal.text))
            assert terminal.stop() == 0
    finally:
        terminal.process.kill()
    assert terminal.text.index("\x1b[?25l") < terminal.text.rindex("\x1b[?25h"), "a cursor again"
    assert terminal.text.rindex("\x1b[?1049l") > terminal.text.rindex("last restores")
    assert "Traceback" not in terminal.text
