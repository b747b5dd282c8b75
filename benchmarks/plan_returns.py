"""A server whose planner can be overruled, and stored conversations that return to it.

One return is one sample of benchmarks/plan_choice.py; :class:`Plan` says which are wanted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import plan_control
import requests
from plan_cells import NEAR, Sample, points
from plan_control import Order
from restore_cells import Bandwidth
from restore_peers import MEMORY, Peer, Shape
from restore_plan import Prompts
from server_plugin import as_plugin

ANSWER = 2
"""Tokens generated. Only the first is timed; what a finish costs comes after the last."""
REFERENCES = 3
"""Returns that load nothing, from which a history's balanced rate follows."""
PAGE = 1
"""Tokens a page of the server, SGLang's default: with larger ones p goes by those."""
SHORT = 2048
"""Tokens of a history below which a setting takes more rounds, for about the same time."""
MORE = 4
"""Times as many, at most."""
PHASES = {"before": 5, "cut": 6, "back": 6}
"""Restores at a link's rate, at the cut one, and at the first again."""


@dataclass(frozen=True)
class Plan:
    """What is asked for. policy: a name of restore_peers.KRUL. points: forced positions of a
    setting. teach: whether forced restores teach the cost model too. cut_history, cut_bandwidth:
    where the link is cut in mid-run, None for nowhere, and what it is cut from."""

    model: Path
    policy: str
    dtype: str
    profile: Path | None
    histories: Sequence[int]
    bandwidths: Sequence[Bandwidth]
    points: int
    repeats: int
    warm_up: int
    turn: int
    teach: bool
    cut_history: int | None
    cut_bandwidth: Bandwidth

    def settings(self) -> dict[str, Any]:
        """What all rows of a file have in common."""
        names = ("dtype", "points", "repeats", "warm_up", "turn", "teach")
        shared = {name: getattr(self, name) for name in names}
        return {"model": self.model.name, "page": PAGE, "beside": list(NEAR)} | shared

    def repeats_of(self, history: int) -> int:
        """Rounds of each of its settings: passes of few tokens differ more."""
        return round(self.repeats * min(MORE, max(1.0, SHORT / history)))

    @property
    def turns(self) -> int:
        """New turns that a history's settings take at most: each is stored behind it, so that
        none may come again."""
        rounds = max(map(self.repeats_of, self.histories))
        each = self.warm_up + rounds * (2 + self.points + len(NEAR))
        return REFERENCES + len(self.bandwidths) * each + sum(PHASES.values())

    def cut_name(self) -> str:
        """What the rows call the link that is cut."""
        return f"{self.cut_bandwidth.name}, then a tenth"


class Steered(Peer):
    """A server whose planner can be overruled. ``with Steered.up(plan) as server: ...``"""

    orders: Path
    """Where it looks for orders."""

    @classmethod
    @contextmanager
    def up(cls, plan: Plan) -> Iterator[Steered]:
        """Raises ServerFailedError."""
        with (
            TemporaryDirectory(prefix="plan-orders-") as folder,
            as_plugin(plan_control) as env,
            patch.dict(os.environ, {**env, plan_control.ORDER_FILE: f"{folder}/order.json"}),
        ):
            server = cls(
                plan.policy,
                plan.model,
                Shape(max(plan.histories), plan.turn, ANSWER, plan.turns),
                plan.dtype,
                recompute="auto",
                profile=plan.profile,
                plugin={},  # the environment above reaches every child
                page=PAGE,
            )
            server.orders = Path(folder, "order.json")
            try:
                server.start()
                yield server
            finally:
                server.stop()

    def state(self) -> dict[str, Any]:
        """The scheduler's internal state."""
        answer = requests.get(f"{self.server.url}/server_info", timeout=600)
        answer.raise_for_status()
        return answer.json()["internal_states"][0]

    def tell(self, order: Order) -> dict[str, Any]:
        """Returns the state in which it has been obeyed."""
        order.put(self.orders)
        state = self.state()
        if self.orders.exists():
            raise OSError("the server does not take orders")
        return state

    def newest_trace(self) -> dict[str, Any]:
        """The last restore's, from /krul/restores."""
        answer = requests.get(f"{self.server.url}/krul/restores", timeout=60)
        answer.raise_for_status()
        return answer.json()["restores"][0]


class Returns:
    """A history's conversations, stored on the server, and their returns."""

    def __init__(self, server: Steered, plan: Plan, prompts: Prompts, history: int) -> None:
        self._server, self._plan, self._history = server, plan, history
        self._prompts = prompts
        self._turn = 0
        self.points = points(history, plan.points)

    def store(self) -> None:
        """Compute the conversations and evict them; the server knows no others."""
        self._server.server.flush()
        for past in self._prompts.conversations:
            self._server.tell(Order(MEMORY))
            self._server.ask(past[: self._history], ANSWER)
        self._server.tell(Order(MEMORY))
        self._server.settle()

    def __call__(
        self, rate: float | None, number: int, forced: int | None = None, relearn: bool = False
    ) -> Sample:
        """Evict everything and let a conversation return. number: of the round, which says
        whose turn it is. Raises OSError when it is no measurement."""
        server, history = self._server, self._history
        link = rate or MEMORY
        teach = forced is None or self._plan.teach
        before = server.tell(Order(link, relearn, forced, teach, self.points))
        server.settle()
        past = self._prompts.conversations[number % len(self._prompts.conversations)]
        turn = self._prompts.turns[self._turn]
        self._turn += 1
        given = server.ask([*past[:history], *turn], ANSWER)
        problem = given.problem(self._plan.policy, Shape(history, len(turn), ANSWER, 1))
        if problem:
            raise OSError(problem)
        state = server.state()
        restore = state["krul"]["restore"]
        traced = restore["passes"] > before["krul"]["restore"]["passes"]
        trace = server.newest_trace() if traced else None
        if trace and trace["failed"]:
            raise OSError("the restore failed")
        if trace and trace["makespan_seconds"] < 0.9 * trace["stored_bytes"] / link:
            raise OSError("the link carried more than it was set to")
        noted, computing = state[plan_control.STATE].values()
        seconds = sum(computing) or None
        idle = trace["bubble_seconds"] if trace else {"load": None, "compute": None}
        return Sample(
            number=number,
            forced=forced,
            load=given.host,
            chosen=noted["load"],
            ttft=given.ttft,
            predicted=trace["predicted_seconds"] if trace else noted["seconds"],
            makespan=trace["makespan_seconds"] if trace else seconds or given.ttft,
            computing=seconds,
            load_bubble=idle["load"],
            compute_bubble=idle["compute"],
            stored_bytes=noted["stored_bytes"],
            expected=noted["expected"],
            believed=restore["cost"]["link_bytes_per_second"]["memory"],
        )
