"""The steps of benchmarks/scheduler_cost.py: trees of conversations in four caches, and every
call that the scheduler makes when a conversation returns, on each of them.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from restore_cells import percentile
from rich.console import Console
from scheduler_rig import Forward, Hooked, Rig, Shape

SMALL = Shape(layers=2, kv_heads=1, heads=1, head_dim=8)
"""The pool under the trees: 10,000 nodes of a real one do not fit into memory."""
SYSTEM = 64
SPAN = (8, 64)
"""Tokens of a prompt or an answer, and so of a node, from and to."""
TURNS = (1, 6)
AGAIN = 0.15
"""Share of turns that are answered twice: a branch."""

STOCK, PYTHON, KRUL, STORED = "stock", "stock, Python core", "krul", "krul, 3/4 stored"
CACHES = {STOCK: "stock", PYTHON: "stock_python", KRUL: "krul", STORED: "krul"}
STEP = ("match", "admit", "checkpoint", "finish", "prefill hooks", "decode hooks")
"""Calls of a step in which one request is admitted and another finishes."""
STEP_OP, EVICTING_OP = "step", "step with an eviction"
OPS = (*STEP, "evict", STEP_OP, EVICTING_OP)
RETURNING_OPS = ("match stored", "plan", "match again")
"""Of a conversation that is stored: the first look at it, what of that is planning, and the
next ones while it waits."""


@dataclass(frozen=True)
class Conversation:
    """Turns that are in the tree, and the one that it returns with; token ids."""

    turns: Sequence[tuple[list[int], list[int]]]
    again: frozenset[int]
    """Turns that are answered twice."""
    prompt: list[int]
    answer: list[int]

    @property
    def history(self) -> list[int]:
        """What the tree holds, without the system prompt."""
        return [token for prompt, answer in self.turns for token in (*prompt, *answer)]

    @property
    def nodes(self) -> int:
        """Nodes it makes: SGLang splits prompt from answer."""
        return 2 * len(self.turns) + len(self.again)


def conversations(nodes: int, seed: int) -> Iterator[Conversation]:
    """As many as make about that many nodes."""
    gen = random.Random(seed)

    def tokens() -> list[int]:
        return [gen.randrange(1000, 40000) for _ in range(gen.randint(*SPAN))]

    while nodes > 0:
        turns = [(tokens(), tokens()) for _ in range(gen.randint(*TURNS))]
        again = frozenset(i for i in range(len(turns)) if gen.random() < AGAIN)
        one = Conversation(turns, again, tokens(), tokens())
        nodes -= one.nodes
        yield one


class Tree:
    """One cache with conversations in it."""

    def __init__(self, name: str, rows: int, shape: Shape) -> None:
        """shape: the model's, for what a decode pass calls."""
        self.name = name
        self.rig = Rig(CACHES[name], SMALL, rows)
        self._hooked, self._forward = Hooked(self.rig), Forward(self.rig, shape)
        self._system = list(range(1, SYSTEM + 1))

    def fill(self, told: Sequence[Conversation], returning: int) -> None:
        """Begin anew, and hold these conversations; the last ones are the latest used, and that
        many of them stay on the device."""
        self.rig.reset()
        for one in told:
            history = list(self._system)
            for number, (prompt, answer) in enumerate(one.turns):
                history += prompt
                if number in one.again:  # another answer, which nobody goes on from
                    self.rig.turn(history, answer[::-1])
                self.rig.turn(history, answer)
                # The last token of an answer has no KV until the next turn computes it.
                history += answer
        if self.name == STORED:
            held = self.rig.cache.full_evictable_size()
            kept = SYSTEM + sum(2 * len(one.history) for one in told[-returning:])
            self.rig.evict(min(held * 3 // 4, max(1, held - kept)))
            self.rig.settle()
        new = sum(len(one.prompt) + len(one.answer) for one in told[-returning:])
        self.rig.occupy(2 * new)

    def returns(self, one: Conversation) -> dict[str, float]:
        """A conversation on the device returns and is finished, then the oldest one leaves.
        Seconds by call."""
        rig, spent = self.rig, {}
        history = self._system + one.history
        req = rig.request(history + one.prompt)
        spent["match"] = timed(rig.match, req)
        if req.prefix_len != len(history) - 1:
            raise ValueError(f"{self.name}: only {req.prefix_len} tokens were on the device")
        spent["admit"] = timed(rig.admit, req)
        rig.prefill(req)
        spent["checkpoint"] = timed(rig.checkpoint, req)
        rig.answer(req, one.answer)
        spent["finish"] = timed(rig.finish, req)
        spent["prefill hooks"] = timed(self._hooked.step, True)
        spent["decode hooks"] = timed(self._decode)
        spent["evict"] = timed(rig.evict, len(one.history))
        rig.settle()
        spent[STEP_OP] = sum(spent[name] for name in STEP)
        spent[EVICTING_OP] = spent[STEP_OP] + spent["evict"]
        return spent

    def _decode(self) -> None:
        self._hooked.step(False)
        self._forward.run()

    def waits(self, one: Conversation) -> dict[str, float]:
        """A stored conversation returns and waits in the queue. Seconds by call."""
        rig = self.rig
        req = rig.request(self._system + one.history + one.prompt)
        first = timed(rig.match, req)
        if not req.host_hit_length:
            raise ValueError(f"{self.name}: nothing of the conversation was stored")
        again = timed(rig.match, req)
        ids, total = self._stored(req), len(req.full_untruncated_fill_ids)
        planning = timed(rig.cache.restores.plans.plan, req.prefix_len, ids, total)
        return dict(zip(RETURNING_OPS, (first, planning, again), strict=True))

    def _stored(self, req: Any) -> Any:
        import torch

        from krul_sglang.runtime.marks import full_data

        path = self.rig.cache.path(req.best_match_node)
        return torch.cat([full_data(node).host_value for node in path if node.evicted][::-1])


CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
"""What passes, and what this thread computes: the same on a machine that does nothing else, but
for what is waited for."""


class Clock:
    """What calls are timed with, by name of :data:`CLOCKS`."""

    name = "wall"


def timed(call: Callable[..., Any], *args: Any) -> float:
    """Seconds of one call."""
    now = CLOCKS[Clock.name]
    began = now()
    call(*args)
    return now() - began


@contextmanager
def uncollected() -> Iterator[None]:
    """Leave what there is out of garbage collections: one cache's nodes are not to cost
    another's step."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def measure_steps(
    nodes: int, repeats: int, shape: Shape, console: Console
) -> tuple[dict[str, Any], dict[str, str]]:
    """The rows of one tree size, and the class of each cache's tree core."""
    told = list(conversations(nodes, seed=nodes))
    # A few of the newest return before the tree is filled anew: it grows by a tenth at most,
    # and stock SGLang has not evicted the oldest of those that return.
    batch = min(repeats, max(1, len(told) // 10))
    tokens = sum(len(x.history) * 2 + len(x.prompt) + len(x.answer) for x in told)
    trees = [Tree(name, SYSTEM + 2 * tokens, shape) for name in CACHES]
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in CACHES}
    waiting: list[dict[str, float]] = []
    held: dict[str, int] = {}
    try:
        with console.status(f"{nodes} nodes") as status:
            for begin in range(0, repeats, batch):
                status.update(f"{nodes} nodes, {begin} of {repeats} requests")
                for tree in trees:
                    tree.fill(told, batch)
                    if CACHES[tree.name] != "stock":
                        held.setdefault(tree.name, tree.rig.nodes())
                with uncollected():
                    for number in range(min(batch, repeats - begin)):
                        turn = (begin + number) % len(trees)
                        for tree in (*trees[turn:], *trees[:turn]):
                            samples[tree.name].append(tree.returns(told[-1 - number]))
                        waiting.append(trees[-1].waits(told[number]))
        cores = {tree.name: tree.rig.core for tree in trees}
    finally:
        for tree in trees:
            tree.rig.close()
    rows = [_row(name, op, [x[op] for x in samples[name]]) for name in CACHES for op in OPS]
    rows += [_row(STORED, op, [x[op] for x in waiting]) for op in RETURNING_OPS]
    found = {"nodes": nodes, "held": held, "conversations": len(told), "repeats": repeats}
    return found | {"rows": rows, "added": _added(samples)}, cores


def _row(cache: str, op: str, seconds: Sequence[float]) -> dict[str, Any]:
    return {
        "cache": cache,
        "op": op,
        "p50_us": 1e6 * statistics.median(seconds),
        "p99_us": 1e6 * percentile(seconds, 99),
        "mean_us": 1e6 * statistics.fmean(seconds),
    }


def _added(samples: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """What is added to a step, median over requests of the difference of the same request's."""

    def gap(more: str, less: str, op: str) -> float:
        pairs = zip(samples[more], samples[less], strict=True)
        return 1e6 * statistics.median(a[op] - b[op] for a, b in pairs)

    return [
        {
            "cache": name,
            "op": op,
            "us": gap(name, STOCK, op),
            "of_python_core_us": gap(PYTHON, STOCK, op),
            "of_krul_us": gap(name, PYTHON, op),
        }
        for name in (KRUL, STORED)
        for op in ("decode hooks", STEP_OP, EVICTING_OP)
    ]
