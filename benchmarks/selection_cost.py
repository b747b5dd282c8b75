"""What measuring attention costs while a server generates.

    python benchmarks/selection_cost.py --model DIR --json cost.json

Two servers with the default policy, `--krul-attention on` and `off`, are asked the same
conversations turn by turn, the order alternating: one turn of either lies seconds apart, and
what else the machine does falls on both. A conversation is a few turns of random prompt tokens
with greedy answers. Compared are a turn's seconds, from sending the request to its last token,
and the CPU seconds that the server's processes took for it, until they were idle again; and the
two servers' totals, with an interval of 95 % from drawing whole conversations anew (bootstrap).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import track

from krul_sglang.live_server import LiveServer, ServerFailedError
from krul_sglang.profile.locate import ensure


def cpu_seconds(server: LiveServer) -> float:
    """Of all its processes, since they began."""
    assert server.process is not None
    root = psutil.Process(server.process.pid)
    times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
    return sum(own.user + own.system for own in times)


def settled(server: LiveServer) -> float:
    """CPU seconds once the server has nothing left to do: what it does behind a request counts
    for that request, and must not slow the other server's."""
    used = cpu_seconds(server)
    while True:
        time.sleep(0.5)
        now = cpu_seconds(server)
        if now - used < 0.05:
            return now
        used = now


Turn = tuple[float, float]
"""Seconds one request took, and CPU seconds."""


def converse(
    servers: dict[str, LiveServer], seed: int, turns: int, prompt: int, answer: int
) -> list[dict[str, Turn]]:
    """One conversation with each server: by turn, what it took either."""
    gen = random.Random(seed)
    histories: dict[str, list[int]] = {name: [] for name in servers}
    taken = []
    for turn in range(turns):
        said = [gen.randrange(1000, 40000) for _ in range(prompt)]
        names = list(servers) if (seed + turn) % 2 else list(reversed(servers))
        spent = {}
        for name in names:
            server, history = servers[name], histories[name]
            history += said
            began, used = time.perf_counter(), cpu_seconds(server)
            history += server.generate(history, answer)["output_ids"]
            seconds = time.perf_counter() - began
            spent[name] = seconds, settled(server) - used
        taken.append(spent)
    return taken


def compare(conversations: list[list[dict[str, Turn]]], index: int) -> dict[str, Any]:
    """Ratios of on to off: of each turn, and of all together with their interval."""
    turns = [turn for conversation in conversations for turn in conversation]
    ratios = sorted(turn["on"][index] / turn["off"][index] for turn in turns)

    def overall(drawn: list[list[dict[str, Turn]]]) -> float:
        on, off = (
            sum(turn[name][index] for conversation in drawn for turn in conversation)
            for name in ("on", "off")
        )
        return on / off

    gen = random.Random(0)
    again = sorted(overall(gen.choices(conversations, k=len(conversations))) for _ in range(2000))
    return {
        "turns_median": statistics.median(ratios),
        "turns_quartiles": statistics.quantiles(ratios, n=4),
        "total": overall(conversations),
        "total_95": [again[50], again[-51]],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=150, help="new tokens a turn")
    parser.add_argument("--answer", type=int, default=100, help="tokens of each answer")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console()
    profile = (options.profile or ensure(options.model, 1, console.print)).resolve()
    flags = [
        "--enable-krul",
        "--krul-profile",
        str(profile),
        "--sleep-on-idle",
        "--dtype",
        "float32",
        "--max-total-tokens",  # else the one that starts first takes most of the memory
        "8192",
    ]
    shape = (options.turns, options.prompt, options.answer)
    taken = []
    with (
        LiveServer(options.model, [*flags, "--krul-attention", "on"]) as on,
        LiveServer(options.model, [*flags, "--krul-attention", "off"]) as off,
    ):
        servers = {"on": on, "off": off}
        converse(servers, -1, *shape)  # warm
        for seed in track(range(options.rounds), console=console):
            taken.append(converse(servers, seed, *shape))
        measured, taps = on.krul()["measured_requests"], on.krul()["memory"]["taps"]
    result: dict[str, Any] = {
        "conversation": dict(zip(("turns", "prompt", "answer"), shape, strict=True)),
        "seconds": taken,
        "measured_requests": measured,
        "taps_bytes": taps,
    }
    for index, kind in enumerate(("wall", "cpu")):
        result[kind] = compare(taken, index)
    console.print_json(json.dumps({k: v for k, v in result.items() if k != "seconds"}))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, ServerFailedError) as error:
        sys.exit(f"error: {error}")
