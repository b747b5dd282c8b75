"""The parts of the page without a browser or a server."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from web.client import Answer, Client, RefusedError, ServerBusyError, ServerDownError
from web.converse import converse
from web.layout import script_of
from web.list_panel import list_panel
from web.pressure import Pressure, story
from web.sessions import Session, opening, standing
from web.turns import Turn, account, shared_prefix, trace_of

# ---- accounts ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("details", "known", "wanted"),
    [
        ({}, 0, (0, 0, 0, 100)),
        ({"device": 80, "host": 0}, 80, (80, 0, 0, 20)),
        ({"device": 4, "host": 56, "lossy": 56}, 80, (4, 56, 20, 20)),
        ({}, 80, (0, 0, 80, 20)),
        # The server knew more than this page did.
        ({"device": 90, "host": 0}, 80, (90, 0, 0, 10)),
    ],
)
def test_every_prompt_token_is_accounted_for_once(details, known, wanted) -> None:
    turn = Turn(prompt=100)
    account(turn, details, known)
    assert (turn.device, turn.restored, turn.recomputed, turn.new) == wanted
    assert sum(wanted) == turn.prompt


def test_prefixes_and_speed() -> None:
    assert shared_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert shared_prefix([], [1]) == 0
    assert Turn(10, ttft=0.5, recompute_ttft=2.0).speedup == 4
    assert Turn(10, ttft=0.5).speedup is None


def test_a_turns_trace_is_the_one_that_restored_as_much() -> None:
    traces = [{"tokens": 7, "n": 0}, {"tokens": 50, "n": 1}, {"tokens": 50, "n": 2}]
    assert trace_of(Turn(60, restored=50), traces)["n"] == 1
    assert trace_of(Turn(60, restored=9), traces) is None
    assert trace_of(Turn(60), [{"tokens": 0}]) is None


# ---- what the server says ----------------------------------------------------------

Reply = Callable[[BaseHTTPRequestHandler], None]


@pytest.fixture
def answering() -> Iterator[Callable[[Reply], Client]]:
    """``answering(reply)``: a client of a server that does so to every request."""
    servers: list[ThreadingHTTPServer] = []

    def start(reply: Reply) -> Client:
        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                reply(self)

            do_GET = do_POST = answer

            def log_message(self, *_: object) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return Client(f"http://127.0.0.1:{servers[-1].server_port}")

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def with_status(status: int, body: object) -> Reply:
    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.end_headers()
        handler.wfile.write(body.encode() if isinstance(body, str) else json.dumps(body).encode())

    return reply


def streamed(*chunks: object) -> Reply:
    return with_status(200, "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks))


def chunk(text: str, ids: list[int], **meta: object) -> dict:
    return {"text": text, "output_ids": ids, "meta_info": {"prompt_tokens": 3, **meta}}


@pytest.mark.parametrize(
    ("reply", "error", "said"),
    [
        (with_status(503, {"error": {"message": "The queue is full"}}), ServerBusyError, "full."),
        (with_status(400, {"error": {"message": "too long\nmore"}}), RefusedError, "too long."),
        (with_status(401, "{}"), RefusedError, "--api-key"),
        (with_status(500, "<html>"), RefusedError, "status 500"),
        (with_status(200, "<html>"), RefusedError, "not as SGLang"),
    ],
)
def test_failures_have_names_and_one_sentence(answering, reply, error, said) -> None:
    client = answering(reply)
    for call in (client.facts, lambda: client.text_ids("x")):
        with pytest.raises(error, match=re.escape(said)):
            call()


def test_a_server_without_krul_is_told_from_one_that_is_down(answering) -> None:
    with pytest.raises(RefusedError, match="--enable-krul"):
        answering(with_status(404, {"detail": "Not Found"})).conversations()
    with pytest.raises(ServerDownError, match="cannot be reached"):
        Client("http://127.0.0.1:9").facts()


def test_an_answer_is_streamed_with_its_sources(answering) -> None:
    details = {"device": 0, "host": 2, "lossy": 2}
    client = answering(
        streamed(
            chunk("a", [5], cached_tokens_details=details),
            chunk("ab", [5, 6], finish_reason={"type": "length"}),
        )
    )
    texts = [
        (answer.text, list(answer.output_ids)) for answer in client.generate([1, 2, 3], "s", 2)
    ]
    assert texts == [("a", [5]), ("ab", [5, 6])]
    answer = client.first_token([1, 2, 3], "s")
    assert isinstance(answer, Answer)
    assert (answer.details, answer.finish) == (details, "length")
    assert answer.ttft > 0


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (streamed({"error": {"message": "out of memory"}}), RefusedError),
        (
            streamed(
                chunk("", [], finish_reason={"type": "abort", "message": "x", "status_code": 503})
            ),
            ServerBusyError,
        ),
        (with_status(200, ""), ServerDownError),
    ],
)
def test_a_turn_that_fails_is_taken_back_and_says_why(answering, reply, error) -> None:
    answered = []

    def both(handler: BaseHTTPRequestHandler) -> None:
        tokenize = handler.path == "/v1/tokenize"
        answered.append(handler.path)
        (with_status(200, {"tokens": [1, 2, 3]}) if tokenize else reply)(handler)

    client = answering(both)
    one = Session().current
    list(converse(client, one, "Why?", 4, 100, True))
    assert answered == ["/v1/tokenize", "/generate"]
    assert one.notice.endswith(".")
    assert (len(one.messages), one.turns, one.running) == (1, [], False)
    with pytest.raises(error):
        client.first_token([1], "s")


def test_an_abandoned_turn_leaves_the_conversation_usable(answering) -> None:
    one = Session().current
    turn = converse(answering(with_status(200, {"tokens": [1]})), one, "?", 4, 99, True)
    next(turn)
    assert one.running
    turn.close()
    assert not one.running


# ---- sessions ----------------------------------------------------------------------


def line(one, **changes) -> dict:
    return {
        "id": "1f97",
        "namespace": one.namespace,
        "tokens": 100,
        "device_tokens": 0,
        "stored_tokens": 0,
        "waiting_tokens": 0,
        "stored_bytes": 0,
        "raw_bytes": 0,
        "ratio": None,
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"device_tokens": 100}, "device"),
        ({"device_tokens": 100, "stored_tokens": 90}, "device"),
        ({"device_tokens": 40, "stored_tokens": 60}, "partly"),
        ({"device_tokens": 2, "stored_tokens": 98}, "stored"),
        ({"device_tokens": 0, "stored_tokens": 0}, "gone"),
    ],
)
def test_where_a_conversation_is(changes, state) -> None:
    one, other = list(Session().conversations.values())[:2]
    lines = [line(other, device_tokens=100), line(one, **changes), line(one, tokens=20)]
    assert standing(one, lines).state == state
    assert standing(one, lines).tokens == 100
    assert standing(one, []).state == "new"
    one.computed = [1, 2]
    assert standing(one, []).state == "gone"


def test_the_document_goes_into_the_first_message_and_is_not_shown() -> None:
    one = Session().current
    one.ask("What happened?")
    one.messages.append({"role": "assistant", "content": "A storm."})
    one.ask("And then?")
    assert one.messages[1]["content"].startswith(one.document)
    assert [message["content"] for message in one.shown()] == [
        "What happened?", "A storm.", "And then?",
    ]  # fmt: skip
    one.ask(one.questions[0])
    assert one.questions[0] not in one.suggestions()


def test_what_visitors_type_is_text() -> None:
    session = Session()
    held = {key: standing(one, []) for key, one in session.conversations.items()}
    session.current.title = "<b onload=x>"
    assert "<b onload" not in list_panel(session, held)


def test_visitors_stories_begin_differently_and_are_the_same_every_time() -> None:
    stories = [story(number, 20) for number in range(12)]
    assert len({text[:12] for text in stories}) == 12
    assert stories == [story(number, 20) for number in range(12)]


def test_pressure_ends_when_it_has_done_its_work_or_cannot(answering) -> None:
    def reply(handler: BaseHTTPRequestHandler) -> None:
        body = with_status(200, {"tokens": list(range(500))})
        if handler.path == "/generate":
            body = streamed(chunk("a", [5], prompt_tokens=100))
        body(handler)

    client = answering(reply)
    asked = []
    pressure = Pressure(client)
    for progress in pressure.run(1000, lambda: len(asked) > 3):
        asked.append(progress)
        assert pressure.busy is not progress.done
    assert [one.tokens for one in asked] == [0, 100, 200, 300, 400]
    assert asked[-1].done
    assert not pressure.busy
    with pytest.raises(RefusedError, match="is it in use"):
        list(pressure.run(1000, lambda: False))
    assert not pressure.busy


def test_a_comparison_asks_what_the_conversation_did_and_then_its_next_questions() -> None:
    one = Session().current
    script = script_of(one, 1, 96)
    assert script.turns == [opening(one.document, one.questions[0]), one.questions[1]]
    assert script.returns == [one.questions[2]]
    one.ask("Mine?")
    script = script_of(one, 3, 16)
    assert script.turns[0] == opening(one.document, "Mine?")
    assert len(script.returns) == 3
    assert script.answer_tokens == 16
    bare = Session().open()
    assert script_of(bare, 1, 96).turns[0].startswith("From the log")
