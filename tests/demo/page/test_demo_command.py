"""The demo as a command: its options, and the server that it keeps up."""

from __future__ import annotations

import time

import pytest
import requests
from app import DemoError, address, options
from web.own_server import OwnServer

from krul_sglang.live_server import LiveServer

SERVES = """
import http.server, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def test_a_server_that_dies_is_started_again_until_the_demo_ends(tmp_path) -> None:
    script = tmp_path / "serves.py"
    script.write_text(SERVES)
    server = LiveServer(tmp_path, entry=(str(script),)).start()
    said: list[str] = []
    own = OwnServer(server, said.append)
    own.watch()
    first = server.process
    first.kill()
    until = time.monotonic() + 30
    while "the server is back" not in said:
        assert time.monotonic() < until, said
        time.sleep(0.1)
    second = server.process
    assert second is not first
    assert requests.get(server.url, timeout=5).status_code == 200
    own.stop()
    assert second.poll() is not None
    time.sleep(1.5)
    assert server.process is None, "it is not started once more"


# ---- the command line --------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--pool", "10"], "--pool 10: at least 512"),
        (["--answer", "0"], "--answer 0: from 1"),
        (["--port", "70000"], "--port 70000: from 1"),
    ],
)
def test_bad_options_are_one_line(capsys, arguments, said) -> None:
    with pytest.raises(SystemExit) as ended:
        options(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_addresses_are_completed_or_refused() -> None:
    assert address("localhost:30000/") == "http://localhost:30000"
    for bad in ("ftp://x", "http://", "http://x:0", "http://x:y"):
        with pytest.raises(DemoError, match="--server-url"):
            address(bad)
