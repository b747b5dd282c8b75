"""Questions to a running server: an HTTP route on one side, the scheduler's cache on the other.

A question travels in the request id of SGLang's own request for a scheduler's internal state,
and its answer comes back in that reply, from every data-parallel rank. A new question is one
line in :data:`QUESTIONS`.

Answers tell how conversations are stored, never what they say. They are an operator's, as
SGLang's cache endpoints are: where the server has an admin key, that key is needed.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from krul_sglang.runtime import BACKEND, conversations
from krul_sglang.runtime.restoring import TRACES

logger = logging.getLogger(__name__)

ANSWER = "krul_answer"
HTTP_SERVER = "sglang.srt.entrypoints.http_server"
_MARK = "krul:"


class UnknownError(LookupError):
    """What was asked about does not exist. The message is one line for whoever asked."""


@dataclass(frozen=True)
class Question:
    """``answer(cache, argument)`` runs in each scheduler, with the route's parameters; it must be
    quick, and ValueError is the asker's mistake. ``merge`` makes one body of all ranks' answers,
    and raises :class:`UnknownError` where no rank knows. Both return what JSON can hold.
    """

    path: str
    answer: Callable[[Any, Mapping[str, str]], Any]
    merge: Callable[[Sequence[Any]], Any]


def _newest_of_all(answers: Sequence[Any]) -> dict[str, Any]:
    listed = [
        {**line, "dp_rank": rank}
        for rank, answer in enumerate(answers)
        for line in answer["conversations"]
    ]
    listed.sort(key=lambda line: line["age_seconds"])
    # Every rank was asked for as many as are wanted.
    most = max(len(answer["conversations"]) for answer in answers)
    return {"total": sum(answer["total"] for answer in answers), "conversations": listed[:most]}


def _the_one(answers: Sequence[Any]) -> dict[str, Any]:
    ids = sorted({name for answer in answers for name in answer["ids"]})
    if not ids:
        raise UnknownError("no conversation has this id; an id changes with every turn")
    if len(ids) > 1:
        raise UnknownError(f"{len(ids)} conversations begin so: {', '.join(ids[:5])}")
    found = ((rank, one["detail"]) for rank, one in enumerate(answers) if one["ids"])
    # Two ranks may know one prompt; the one that used it last tells.
    rank, body = min(found, key=lambda pair: pair[1]["age_seconds"])
    return {**body, "dp_rank": rank}


def _newest_restores(cache: Any, argument: Mapping[str, str]) -> list[dict[str, Any]]:
    """Traces of the last restores, the newest first, with their age in seconds."""
    limit = int(argument.get("limit", "1"))
    if not 1 <= limit <= TRACES:
        raise ValueError(f"limit={limit}: from 1 to {TRACES}")
    now = time.perf_counter()
    newest = list(cache.restores.traces)[: -limit - 1 : -1]
    return [{"age_seconds": now - one.forward[1], **one.to_json()} for one in newest]


def _restores_of_all(answers: Sequence[Any]) -> dict[str, Any]:
    found = [{**one, "dp_rank": rank} for rank, answer in enumerate(answers) for one in answer]
    found.sort(key=lambda one: one["age_seconds"])
    return {"restores": found[: max(map(len, answers))]}


QUESTIONS = {
    "restores": Question("/krul/restores", _newest_restores, _restores_of_all),
    "conversations": Question("/krul/conversations", conversations.list_newest, _newest_of_all),
    "conversation": Question("/krul/conversations/{id}", conversations.find, _the_one),
}


# ---- in the scheduler --------------------------------------------------------------


def answer(cache: Any, recv_req: Any) -> dict[str, Any] | None:
    """The internal state to reply with where a request's id is a question; None where it is none.

    Never raises: this is the scheduler's own loop.
    """
    rid = recv_req.rid or ""
    if not rid.startswith(_MARK):
        return None
    try:
        name, argument = json.loads(rid.removeprefix(_MARK))
        return {ANSWER: {"body": QUESTIONS[name].answer(cache, argument)}}
    except ValueError as error:
        return {ANSWER: {"status": 400, "error": str(error)}}
    except Exception as error:
        logger.exception("krul: %s could not be answered", rid)
        return {ANSWER: {"status": 500, "error": f"{type(error).__name__}; see the server's log"}}


# ---- in the HTTP server ------------------------------------------------------------


def add_routes(result: None, manager: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``TokenizerManager.__init__``: serve :data:`QUESTIONS` where there is an HTTP server.

    That module is never imported for this: ``sglang.Engine`` works without it.
    """
    server = sys.modules.get(HTTP_SERVER)
    if server is None or manager.server_args.radix_cache_backend != BACKEND:
        return
    known = {getattr(route, "path", None) for route in server.app.routes}
    server.app.state.krul_manager = manager
    for name, question in QUESTIONS.items():
        if question.path not in known:
            server.app.add_api_route(question.path, _endpoint(name, question), methods=["GET"])


def reach_workers(result: None, record: Any) -> None:
    """AFTER ``ServerArgs.check_server_args``, which only launchers call: have the HTTP workers of
    ``--tokenizer-worker-num`` load plugins, which SGLang has them do not."""
    if record.radix_cache_backend == BACKEND and record.tokenizer_worker_num > 1:
        os.environ.setdefault("SGLANG_HTTP_SERVER_APP_PATH", "krul_sglang.runtime.worker_app:app")


def _endpoint(name: str, question: Question) -> Callable:
    from fastapi import Request
    from fastapi.responses import JSONResponse
    from sglang.srt.utils.auth import AuthLevel, auth_level

    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def endpoint(request: Request) -> JSONResponse:
        argument = {**request.query_params, **request.path_params}
        replies = await _ask(request.app.state.krul_manager, name, argument)
        for reply in replies:
            if "error" in reply:
                return JSONResponse({"error": reply["error"]}, reply["status"])
        try:
            return JSONResponse(question.merge([reply["body"] for reply in replies]))
        except UnknownError as error:
            return JSONResponse({"error": str(error)}, 404)

    # FastAPI reads types from the annotations, which are only names here; without the second one
    # /openapi.json and /docs of the whole server fail.
    endpoint.__annotations__.update({"request": Request, "return": JSONResponse})
    return endpoint


async def _ask(manager: Any, name: str, argument: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every data-parallel rank's reply: ``body``, or ``status`` and ``error``."""
    from sglang.srt.managers.io_struct import GetInternalStateReq

    manager.auto_create_handle_loop()
    question = GetInternalStateReq(rid=_MARK + json.dumps([name, argument]))
    replies = await manager.get_internal_state_communicator(question)
    # A reply to someone who is gone may come in its place.
    late = {"status": 503, "error": "the answer was mistaken for another's; ask again"}
    return [reply.internal_state.get(ANSWER, late) for reply in replies]
