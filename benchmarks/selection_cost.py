"""What measuring attention costs while a server generates.

    python benchmarks/selection_cost.py --model DIR --json cost.json

Two servers with the default policy, `--krul-attention on` and `off`, are asked the same
conversations in turns, the order alternating. A conversation is a few turns of random prompt
tokens with greedy answers; its time is the sum of its requests' times. Pairs are compared, so
that what else the machine does falls on both. The CPU seconds that the server's processes took
are compared, too: what else the machine does hardly moves them.
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


def converse(
    server: LiveServer, seed: int, turns: int, prompt: int, answer: int
) -> tuple[float, float]:
    """Seconds the requests of one conversation took, and CPU seconds."""
    gen = random.Random(seed)
    history: list[int] = []
    spent, used = 0.0, -cpu_seconds(server)
    for _ in range(turns):
        history += [gen.randrange(1000, 40000) for _ in range(prompt)]
        began = time.perf_counter()
        reply = server.generate(history, answer)
        spent += time.perf_counter() - began
        history += reply["output_ids"]
    return spent, used + cpu_seconds(server)


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
    pairs = []
    with (
        LiveServer(options.model, [*flags, "--krul-attention", "on"]) as on,
        LiveServer(options.model, [*flags, "--krul-attention", "off"]) as off,
    ):
        for server in (on, off):
            converse(server, -1, *shape)  # warm
        for seed in track(range(options.rounds), console=console):
            order = (on, off) if seed % 2 else (off, on)
            spent = {server is on: converse(server, seed, *shape) for server in order}
            pairs.append((spent[True], spent[False]))
        measured, taps = on.krul()["measured_requests"], on.krul()["memory"]["taps"]
    result: dict[str, Any] = {
        "conversation": dict(zip(("turns", "prompt", "answer"), shape, strict=True)),
        "seconds": [{"on": a, "off": b} for a, b in pairs],
        "measured_requests": measured,
        "taps_bytes": taps,
    }
    for index, kind in enumerate(("wall", "cpu")):
        ratios = sorted(with_it[index] / without[index] for with_it, without in pairs)
        result[kind] = {"ratio_median": statistics.median(ratios), "ratios": ratios}
    console.print_json(json.dumps({k: v for k, v in result.items() if k != "seconds"}))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, ServerFailedError) as error:
        sys.exit(f"error: {error}")
