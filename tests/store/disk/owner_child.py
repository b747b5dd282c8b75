"""Child process: one of several that use a directory at the same time; prints what it saw.

It stores, reads in parts, and makes room, in random order, on few pieces that all of the
processes write (each its own bytes of the same runs, under the same names). ``hold``: it says
that it is there, and waits to be killed in the middle of a write.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections import Counter
from typing import Any

from disk_kit import FINGERPRINT, Piece, WatchedCalls, opened, publish

from krul_sglang.codec.base import CodecError
from krul_sglang.store.disk.tier import DiskTier

WRITERS = 8


def read_slowly(tier: DiskTier, piece: Piece) -> str:
    """Read in parts while others write and evict; which writer's bytes they are."""
    payload = opened(tier, piece)
    if payload is None:
        return "miss"
    for upto in range(0, payload.size, 7000):
        payload.fetch(upto)
        time.sleep(0)
    payload.fetch(payload.size)
    found = bytes(payload.view)
    payload.close()
    whose = [w for w in range(WRITERS) if found == versions(piece)[w]]
    return "read" if whose else "wrong"


CACHE: dict[tuple[int, int], list[bytes]] = {}


def versions(piece: Piece) -> list[bytes]:
    """The bytes that each writer has of a piece."""
    key = piece.talk, piece.index
    if key not in CACHE:
        one = [Piece(piece.talk, piece.index, piece.size, writer=w) for w in range(WRITERS)]
        CACHE[key] = [other.payload for other in one]
    return CACHE[key]


def share(task: dict[str, Any]) -> Counter[str]:
    rng, saw = random.Random(task["writer"]), Counter[str]()
    tier = DiskTier(task["root"], FINGERPRINT, task["limit"])
    until = time.monotonic() + task["seconds"]
    while time.monotonic() < until:
        piece = Piece(rng.randrange(4), rng.randrange(2), 20_000, writer=task["writer"])
        act = rng.random()
        if act < 0.4:
            saw[publish(tier, piece).outcome.value] += 1
        elif act < 0.9:
            try:
                saw[read_slowly(tier, piece)] += 1
            except CodecError:
                saw["torn"] += 1
        elif act < 0.95:
            tier.make_room(task["limit"])
        else:
            tier.refresh()
    totals = tier.totals()
    saw.update({name: totals[name] for name in ("damaged", "failed", "unreadable", "foreign")})
    tier.close()
    return saw


def hold(task: dict[str, Any]) -> None:
    def rule(name: str, number: int, arguments: tuple[Any, ...]) -> None:
        if name == "replace":
            print("holding", flush=True)
            time.sleep(600)

    tier = DiskTier(task["root"], FINGERPRINT, task["limit"], calls=WatchedCalls(rule))
    publish(tier, Piece(50))


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    if task.get("hold"):
        hold(task)
    else:
        print(json.dumps(share(task)), flush=True)
    os._exit(0)
