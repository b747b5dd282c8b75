"""The same conversation under each policy, one server after the other."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from krul_sglang.live_server import LiveServer, ServerFailedError
from web.client import Answer, Client, ServerError
from web.pressure import Pressure
from web.turns import shared_prefix

POLICIES = ("recompute", "lossless", "fixed", "paper", "predictive")
"""``recompute`` is plain SGLang; the others are Krul's. The first one gives the answers that
others are compared with, so it always runs."""
NEEDED = 4 * 10**9
"""Bytes of memory that another server may take."""
OVERFILL = 1.2
"""Times the pool's size that other visitors ask for between two turns."""
SEAL_SECONDS = 60.0


@dataclass(frozen=True)
class Script:
    """What every policy goes through: ``turns`` are asked one after the other; then, each time
    evicted and back, each of ``returns`` on top of the same history."""

    messages: Sequence[dict[str, str]]
    turns: Sequence[str]
    returns: Sequence[str]
    answer_tokens: int


@dataclass
class Outcome:
    """One policy so far. seconds: to the first token, of each return. Tokens of the last return,
    bytes of the conversation, same: share of answer tokens before the first difference."""

    policy: str
    state: str = "waiting"
    seconds: list[float] = field(default_factory=list)
    restored: int = 0
    computed: int = 0
    stored_bytes: int = 0
    raw_bytes: int = 0
    answers: list[list[int]] = field(default_factory=list)
    same: float | None = None
    error: str = ""

    @property
    def ttft(self) -> float | None:
        """Median over the returns."""
        return statistics.median(self.seconds) if self.seconds else None


class StoppedError(RuntimeError):
    """The visitor asked to stop."""


class Comparison:
    """Runs in a thread of its own; ``outcomes`` can be read at any time. One for all visitors."""

    def __init__(self, model: Path | None, flags: Callable[[str], list[str]]) -> None:
        """flags: the server's command-line flags for a policy."""
        self.model, self._flags = model, flags
        self.outcomes: list[Outcome] = []
        self.problem = ""
        self.finished = threading.Event()
        self.finished.set()
        self._stop = threading.Event()
        self._start = threading.Lock()

    @property
    def running(self) -> bool:
        """Whether one is under way."""
        return not self.finished.is_set()

    def start(self, policies: Sequence[str], script: Script) -> str:
        """Begin; returns why it cannot, or nothing."""
        import psutil

        with self._start:
            if self.running:
                return "Another comparison is under way; its results show here."
            if self.model is None or not (self.model / "config.json").is_file():
                return "Comparing starts servers of its own; give the demo --model for that."
            free = psutil.virtual_memory().available
            if free < NEEDED:
                return (
                    f"Another server needs about {NEEDED / 1e9:.0f} GB of memory and "
                    f"{free / 1e9:.1f} GB are free."
                )
            wanted = [name for name in POLICIES if name in {POLICIES[0], *policies}]
            self.outcomes = [Outcome(name) for name in wanted]
            self.problem = ""
            self._stop.clear()
            self.finished.clear()
        threading.Thread(target=self._run, args=(script,), daemon=True).start()
        return ""

    def stop(self, patience: float = 30.0) -> None:
        """Ask it to end, and wait until its server has."""
        self._stop.set()
        self.finished.wait(patience)

    def _run(self, script: Script) -> None:
        try:
            for outcome in self.outcomes:
                try:
                    self._play(outcome, script)
                    outcome.state = "done"
                except (ServerError, ServerFailedError) as error:
                    outcome.state, outcome.error = "failed", str(error).splitlines()[0]
                    if outcome.policy == POLICIES[0]:
                        break
        except StoppedError:
            self.problem = "Stopped."
            for outcome in self.outcomes:
                outcome.state = outcome.state if outcome.state == "done" else "stopped"
        finally:
            for outcome in self.outcomes:
                outcome.state = "not run" if outcome.state == "waiting" else outcome.state
            self.finished.set()

    def _say(self, outcome: Outcome, state: str) -> None:
        if self._stop.is_set():
            raise StoppedError
        outcome.state = state

    def _play(self, outcome: Outcome, script: Script) -> None:
        """Start the policy's server, run the script there, and stop it."""
        self._say(outcome, "starting its server")
        assert self.model is not None
        server = LiveServer(self.model, self._flags(outcome.policy))
        try:
            server.start(lambda s: self._say(outcome, f"starting its server, {s:.0f} s"))
            _Run(self, outcome, script, Client(server.url)).play()
            self._say(outcome, "stopping its server")
        finally:
            server.stop()
            server.discard_log()


class _Run:
    """The script on one server."""

    def __init__(self, owner: Comparison, outcome: Outcome, script: Script, client: Client) -> None:
        self.owner, self.outcome, self.script, self.client = owner, outcome, script, client
        self.salt = "compared"
        self.pool = client.facts().pool
        self.pressure = Pressure(client)

    def say(self, text: str) -> None:
        self.owner._say(self.outcome, text)

    def play(self) -> None:
        messages = [*self.script.messages]
        for number, question in enumerate(self.script.turns, 1):
            self.say(f"turn {number} of {len(self.script.turns)}")
            messages.append({"role": "user", "content": question})
            ids = self.client.chat_ids(messages)
            answer = self._answer(ids)
            messages.append({"role": "assistant", "content": answer.text})
        reference = self.owner.outcomes[0]
        shares = []
        for number, question in enumerate(self.script.returns):
            self._evict(f"return {number + 1} of {len(self.script.returns)}")
            self.say(f"return {number + 1} of {len(self.script.returns)}")
            ids = self.client.chat_ids([*messages, {"role": "user", "content": question}])
            answer = self._answer(ids)
            assert answer.ttft is not None
            self.outcome.seconds.append(answer.ttft)
            self.outcome.restored = answer.details.get("host", 0)
            found = self.outcome.restored + answer.details.get("device", 0)
            self.outcome.computed = answer.prompt_tokens - found
            self.outcome.answers.append(answer.output_ids)
            expected = reference.answers[number]
            shares.append(shared_prefix(answer.output_ids, expected) / max(1, len(expected)))
            self.outcome.same = statistics.mean(shares)

    def _answer(self, ids: Sequence[int]) -> Answer:
        answers = self.client.generate(ids, self.salt, self.script.answer_tokens)
        answer = next(answers)
        while not self.owner._stop.is_set():
            try:
                answer = next(answers)
            except StopIteration:
                return answer
        raise StoppedError

    def _evict(self, when: str) -> None:
        """The same visitors for every policy, so that all are evicted alike."""
        wanted = OVERFILL * self.pool
        asked = [0]
        for progress in self.pressure.run(self.pool, lambda: asked[-1] >= wanted):
            asked.append(progress.tokens)
            self.say(f"{when}: evicting it, {100 * min(1, asked[-1] / wanted):.0f} %")
        if self.outcome.policy != POLICIES[0]:
            self._settle(when)

    def _settle(self, when: str) -> None:
        """Wait until everything is encoded, so that a return pays for decoding; then what the
        conversation takes."""
        from krul_sglang.inspection.identity import namespace_hash

        self.say(f"{when}: encoding")
        until = time.monotonic() + SEAL_SECONDS
        while (krul := self.client.krul())["sealed_segments"] < krul["segments"]:
            if time.monotonic() > until:
                raise ServerError("It was not encoded within a minute.")
            self.say(f"{when}: encoding")
            time.sleep(0.2)
        name = namespace_hash(None, self.salt).hexdigest()
        own = [line for line in self.client.conversations() if line["namespace"] == name]
        if own and not self.outcome.stored_bytes:
            longest = max(own, key=lambda line: line["stored_tokens"])
            self.outcome.stored_bytes = longest["stored_bytes"]
            self.outcome.raw_bytes = longest["raw_bytes"]
