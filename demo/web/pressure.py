"""Memory pressure: other visitors, whose prompts take the pool from whoever is idle."""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from web.client import Client, RefusedError

VISITORS = 12
SHARE = 4
"""A visitor's prompt takes this part of the pool, within LEAST and MOST tokens."""
LEAST, MOST = 64, 2048
GIVE_UP = 3.0
"""Times the pool's size that is asked for before it is given up."""

_PEOPLE = ("the gardener", "a nurse", "our neighbour", "the clerk", "Tomas", "Ada", "the pilot")
_DEEDS = ("found", "repaired", "painted", "sold", "described", "forgot", "borrowed", "measured")
_THINGS = ("a green door", "the old map", "two lamps", "a river boat", "the kitchen clock")
_TIMES = ("before noon", "on Sunday", "in the rain", "last winter", "without a word", "at once")


@dataclass(frozen=True)
class Progress:
    """tokens: of visitors so far. share: how far the pool has been asked for, 0 to 1.
    done: whether what was to leave the pool has left it."""

    tokens: int
    share: float
    done: bool


class Pressure:
    """Visitors return in turns, as people do: what Krul stored of them it restores, so pressure
    is quick from the second time on. One at a time for all sessions."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._salt = f"visitor-{uuid.uuid4().hex}"
        self._prompts: dict[tuple[int, int], list[int]] = {}
        self._next = 0

    @property
    def busy(self) -> bool:
        """Whether somebody's pressure is under way."""
        return self._lock.locked()

    def run(self, pool: int, evicted: Callable[[], bool]) -> Iterator[Progress]:
        """Ask until ``evicted()``; pool: tokens the server's pool holds.

        Raises :class:`~web.client.ServerError`; a :class:`~web.client.RefusedError` where the pool
        is asked for several times over in vain.
        """
        size = max(LEAST, min(MOST, pool // SHARE))
        with self._lock:
            asked = 0
            while not evicted():
                if asked > GIVE_UP * pool:
                    raise RefusedError(
                        f"{asked:,} tokens of other visitors did not evict it: is it in use?"
                    )
                yield Progress(asked, min(0.99, asked / pool), False)
                number = self._next % VISITORS
                self._next += 1
                answer = self._client.first_token(
                    self._prompt(number, size), f"{self._salt}-{number}"
                )
                asked += answer.prompt_tokens
        yield Progress(asked, 1.0, True)

    def _prompt(self, number: int, size: int) -> list[int]:
        """Token ids of a visitor's story, ``size`` of them, the same every time."""
        if (number, size) not in self._prompts:
            ids = self._client.text_ids(story(number, sentences=2 + size // 6))
            self._prompts[number, size] = ids[:size]
        return self._prompts[number, size]


def story(number: int, sentences: int) -> str:
    """Plain sentences that no other number begins alike."""
    rng = random.Random(number)
    told = (
        f"{rng.choice(_PEOPLE).capitalize()} {rng.choice(_DEEDS)} {rng.choice(_THINGS)} "
        f"{rng.choice(_TIMES)}."
        for _ in range(sentences)
    )
    return f"Visitor {number}. " + " ".join(told)
