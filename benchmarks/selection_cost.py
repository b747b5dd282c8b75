"""What measuring attention costs a server: while it generates, and when it evicts.

    python benchmarks/selection_cost.py --model DIR --json cost.json

One server with the default policy. A conversation is a few turns of random prompt tokens with
greedy answers, and is held twice, turn by turn in alternating order: once as it is, and once with
the taps switched off. One process serves both, a few seconds apart, because two servers of the
same flags already differ by more than what is looked for. Compared are a turn's seconds, from
sending the request to its last token, and the CPU seconds the server took for it until it was
idle again. After the last turn both conversations are evicted, one by one: the CPU seconds until
each is encoded and the server idle say what choosing by attention costs the encoder. Totals come
with an interval of 95 % from drawing whole conversations anew (bootstrap).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parent))  # also where PYTHONSAFEPATH is set

import attention_switch
import psutil
from rich.console import Console
from rich.progress import track
from server_plugin import as_plugin

from krul_sglang.live_server import LiveServer, ServerFailedError
from krul_sglang.profile.locate import ensure

SIDES = ("measured", "unmeasured")


class Turn(NamedTuple):
    """What one request took: seconds, and CPU seconds of the server's processes."""

    wall: float
    cpu: float


class Conversation(NamedTuple):
    """By side: what its turns took, and the CPU seconds of evicting it."""

    turns: Sequence[dict[str, Turn]]
    evicted: dict[str, float]


class Switched:
    """A server whose taps can be switched off."""

    def __init__(self, server: LiveServer, orders: Path) -> None:
        self._server, self._orders = server, orders

    def order(self, measured: bool, evict: int = 0) -> None:
        """What holds from now on, and how many tokens leave the device. Raises OSError."""
        self._orders.write_text(json.dumps({"measured": measured, "evict": evict}))
        self._server.krul()
        if self._orders.exists():
            raise OSError("the server does not take orders")

    def cpu_seconds(self) -> float:
        """Of all its processes, since they began."""
        assert self._server.process is not None
        root = psutil.Process(self._server.process.pid)
        times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
        return sum(own.user + own.system for own in times)

    def settled(self) -> float:
        """CPU seconds once the server has nothing left to do: what it does behind a request
        counts for that request."""
        used = self.cpu_seconds()
        while True:
            time.sleep(0.5)
            now = self.cpu_seconds()
            if now - used < 0.05:
                return now
            used = now

    def converse(self, seed: int, turns: int, prompt: int, answer: int) -> Conversation:
        """One conversation on either side, and its eviction."""
        gen = random.Random(seed)
        histories: dict[str, list[int]] = {side: [] for side in SIDES}
        taken = []
        order = list(SIDES)
        for turn in range(turns):
            order = list(SIDES) if (seed + turn) % 2 else list(reversed(SIDES))
            spent = {}
            for side in order:
                history = histories[side]
                history += [gen.randrange(1000, 40000) for _ in range(prompt)]
                self.order(side == "measured")
                used = self.settled()
                began = time.perf_counter()
                said = self._server.generate(history, answer, ignore_eos=True)
                history += said["output_ids"]
                seconds = time.perf_counter() - began
                spent[side] = Turn(seconds, self.settled() - used)
            taken.append(spent)
        evicted = {}
        for side in order:  # the one that has not been used for longest leaves first
            used = self.settled()
            self.order(True, evict=len(histories[side]) - 1)
            evicted[side] = self.settled() - used
        return Conversation(taken, evicted)


def ratio(pairs: Sequence[Sequence[dict[str, float]]]) -> dict[str, Any]:
    """Measured to unmeasured, of conversations' pairs: each, and all together with interval."""
    ratios = sorted(own["measured"] / own["unmeasured"] for each in pairs for own in each)

    def overall(drawn: Sequence[Sequence[dict[str, float]]]) -> float:
        measured, unmeasured = (sum(own[side] for each in drawn for own in each) for side in SIDES)
        return measured / unmeasured

    gen = random.Random(0)
    again = sorted(overall(gen.choices(pairs, k=len(pairs))) for _ in range(2000))
    return {
        "median": statistics.median(ratios),
        "range": [ratios[0], ratios[-1]],
        "total": overall(pairs),
        "total_95": [again[50], again[-51]],
    }


def conclude(found: Sequence[Conversation]) -> dict[str, Any]:
    """The ratios: of turns' seconds, of turns' CPU seconds, and of everything's CPU seconds."""

    def turns(name: str) -> list[list[dict[str, float]]]:
        return [
            [{side: getattr(turn[side], name) for side in SIDES} for turn in own.turns]
            for own in found
        ]

    whole = [[*cpu, own.evicted] for cpu, own in zip(turns("cpu"), found, strict=True)]
    together = [[{side: sum(part[side] for part in parts) for side in SIDES}] for parts in whole]
    return {
        "turn_seconds": ratio(turns("wall")),
        "turn_cpu_seconds": ratio(turns("cpu")),
        "eviction_cpu_seconds": ratio([[own.evicted] for own in found]),
        "all_cpu_seconds": ratio(together),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--rounds", type=int, default=6, help="conversations; default 6")
    parser.add_argument("--turns", type=int, default=4, help="of each; default 4")
    parser.add_argument("--prompt", type=int, default=150, help="new tokens a turn; default 150")
    parser.add_argument("--answer", type=int, default=100, help="tokens answered; default 100")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if min(options.rounds, options.turns, options.prompt, options.answer) < 1:
        parser.error("--rounds, --turns, --prompt and --answer take 1 or more")
    console = Console()
    profile = (options.profile or ensure(options.model, 1, console.print)).resolve()
    shape = (options.turns, options.prompt, options.answer)
    both = 2 * options.turns * (options.prompt + options.answer)
    flags = [
        "--enable-krul",
        "--krul-profile",
        str(profile),
        "--sleep-on-idle",
        "--dtype",
        "float32",
        "--max-total-tokens",
        str(max(4096, 2 * both)),
        "--context-length",
        "8192",
    ]
    with (
        TemporaryDirectory(prefix="attention-orders-") as folder,
        as_plugin(attention_switch) as env,
    ):
        orders = Path(folder, "order.json")
        env |= {attention_switch.ORDER_FILE: str(orders)}
        with LiveServer(options.model, flags, env=env) as server:
            switched = Switched(server, orders)
            switched.converse(-1, 1, *shape[1:])  # warm
            warm = server.krul()
            rounds = track(range(options.rounds), "conversations", console=console)
            found = [switched.converse(seed, *shape) for seed in rounds]
            state = server.krul()
    requests = options.rounds * options.turns
    expected = {
        "measured_requests": requests,
        # Of the last answer of a conversation, not the last token.
        "stored_tokens": 2 * (requests * (options.prompt + options.answer) - options.rounds),
    }
    for name, number in expected.items():
        if state[name] - warm[name] != number:
            raise ValueError(f"{name} grew by {state[name] - warm[name]}, not {number}")
    result: dict[str, Any] = {
        "conversation": dict(zip(("turns", "prompt", "answer"), shape, strict=True)),
        "taken": [
            {"turns": [{s: t._asdict() for s, t in turn.items()} for turn in own.turns],
             "evicted": own.evicted}
            for own in found
        ],
        "taps_bytes": state["memory"]["taps"],
    } | conclude(found)  # fmt: skip
    console.print_json(json.dumps({k: v for k, v in result.items() if k != "taken"}))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, ServerFailedError) as error:
        sys.exit(f"error: {error}")
