"""Child process: forks writers on a directory and kills them, or lets them kill themselves.

Each line of standard input is a JSON object; the answer is one line.

- ``delay``: a writer works as :func:`work` says until SIGKILL comes after that many seconds.
- ``point``: a writer goes through :func:`scenario` and sends itself SIGKILL right before its
  ``point``-th system call (``torn``: in the middle of the first write from there on).
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from typing import Any, NoReturn

from disk_kit import FINGERPRINT, Piece, WatchedCalls, look, pieces, publish

from krul_sglang.store.disk.publishing import Outcome
from krul_sglang.store.disk.tier import DiskTier


class Journal:
    """What was acknowledged, in a file of its own; a line is there before anything goes on."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def acknowledge(self, piece: Piece) -> None:
        os.write(self._fd, f"{piece.talk} {piece.index} {piece.size}\n".encode())


def work(task: dict[str, Any]) -> NoReturn:
    """Two threads store and read without end; entries go as the limit asks for."""
    tier = DiskTier(task["root"], FINGERPRINT, task["limit"])
    journal = Journal(task["journal"])

    def forever(seed: int) -> None:
        rng, done = random.Random(seed), []
        for piece in pieces(seed):
            if publish(tier, piece).outcome in (Outcome.STORED, Outcome.PRESENT):
                journal.acknowledge(piece)
                done.append(piece)
            if done and rng.random() < 0.3:
                look(tier, rng.choice(done))

    threading.Thread(target=forever, args=(2 * task["seed"] + 1,), daemon=True).start()
    forever(2 * task["seed"])
    raise AssertionError("pieces never end")


def scenario(task: dict[str, Any]) -> list[str]:
    """Open, store, evict, set a damaged entry aside, store again, close; the calls made."""

    def rule(name: str, number: int, arguments: tuple[Any, ...]) -> int | None:
        if task.get("torn"):
            if name == "write" and number >= task["point"]:
                fd, parts = arguments
                whole = b"".join(parts)
                os.write(fd, whole[: len(whole) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
        elif number == task["point"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return None

    calls = WatchedCalls(rule)
    journal = Journal(task["journal"])
    tier = DiskTier(task["root"], FINGERPRINT, task["limit"], calls=calls)
    for talk in (100, 101):
        piece = Piece(talk)
        if publish(tier, piece).outcome is Outcome.STORED:
            journal.acknowledge(piece)
    tier.quarantine(Piece(100).name(), "as the test says")
    tier.make_room(task["limit"] // 2)
    piece = Piece(102, size=20_000)
    if publish(tier, piece).outcome is Outcome.STORED:
        journal.acknowledge(piece)
    tier.close()
    return calls.made


def serve() -> None:
    for line in sys.stdin:
        task = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                if "delay" in task:
                    work(task)
                os.write(writing, json.dumps(scenario(task)).encode())
            except BaseException as error:
                os.write(writing, json.dumps(repr(error)).encode())
            finally:
                os._exit(0)
        os.close(writing)
        if "delay" in task:
            time.sleep(task["delay"])
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        said = os.read(reading, 1 << 16).decode()
        os.close(reading)
        said = json.loads(said) if said else []
        print(json.dumps({"killed": os.WIFSIGNALED(status), "said": said}), flush=True)


if __name__ == "__main__":
    serve()
