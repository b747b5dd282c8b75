"""What a program's requests cost: the frontend language's backend, with a stopwatch."""

from __future__ import annotations

import json
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import requests
import sglang as sgl
from sglang.lang.chat_template import ChatTemplate


class ProgramError(RuntimeError):
    """The program cannot go on; the message is one line for whoever runs it."""


@dataclass
class Turn:
    """One request of a program (times in seconds, the rest in prompt tokens).

    without: time to first token with the whole prompt computed; None where the turn did not
    return or nobody asked.
    """

    conversation: str
    number: int
    prompt: int
    device: int
    restored: int
    lossy: int
    computed: int
    ttft: float
    without: float | None = None
    text: str = field(default="", repr=False)
    sampling: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def returns(self) -> bool:
        """Whether most of what the device lacked was restored: more than a system prompt."""
        return self.restored > self.computed


class Endpoint(sgl.RuntimeEndpoint):
    """The frontend language's backend, noting what every generation cost. Thread-safe."""

    def __init__(self, url: str, template: ChatTemplate) -> None:
        super().__init__(url)
        self.chat_template = template
        self.turns: list[Turn] = []
        self.fresh = False
        """Whether nothing of earlier turns is to be found: each has a salt of its own."""
        self.error: Exception | None = None
        self._names: dict[str, str] = {}
        self._asked: Counter[str] = Counter()

    def name(self, state: Any, name: str) -> None:
        """How a program's (or a branch's) turns are called; its argument `name` by default."""
        self._names[state.stream_executor.sid] = name

    def generate(self, s: Any, sampling_params: Any) -> tuple[str, dict]:
        """As its base, streaming underneath."""
        return self._take(s, sampling_params.to_srt_kwargs())

    def commit_lazy_operations(self, s: Any) -> None:
        """As its base: what leads to a fork is computed (or restored) before it."""
        self._take(s, {"max_new_tokens": 0})

    def _take(self, s: Any, sampling: dict[str, Any]) -> tuple[str, dict]:
        if self.error is not None:
            raise self.error
        name = self._names.get(s.sid) or str(s.arguments.get("name", "conversation"))
        self._asked[name] += 1
        number = self._asked[name]
        try:
            ttft, text, meta = self.ask(s.text_, sampling, fresh=self.fresh)
        except (requests.RequestException, ProgramError) as error:
            self.error = self.error or error
            raise
        found = meta.get("cached_tokens_details") or {}
        device, restored = found.get("device", 0), found.get("host", 0)
        prompt, lossy = meta["prompt_tokens"], found.get("lossy", 0)
        computed = prompt - device - restored
        self.turns.append(
            Turn(
                name,
                number,
                prompt,
                device,
                restored,
                lossy,
                computed,
                ttft,
                text=s.text_,
                sampling=sampling,
            )
        )
        return text, meta

    def ask(self, text: str, sampling: dict[str, Any], *, fresh: bool) -> tuple[float, str, dict]:
        """One streaming request: seconds to the first token, the answer and its `meta_info`."""
        body = {"text": text, "sampling_params": sampling, "stream": True}
        if fresh:
            body["cache_salt"] = uuid.uuid4().hex
        began, ttft, last = time.perf_counter(), None, None
        url = f"{self.base_url}/generate"
        with requests.post(url, json=body, stream=True, timeout=1200) as answer:
            if answer.status_code != 200:
                raise ProgramError(f"{url} answers {answer.status_code}: {answer.text[:200]}")
            for line in answer.iter_lines():
                if line.startswith(b"data: {"):
                    ttft = time.perf_counter() - began if ttft is None else ttft
                    last = json.loads(line.removeprefix(b"data: "))
        if last is None or ttft is None or "error" in last:
            said = (last or {}).get("error", {}).get("message", "nothing")
            raise ProgramError(f"{url} answers: {said}")
        return ttft, last["text"], last["meta_info"]
