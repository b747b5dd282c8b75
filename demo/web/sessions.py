"""A visitor's conversations, and what the server holds of each."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from krul_sglang.inspection.identity import namespace_hash
from web.starters import STARTERS, Starter
from web.turns import Turn

SYSTEM = "You are a helpful assistant. Answer in a few short sentences."
HUES = 6
"""Colours that tell conversations apart."""


def opening(document: str, question: str) -> str:
    """A first message; small models need to be told that it ends in a question."""
    return f"{document}\n\nQuestion: {question}\nAnswer briefly." if document else question


@dataclass
class Conversation:
    """One chat. Its ``cache_salt`` is its own, so nobody else's tokens count for it.

    messages: what goes into the chat template. computed: tokens whose KV the server has
    computed, all but the last token of the last answer. waiting: since when a turn runs.
    """

    key: str
    title: str
    hue: int
    document: str = ""
    questions: tuple[str, ...] = ()
    salt: str = field(default_factory=lambda: f"demo-{uuid.uuid4().hex}")
    messages: list[dict[str, str]] = field(
        default_factory=lambda: [{"role": "system", "content": SYSTEM}]
    )
    turns: list[Turn] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)
    notice: str = ""
    running: bool = False
    used: float = field(default_factory=time.monotonic)

    @property
    def namespace(self) -> str:
        """How /krul/conversations names whose conversation it is."""
        return namespace_hash(None, self.salt).hexdigest()

    def ask(self, question: str) -> None:
        """Add the visitor's message; the first one carries the document."""
        if len(self.messages) == 1:
            question = opening(self.document, question)
        self.messages.append({"role": "user", "content": question})

    def shown(self) -> list[dict[str, Any]]:
        """The chat as a visitor sees it: the document folded away."""
        out: list[dict[str, Any]] = []
        for number, message in enumerate(self.messages[1:]):
            text = message["content"]
            if number == 0 and self.document:
                before, after = opening(self.document, "\0").split("\0")
                text = text.removeprefix(before).removesuffix(after)
            out.append({"role": message["role"], "content": text})
        return out

    def suggestions(self) -> list[str]:
        """Questions of its starter that were not asked yet, the next ones first."""
        asked = {message["content"] for message in self.shown() if message["role"] == "user"}
        return [question for question in self.questions if question not in asked][:3]


@dataclass(frozen=True)
class Standing:
    """Where a conversation's KV is now. Tokens and bytes; state is one of :data:`STATES`."""

    state: str
    tokens: int = 0
    device: int = 0
    stored: int = 0
    waiting: int = 0
    stored_bytes: int = 0
    raw_bytes: int = 0
    ratio: float | None = None
    name: str = ""


STATES = {
    "new": "new",
    "device": "on device",
    "partly": "partly on device",
    "stored": "stored",
    "gone": "not kept",
}


def standing(conversation: Conversation, lines: Iterable[Mapping[str, Any]]) -> Standing:
    """From what the server lists: its longest path in the conversation's namespace."""
    own = [line for line in lines if line.get("namespace") == conversation.namespace]
    if not own:
        return Standing("gone" if conversation.computed else "new")
    line = max(own, key=lambda one: one["tokens"])
    device, tokens = line["device_tokens"], line["tokens"]
    # A shared opening of a few tokens may stay behind on the device.
    kept = "stored" if line["stored_tokens"] else "gone"
    state = "device" if device >= tokens else kept if device < tokens / 20 else "partly"
    return Standing(
        state=state,
        tokens=tokens,
        device=device,
        stored=line["stored_tokens"],
        waiting=line["waiting_tokens"],
        stored_bytes=line["stored_bytes"],
        raw_bytes=line["raw_bytes"],
        ratio=line["ratio"],
        name=line["id"],
    )


class Session:
    """One browser tab. Handlers of the same tab may run side by side, hence the lock."""

    def __init__(self, starters: Iterable[Starter] = STARTERS) -> None:
        self.lock = threading.RLock()
        self.conversations: dict[str, Conversation] = {}
        self.seen: dict[str, Any] = {}
        """What each part of the page shows, so that only changes are sent."""
        self.ticks = 0
        for starter in starters:
            self.open(starter.title, starter.document, starter.questions)
        self.active = next(iter(self.conversations))

    def open(
        self, title: str = "", document: str = "", questions: tuple[str, ...] = ()
    ) -> Conversation:
        """Begin a conversation; it is not the active one yet."""
        with self.lock:
            number = len(self.conversations)
            made = Conversation(
                key=f"c{number}",
                title=title or f"Conversation {number + 1}",
                hue=number % HUES,
                document=document,
                questions=questions,
            )
            self.conversations[made.key] = made
            return made

    @property
    def current(self) -> Conversation:
        """The conversation on the screen."""
        return self.conversations[self.active]
