"""`krul inspect` against servers that answer well, badly or not at all."""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from bodies import LINE, conversation

from krul_sglang.inspection import command


class Answers(BaseHTTPRequestHandler):
    """``answers`` maps a path to a status and a body; ``asked`` is what came."""

    answers: dict[str, tuple[int, str]]
    asked: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers["Authorization"]))
        status, body = self.answers.get(self.path, (404, '{"detail": "Not Found"}'))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve():
    """``serve({path: (status, body)})``: an address, and the list of what was asked there."""
    servers = []

    def start(answers: dict[str, tuple[int, str]]) -> tuple[str, list]:
        handler = type("_", (Answers,), {"answers": answers, "asked": []})
        servers.append(HTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}", handler.asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(url: str, name: str | None = None, **options) -> None:
    defaults = {"detail": False, "json": False, "png": None, "limit": 20, "api_key": None}
    command.run(url, name, **{**defaults, **options})


LISTED = json.dumps({"total": 1, "conversations": [LINE]})
ONE = json.dumps(conversation())


def test_it_lists_or_shows_one(serve, capsys) -> None:
    url, asked = serve(
        {
            "/krul/conversations?limit=3": (200, LISTED),
            "/krul/conversations/1f97": (200, ONE),
        }
    )
    ask(url + "/", limit=3)
    assert "1 of 1 conversations" in capsys.readouterr().out
    ask(url, "1f97")
    shown = capsys.readouterr().out
    assert "Segments" in shown
    assert "Layers" not in shown
    ask(url, "1f97", detail=True)
    assert "Layers" in capsys.readouterr().out
    ask(url.removeprefix("http://"), "1f97", json=True, api_key="secret")
    assert json.loads(capsys.readouterr().out) == conversation()
    assert [key for _, key in asked] == [None, None, None, "Bearer secret"]


def test_a_detail_without_an_id_is_of_the_newest_that_is_stored(serve, capsys) -> None:
    fresh = {**LINE, "id": "aaaaaaaaaaaa", "stored_tokens": 0}
    both = json.dumps({"total": 2, "conversations": [fresh, LINE]})
    url, asked = serve(
        {
            "/krul/conversations?limit=20": (200, both),
            f"/krul/conversations/{LINE['id']}": (200, ONE),
        }
    )
    ask(url, detail=True)
    assert asked[-1][0].endswith(LINE["id"])
    only = json.dumps({"total": 1, "conversations": [fresh]})
    url, asked = serve({"/krul/conversations?limit=20": (200, only)})
    with pytest.raises(ValueError, match="runs without Krul"):
        ask(url, detail=True)
    assert asked[-1][0].endswith("/aaaaaaaaaaaa")


def test_a_picture_is_of_one_conversation(serve, tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    url, _ = serve({"/krul/conversations/1f97": (200, ONE)})
    ask(url, "1f97", png=tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 10_000
    assert "Segments" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (404, '{"detail": "Not Found"}', "runs without Krul; start it with --enable-krul"),
        (404, '{"error": "no conversation has this id"}', "no conversation has this id"),
        (400, '{"error": "limit=x: a number"}', "limit=x: a number"),
        (401, '{"error": "Unauthorized"}', "wants a key: give it with --api-key"),
        (500, "<html>", "answers with status 500"),
        (200, "<html>", "not as SGLang does"),
        (200, "[]", "not as SGLang does"),
        (200, "{}", "not as SGLang does"),
    ],
)
def test_what_a_server_refuses_is_one_line(serve, status: int, body: str, said: str) -> None:
    url, _ = serve({"/krul/conversations?limit=20": (status, body)})
    with pytest.raises(ValueError, match=said) as caught:
        ask(url)
    assert "\n" not in str(caught.value)


def test_an_empty_server_has_no_newest(serve) -> None:
    url, _ = serve({"/krul/conversations?limit=20": (200, '{"total": 0, "conversations": []}')})
    with pytest.raises(ValueError, match="holds no conversation yet"):
        ask(url, detail=True)


@pytest.mark.parametrize("url", ["ftp://host", "http://", "", "http://[::1", "host:port"])
def test_what_is_no_address_is_one_line(url: str) -> None:
    with pytest.raises(ValueError, match="not an address such as"):
        ask(url)


def test_nobody_there_is_one_line() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        with pytest.raises(OSError, match=r"cannot be reached .*refused"):
            ask(f"http://127.0.0.1:{probe.getsockname()[1]}")


def test_a_server_that_does_not_answer_is_one_line(monkeypatch) -> None:
    monkeypatch.setattr(command, "PATIENCE", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(OSError, match="did not answer within"):
            ask(f"http://127.0.0.1:{silent.getsockname()[1]}")


@pytest.mark.parametrize("name", ["zz", "", "../etc", "1F97", "0123456789abc"])
def test_what_is_no_id_is_not_asked_for(name: str) -> None:
    with pytest.raises(ValueError, match="no conversation's id"):
        ask("http://127.0.0.1:9", name)
