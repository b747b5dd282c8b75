"""Which stored segments to let go of first, and which not to store: replayed, not served.

    python benchmarks/ranking.py --json ranking.json

A made-up day of multi-turn chat goes through the disk tier's own index (``store/disk/index.py``:
nothing goes before what continues it), at equal bytes, once for each way of ranking victims:

- ``lru``: the least recently used first, as the tiers do.
- ``greedy-dual``: by seconds of recompute a byte saves, aged (Cao and Irani 1997).
- ``gdsf``: the same times how often it was used (Cherkasova 1998).

and once for each rule of admission to a disk behind memory: ``always``, or ``second-visit``
(a conversation is written once it came back; until then memory alone has it). What counts is how
much of the history of returning turns is still there, in tokens and in seconds of recompute.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import statistics
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from krul_sglang.store.disk.entry import EntryName
from krul_sglang.store.disk.index import Index

MODEL = bytes(16)
TOKEN_BYTES = 1800
"""What `predictive` keeps of a token of SmolLM2-135M."""
LINEAR, PAIR = 8.7e-4, 5.3e-7
"""Seconds a token and a query-key pair, of SmolLM2-135M on two CPU cores."""
DAY = 86400.0
SHARES = (0.05, 0.1, 0.2, 0.4)
"""Budgets, of all bytes that the day would store."""
ONE_OFF = (0.3, 0.6, 0.9)
"""Shares of conversations that never come back."""


@dataclass(frozen=True)
class Turn:
    """A request: when it comes, the entries of its history, and the one that it adds."""

    at: float
    history: tuple[EntryName, ...]
    adds: EntryName


def entry(identity: str, before: EntryName | None, tokens: int) -> EntryName:
    """An entry behind another one, or the first of a conversation."""
    start = 0 if before is None else before.stop
    end = hashlib.blake2b(identity.encode(), digest_size=16).digest()
    parent = bytes(16) if before is None else before.end
    return EntryName(MODEL, parent, start, tokens, tokens, end, tokens * TOKEN_BYTES)


def day(conversations: int, one_off: float, seed: int) -> list[Turn]:
    """Conversations that begin at random times of a day; those that go on have eight turns on
    average, pauses of a minute in the median, and one pause in ten of hours. They share six
    system prompts, the first of them most often."""
    rng = random.Random(seed)
    prompts = [entry(f"prompt {n}", None, rng.randrange(100, 1500)) for n in range(6)]
    turns = []
    for number in range(conversations):
        (last,) = rng.choices(prompts, [1 / (1 + n) for n in range(len(prompts))])
        at, history = rng.random() * DAY, [last]
        count = 1 if rng.random() < one_off else 2 + int(rng.expovariate(1 / 6))
        for turn in range(count):
            last = entry(f"{number} {turn}", last, 30 + int(rng.lognormvariate(5.7, 0.8)))
            turns.append(Turn(at, tuple(history), last))
            history.append(last)
            pause = rng.lognormvariate(math.log(60), 1.2)
            at += rng.lognormvariate(math.log(4 * 3600), 0.7) if rng.random() < 0.1 else pause
    return sorted(turns, key=lambda turn: turn.at)


def recompute(name: EntryName) -> float:
    """Seconds that computing its tokens takes, what is before them being there."""
    return LINEAR * name.tokens + PAIR * name.tokens * (name.start + name.tokens / 2)


@dataclass
class Tally:
    """What returning turns asked for and got."""

    asked: float = 0
    hit: float = 0

    @property
    def share(self) -> float:
        """Of what was asked for."""
        return self.hit / max(1e-9, self.asked)


@dataclass
class Ranking:
    """The priority of an entry that is used now: the lowest goes first. ``clock`` rises to the
    priority of whatever went, so that what was worth a lot once does not stay for ever."""

    name: str
    worth: Callable[[EntryName, int], float] | None
    clock: float = 0.0
    uses: dict[EntryName, int] = field(default_factory=dict)

    def priority(self, name: EntryName, at: float) -> int:
        """In place of the time (ns) that the index is told."""
        if self.worth is None:
            return int(at * 1e9)
        self.uses[name] = self.uses.get(name, 0) + 1
        return int((self.clock + self.worth(name, self.uses[name])) * 1e15)

    def gone(self, priority: int) -> None:
        """An entry of this priority was let go of."""
        if self.worth is not None:
            self.clock = priority / 1e15


def rankings() -> list[Ranking]:
    """Fresh ones."""
    return [
        Ranking("lru", None),
        Ranking("greedy-dual", lambda name, uses: recompute(name) / name.footprint),
        Ranking("gdsf", lambda name, uses: uses * recompute(name) / name.footprint),
    ]


class Disk:
    """The tier's index under a budget in bytes, without files."""

    def __init__(self, limit: float, ranking: Ranking) -> None:
        self.index, self.limit, self.ranking = Index(), limit, ranking
        self.written = 0

    def __contains__(self, name: EntryName) -> bool:
        return name in self.index

    def use(self, name: EntryName, at: float) -> None:
        """It is read."""
        self.index.touch(name, self.ranking.priority(name, at))

    def add(self, name: EntryName, at: float) -> None:
        """As ``Catalog`` makes room: never for what it continues."""
        while self.index.used + name.footprint > self.limit:
            victim = self.index.oldest((MODEL, name.parent))
            if victim is None:
                return
            self.ranking.gone(self.index.recency(victim))
            self.index.remove(victim)
        self.index.add(name, self.ranking.priority(name, at))
        self.written += name.footprint


class Memory:
    """The tier in front: entries by recency under a budget in bytes."""

    def __init__(self, limit: float) -> None:
        self._limit, self._used = limit, 0
        self._held: OrderedDict[EntryName, None] = OrderedDict()

    def __contains__(self, name: EntryName) -> bool:
        return name in self._held

    def use(self, name: EntryName) -> None:
        """It is stored or read."""
        if name not in self._held:
            self._used += name.footprint
        self._held[name] = None
        self._held.move_to_end(name)
        while self._used > self._limit:
            gone, _ = self._held.popitem(last=False)
            self._used -= gone.footprint


def replay(
    turns: Sequence[Turn], disk: Disk, memory: float = 0, admit: str = "always"
) -> tuple[Tally, Tally]:
    """Hit tokens and saved seconds. memory: bytes of a tier in front, least recently used out;
    admit: what is written to the disk when it is stored."""
    front = Memory(memory)
    tokens, seconds = Tally(), Tally()
    for turn in turns:
        alive = True
        for name in turn.history:
            alive = alive and (name in front or name in disk)
            if len(turn.history) > 1:  # it returns; a first turn's system prompt does not count
                for tally, worth in ((tokens, name.tokens), (seconds, recompute(name))):
                    tally.asked += worth
                    tally.hit += worth * alive
            if name in disk:
                disk.use(name, turn.at)
            elif admit == "always" or len(turn.history) > 1:
                disk.add(name, turn.at)
            front.use(name)
        if admit == "always" or len(turn.history) > 1:
            disk.add(turn.adds, turn.at)
        front.use(turn.adds)
    return tokens, seconds


def measure(conversations: int, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row for every budget, trace and way; shares are medians over the seeds."""
    for one_off in ONE_OFF:
        days = [day(conversations, one_off, seed) for seed in seeds]
        total = statistics.mean(sum(turn.adds.footprint for turn in turns) for turns in days)
        for share in SHARES:
            limit = share * total
            for n, ranking in enumerate(rankings()):
                found = [replay(turns, Disk(limit, rankings()[n])) for turns in days]
                yield row("ranking", ranking.name, one_off, share, found)
            for admit in ("always", "second-visit"):
                disks = [Disk(limit, rankings()[0]) for _ in days]
                found = [
                    replay(turns, disk, memory=limit / 10, admit=admit)
                    for turns, disk in zip(days, disks, strict=True)
                ]
                written = statistics.median(disk.written for disk in disks)
                yield row("admission", admit, one_off, share, found) | {"written_bytes": written}


def row(kind: str, name: str, one_off: float, share: float, found: Sequence[Any]) -> dict[str, Any]:
    """Medians, least and most over the seeds."""
    figures: dict[str, Any] = {"kind": kind, "name": name, "one_off": one_off, "budget": share}
    for n, what in enumerate(("tokens", "seconds")):
        shares = [tallies[n].share for tallies in found]
        figures[what] = statistics.median(shares)
        figures[f"{what}_range"] = [min(shares), max(shares)]
    return figures


def show(rows: Sequence[dict[str, Any]]) -> None:
    """A table of all rows."""
    table = Table("kind", "way", "one-off", "budget", "hit tokens", "saved seconds", "written")
    for one in rows:
        spread = [f"{one[w]:.1%} ({one[f'{w}_range'][0]:.1%} - {one[f'{w}_range'][1]:.1%})"
                  for w in ("tokens", "seconds")]  # fmt: skip
        written = f"{one['written_bytes'] / 1e9:.2f} GB" if "written_bytes" in one else "-"
        shares = f"{one['one_off']:.0%}", f"{one['budget']:.0%}"
        table.add_row(one["kind"], one["name"], *shares, *spread, written)
    Console(width=120).print(table)


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--conversations", type=int, default=600, help="of a day; default 600")
    parser.add_argument("--seeds", type=int, default=5, help="days that are made up; default 5")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    if options.conversations < 10 or options.seeds < 1:
        print("error: --conversations of at least 10, --seeds of at least 1", file=sys.stderr)
        return 2
    count = len(ONE_OFF) * len(SHARES) * 5
    rows = list(
        track(
            measure(options.conversations, range(options.seeds)),
            "replaying",
            total=count,
            console=Console(stderr=True),
        )
    )
    show(rows)
    if options.json is not None:
        settings = {"conversations": options.conversations, "seeds": options.seeds}
        options.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
