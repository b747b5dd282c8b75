"""Behind the page: sessions, what the server was seen to hold, and what is drawn of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from web.client import Client, ServerError
from web.converse import converse
from web.lanes_panel import lanes_panel
from web.list_panel import document_note, list_panel, pool_panel, suggestions
from web.marks import escape
from web.observer import Observer
from web.pressure import Pressure
from web.sessions import Conversation, Session, Standing, standing
from web.similarity_panel import similarity_panel
from web.storage_panel import storage_panel
from web.strategy_panel import strategy_panel
from web.turn_panel import turn_panel

PARTS = (
    *("status", "note", "pool", "cards", "chat", "document", "suggest"),
    *("turn", "strategy", "similarity", "lanes", "storage"),
)
"""What the page consists of, in the order that :meth:`Page.changes` returns it."""
IDLE = 10.0
"""Seconds after which the automatic mode lets a conversation be evicted."""
AGAIN = 5
"""Ticks after which all parts are sent once more: answers may overtake each other on the way."""
SLOW = 6.0
"""Seconds without a first token after which the page says that it still waits."""
REDRAW = 0.2
"""Seconds between two pictures of answers that are coming in, of all visitors together."""


@dataclass
class Activity:
    """What is under way for everybody: pressure on the pool. share: 0 to 1."""

    text: str = ""
    share: float = 0.0


class Page:
    """Thread-safe; one for all visitors. Drawing asks the server at most for one conversation."""

    def __init__(self, client: Client, observer: Observer, answer_tokens: int) -> None:
        self.client, self.observer, self.answer_tokens = client, observer, answer_tokens
        self.pressure = Pressure(client)
        self.activity = Activity()
        self._sessions: dict[str, Session] = {}
        self._details: dict[str, tuple[tuple, dict[str, Any]]] = {}

    # ---- sessions --------------------------------------------------------------

    def session(self, name: str) -> Session:
        """The visitor's, made when it is first asked for."""
        return self._sessions.setdefault(name, Session())

    def close(self, name: str) -> None:
        """The tab was closed."""
        session = self._sessions.pop(name, None)
        for one in session.conversations.values() if session else ():
            self._details.pop(one.salt, None)

    # ---- what visitors do ------------------------------------------------------

    def ask(self, session: Session, question: str, measure: bool) -> Iterator[None]:
        """A turn of the active conversation; yields when there is something new to draw."""
        one = session.current
        if not question.strip() or one.running:
            return
        facts = self.observer.sight.facts
        drawn = 0.0
        turn = converse(
            self.client, one, question.strip(), self.answer_tokens, facts.pool if facts else 0,
            measure,
        )  # fmt: skip
        for _ in turn:
            pause = REDRAW * max(1, len(self._answering()))
            if time.monotonic() - drawn > pause or not one.running:
                drawn = time.monotonic()
                yield
        self.observer.look()
        yield

    def _answering(self) -> list[Conversation]:
        """Everybody's conversations in which a turn runs."""
        sessions = list(self._sessions.values())
        return [one for s in sessions for one in list(s.conversations.values()) if one.running]

    def start_pressure(self, session: Session) -> threading.Thread | None:
        """Let other visitors take the pool from this session's idle conversations, in the
        background; None where there is nothing to evict or it is under way already."""
        idle = self._resident(session)
        facts = self.observer.sight.facts
        if not idle or facts is None or self.pressure.busy:
            return None
        thread = threading.Thread(target=self._press, args=(idle, facts.pool), daemon=True)
        thread.start()
        return thread

    def _resident(self, session: Session, idle: float = 0.0) -> list[Conversation]:
        """Conversations with tokens on the device that have been idle for so many seconds."""
        held, now = self.standings(session), time.monotonic()
        return [
            one
            for key, one in session.conversations.items()
            if held[key].state in ("device", "partly")
            and not one.running
            and now - one.used >= idle
        ]

    def _press(self, idle: list[Conversation], pool: int) -> None:
        names = ", ".join(one.title for one in idle)

        def evicted() -> bool:
            lines = self.observer.look().lines
            return all(
                one.running or standing(one, lines).state not in ("device", "partly")
                for one in idle
            )

        try:
            for progress in self.pressure.run(pool, evicted):
                self.activity = Activity(
                    f"Other visitors take the pool from {names}: {progress.tokens:,} tokens so far",
                    progress.share,
                )
        except ServerError as error:
            for one in idle:
                one.notice = str(error)
        finally:
            self.activity = Activity()

    def tick(self, session: Session, automatic: bool) -> None:
        """A second has passed in front of a visitor."""
        self.observer.touch()
        session.ticks += 1
        if session.ticks % AGAIN == 0:
            session.seen.clear()
        if automatic and self._resident(session, IDLE):
            self.start_pressure(session)

    # ---- what they see ---------------------------------------------------------

    def standings(self, session: Session) -> dict[str, Standing]:
        """Where each of its conversations is."""
        lines = self.observer.sight.lines
        return {key: standing(one, lines) for key, one in session.conversations.items()}

    def detail(self, one: Conversation, held: Standing) -> Mapping[str, Any]:
        """What is stored of a conversation, layer by layer; asked anew only when it changed."""
        if not held.stored:
            return {}
        signature = (held.name, held.stored, held.stored_bytes, held.waiting)
        known = self._details.get(one.salt)
        if known is None or known[0] != signature:
            try:
                known = signature, self.client.conversation(held.name)
            except ServerError:  # it has changed or gone since it was listed
                return known[1] if known else {}
            self._details[one.salt] = known
        return known[1]

    def draw(self, session: Session) -> dict[str, Any]:
        """Every part of the page as it should be now."""
        sight, one = self.observer.sight, session.current
        held = self.standings(session)
        mine = held[session.active]
        detail = self.detail(one, mine)
        trace = next((turn.trace for turn in reversed(one.turns) if turn.trace), None)
        return {
            "status": self._status(),
            "note": self._note(session),
            "pool": pool_panel(session, held, sight),
            "cards": list_panel(session, held),
            "chat": one.shown(),
            "document": document_note(one),
            "suggest": suggestions([] if one.running else one.suggestions()),
            "turn": turn_panel(one, mine, sight.krul, detail),
            "strategy": strategy_panel(detail),
            "similarity": similarity_panel(detail),
            "lanes": lanes_panel(trace),
            "storage": storage_panel(list(self.observer.history)),
        }

    def changes(self, session: Session) -> dict[str, Any]:
        """The parts that this visitor does not see yet, as they should be."""
        one = session.current
        self.detail(one, self.standings(session)[session.active])  # asks; what follows does not
        with session.lock:  # or an older picture could follow a newer one
            drawn = self.draw(session)
            new = {name: part for name, part in drawn.items() if session.seen.get(name) != part}
            session.seen.update(new)
        return new

    def _status(self) -> str:
        sight = self.observer.sight
        if sight.down or sight.facts is None:
            return '<p class="k-status k-down" role="status"><i></i>server is down</p>'
        facts, policy = sight.facts, sight.krul.get("policy", "without Krul")
        return (
            f'<p class="k-status" role="status"><i></i><b>{escape(facts.model)}</b>'
            f"<span>{escape(policy)}, pool of {facts.pool:,} tokens</span></p>"
        )

    def _note(self, session: Session) -> str:
        """One line, always there: trouble first, then what is under way."""
        sight, one = self.observer.sight, session.current
        memory = (sight.krul.get("tiers") or {}).get("memory") or {}
        if sight.problem:
            again = " The page goes on by itself when it is back." if sight.down else ""
            return _line("bad", sight.problem + again)
        if one.notice:
            return _line("bad", one.notice)
        if self.activity.text:
            return _line("busy", self.activity.text, self.activity.share)
        if one.running:
            turn = one.turns[-1] if one.turns else None
            if turn is not None and turn.measuring:
                return _line("busy", "Measuring what a recompute of the same prompt takes")
            since = time.monotonic() - one.used
            if (turn is None or turn.ttft is None) and since > SLOW:
                return _line("busy", f"Waiting for the first token for {since:.0f} s")
            return _line("busy", "Answering")
        if memory and memory["bytes"] > 0.95 * memory["limit"]:
            return _line("bad", "Krul's host memory is full: the oldest conversations go.")
        return _line("", "Talk to two conversations, create memory pressure, and come back to one.")


def _line(kind: str, text: str, share: float | None = None) -> str:
    drawn = "" if share is None else f'<i style="width:{100 * share:.0f}%"></i>'
    role = "alert" if kind == "bad" else "status"
    said = f"{drawn}<span>{escape(text)}</span>"
    return f'<p class="k-notice k-{kind or "calm"}" role="{role}">{said}</p>'
