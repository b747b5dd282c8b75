"""What the demo asks a server, and what its failures are called."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

REPETITION = 1.15
"""Penalty on tokens that were said: a small model that answers greedily goes round in circles."""
PATIENCE = 120.0
"""Seconds between two bytes of an answer; a request may wait as long for others."""


class ServerError(RuntimeError):
    """Something a visitor should read: one sentence."""


class ServerDownError(ServerError):
    """Nobody answers at the address, or the connection broke."""


class ServerBusyError(ServerError):
    """It answers, but takes no more."""


class RefusedError(ServerError):
    """It does not serve this request, and will not serve it later."""


@dataclass
class Answer:
    """One streamed answer so far. Mutated by :meth:`Client.generate` while it comes in.

    ttft: seconds from asking to the first token, measured here; None before it.
    details: cached prompt tokens by source, as ``meta_info.cached_tokens_details``.
    """

    prompt_tokens: int
    text: str = ""
    output_ids: list[int] = field(default_factory=list)
    ttft: float | None = None
    details: Mapping[str, int] = field(default_factory=dict)
    finish: str = ""


@dataclass(frozen=True)
class Facts:
    """What does not change while a server runs. pool: tokens its KV pool holds."""

    model: str
    pool: int
    context: int
    dtype: str


class Client:
    """A server's HTTP address. Thread-safe; every failure is a :class:`ServerError`."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(
            base_url=self.url, headers=headers, timeout=httpx.Timeout(PATIENCE, connect=3)
        )

    # ---- what the server says of itself ----------------------------------------

    def facts(self) -> Facts:
        """The model and the pool."""
        info, model = self._get("/server_info"), self._get("/model_info")
        name = str(model.get("served_model_name") or model.get("model_path") or "model")
        return Facts(
            model=name.rstrip("/").rsplit("/", 1)[-1],
            pool=int(info.get("max_total_num_tokens") or 0),
            context=int(info.get("context_length") or info.get("max_req_input_len") or 0),
            dtype=str(info.get("dtype") or ""),
        )

    def krul(self) -> dict[str, Any]:
        """The first rank's ``krul`` block, empty on a server without Krul."""
        return self._get("/server_info")["internal_states"][0].get("krul") or {}

    def conversations(self) -> list[dict[str, Any]]:
        """The conversations the server used last."""
        return self._get("/krul/conversations?limit=200")["conversations"]

    def conversation(self, name: str) -> dict[str, Any]:
        """One of them, layer by layer."""
        return self._get(f"/krul/conversations/{name}")

    def restores(self, limit: int = 8) -> list[dict[str, Any]]:
        """Traces of the last restores, newest first."""
        return self._get(f"/krul/restores?limit={limit}")["restores"]

    # ---- work ------------------------------------------------------------------

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a chat in the model's own template, ready for its answer."""
        body = {"messages": list(messages), "add_generation_prompt": True}
        return self._post("/v1/tokenize", body)["tokens"]

    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text."""
        return self._post("/v1/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]

    def generate(self, ids: Sequence[int], salt: str, max_new_tokens: int) -> Iterator[Answer]:
        """Greedy answer to a prompt, streamed: the same object, a little further each time.

        salt: only prompts of the same ``cache_salt`` find each other's KV.
        """
        body = {
            "input_ids": list(ids),
            "cache_salt": salt,
            "stream": True,
            "sampling_params": {
                "temperature": 0,
                "repetition_penalty": REPETITION,
                "max_new_tokens": max_new_tokens,
            },
        }
        answer = Answer(len(ids))
        began = time.perf_counter()
        try:
            with self._http.stream("POST", "/generate", json=body) as reply:
                if reply.status_code != 200:
                    reply.read()
                    raise _refusal(self.url, reply)
                for line in reply.iter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    if answer.ttft is None:
                        answer.ttft = time.perf_counter() - began
                    _take(answer, json.loads(line.removeprefix("data: ")))
                    yield answer
        except httpx.HTTPError as error:
            raise _broken(self.url, error) from None
        if answer.ttft is None:
            raise ServerDownError(f"{self.url} ended the answer before its first token.")

    def first_token(self, ids: Sequence[int], salt: str) -> Answer:
        """Ask for one token only, and wait for it."""
        *_, answer = self.generate(ids, salt, 1)
        return answer

    # ---- HTTP ------------------------------------------------------------------

    def _get(self, path: str) -> dict[str, Any]:
        return self._ask("GET", path, None)

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._ask("POST", path, body)

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        try:
            reply = self._http.request(method, path, json=body)
            if reply.status_code != 200:
                raise _refusal(self.url, reply)
            return reply.json()
        except httpx.HTTPError as error:
            raise _broken(self.url, error) from None
        except ValueError:
            raise RefusedError(f"{self.url} answers, but not as SGLang does.") from None


def _take(answer: Answer, chunk: Mapping[str, Any]) -> None:
    """One event of the stream: texts and ids are those of the whole answer so far."""
    if "error" in chunk:
        raise RefusedError(_sentence(str(chunk["error"].get("message", chunk["error"]))))
    meta = chunk["meta_info"]
    reason = meta.get("finish_reason") or {}
    if reason.get("type") == "abort":
        message = _sentence(str(reason.get("message") or "The server gave the request up."))
        raise (ServerBusyError if reason.get("status_code") == 503 else RefusedError)(message)
    answer.text = chunk["text"]
    answer.output_ids = list(chunk.get("output_ids") or answer.output_ids)
    answer.prompt_tokens = meta["prompt_tokens"]
    answer.details = meta.get("cached_tokens_details") or answer.details
    answer.finish = str(reason.get("type") or "")


def _refusal(url: str, reply: httpx.Response) -> ServerError:
    try:
        body = reply.json()
        said = body.get("error", body.get("message", ""))
        said = said.get("message", "") if isinstance(said, dict) else said
    except ValueError:
        said = ""
    if reply.status_code in (401, 403):
        return RefusedError(f"{url} wants a key: start the demo with --api-key.")
    if reply.status_code == 404 and "/krul/" in str(reply.url) and not said:
        return RefusedError(f"{url} runs without Krul; start it with --enable-krul.")
    if reply.status_code in (429, 503):
        return ServerBusyError(_sentence(str(said)) if said else "The server takes no more now.")
    return RefusedError(
        _sentence(str(said)) if said else f"{url} answers with status {reply.status_code}."
    )


def _broken(url: str, error: httpx.HTTPError) -> ServerError:
    if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
        return ServerBusyError(f"{url} has not answered for {PATIENCE:.0f} s.")
    return ServerDownError(f"{url} cannot be reached.")


def _sentence(text: str) -> str:
    """The first line, as a sentence of bounded length."""
    line = (text.strip().splitlines() or ["The server did not say why."])[0]
    line = line if len(line) <= 240 else line[:237] + "..."
    return line if line.endswith((".", "!", "?")) else line + "."
