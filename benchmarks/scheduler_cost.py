"""What Krul adds to a step of SGLang's scheduler, and how long an eviction burst stalls it.

    python benchmarks/scheduler_cost.py --model DIR --profile FILE --json scheduler.json
    python benchmarks/scheduler_cost.py --decode-ms 9.5 --parts steps --nodes 1000

steps: multi-turn conversations with one system prompt fill a prefix tree; then conversations
return one at a time, and every call that the scheduler makes for them is timed, on four caches
in turns: SGLang's as it is by default, SGLang's with the Python tree core that Krul needs, and
Krul with everything on the device or with three quarters stored. Differences are taken request
by request. The pool's rows are tiny here, so copying and encoding are not part of it.

burst: conversations are evicted one after another at the model's real pool shape, by the
default policy: what the scheduler's thread waits for, against a bare copy of the same rows.

Both are related to a decode step: --decode-ms, or that of a live server of --model with Krul
and one request.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import scheduler_burst
from restore import machine, versions
from rich.console import Console
from rich.table import Table
from scheduler_burst import Burst
from scheduler_rig import Shape
from scheduler_steps import CACHES, CLOCKS, OPS, RETURNING_OPS, Clock, measure_steps

from krul_sglang.config import parse_size
from krul_sglang.live_server import LiveServer, ServerFailedError
from krul_sglang.profile.locate import ensure

PARTS = ("steps", "burst")


def decode_milliseconds(model: Path, profile: Path | None, tokens: int = 120) -> float:
    """Median time between two tokens of one request, from a live server with Krul."""
    import requests

    flags = ["--enable-krul", "--sleep-on-idle", "--dtype", "float32"]
    flags += ["--krul-profile", str(profile or ensure(model, 1, print))]
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    body = {"input_ids": list(range(1000, 1256)), "sampling_params": sampling, "stream": True}
    came: list[float] = []
    with LiveServer(model, flags) as server:
        server.generate(range(2000, 2100), 8)  # warm
        with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=600) as reply:
            reply.raise_for_status()
            for line in reply.iter_lines():
                if line.startswith(b"data: {"):
                    came.append(time.perf_counter())
    if len(came) < tokens // 2:
        raise OSError("the server did not stream its answer token by token")
    return 1e3 * statistics.median(b - a for a, b in itertools.pairwise(came))


def _ops_table(size: dict[str, Any]) -> Table:
    held = ", ".join(f"{name}: {count}" for name, count in size["held"].items())
    table = Table("call", *CACHES, title=f"{size['nodes']} nodes ({held}): p50 / p99, µs")
    of = {(row["cache"], row["op"]): row for row in size["rows"]}
    for op in (*OPS, *RETURNING_OPS):
        rows = (of.get((name, op)) for name in CACHES)
        cells = (
            "" if row is None else f"{row['p50_us']:.0f} / {row['p99_us']:.0f}" for row in rows
        )
        table.add_row(op, *cells)
    return table


def _added_table(size: dict[str, Any], decode_ms: float | None) -> Table:
    table = Table(
        "cache", "step", "added, µs", "by the Python core", "by Krul", "% of a decode step",
        title=f"{size['nodes']} nodes: added to the default cache",
    )  # fmt: skip
    for row in size["added"]:
        share = "" if decode_ms is None else f"{row['us'] / 10 / decode_ms:.2f}"
        parts = (f"{row[name]:.0f}" for name in ("us", "of_python_core_us", "of_krul_us"))
        table.add_row(row["cache"], row["op"], *parts, share)
    return table


def _burst_table(bursts: Sequence[dict[str, Any]], decode_ms: float | None) -> Table:
    table = Table("burst", *(_burst_name(x) for x in bursts), title="eviction bursts")

    def three(name: str) -> list[str]:
        return ["{p50:.1f} / {p99:.1f} / {max:.1f}".format(**x[name]) for x in bursts]

    table.add_row("stall of an eviction, ms: p50 / p99 / max", *three("stall_ms"))
    for part in bursts[0]["parts_ms"]:
        table.add_row(f"  mean of {part}, ms", *(f"{x['parts_ms'][part]:.2f}" for x in bursts))
    table.add_row("  of it on the CPU, ms", *three("stall_cpu_ms"))
    table.add_row("torch index_select alone, ms", *three("index_select_ms"))
    table.add_row("Krul's gather alone, ms", *three("gather_alone_ms"))
    table.add_row("index_select into used memory, ms", *three("reused_memory_ms"))
    table.add_row("measuring attention at the finish, ms", *three("measure_ms"))
    if decode_ms is not None:
        for label, name in (("a stall", "stall_ms"), ("measuring", "measure_ms")):
            shares = (f"{100 * x[name]['p50'] / decode_ms:.0f}" for x in bursts)
            table.add_row(f"{label}, % of a decode step", *shares)
    for label, name in (
        ("a burst's stalls, s", "burst_stalled_seconds"),
        ("until all is encoded, s", "burst_encoded_seconds"),
        ("encoding a conversation, s", "encode_seconds_per_conversation"),
    ):
        table.add_row(label, *(f"{x[name]:.3f}" for x in bursts))
    table.add_row(
        "staging peak / bound, MB",
        *(f"{x['staging_peak'] / 1e6:.0f} / {x['staging_bound'] / 1e6:.0f}" for x in bursts),
    )
    for label, name in (
        ("evictions that waited for staging", "staging_waits"),
        ("evictions that waited for the budget", "budget_waits"),
        ("tokens dropped", "dropped_tokens"),
    ):
        table.add_row(label, *(str(x[name]) for x in bursts))
    return table


def _burst_name(burst: dict[str, Any]) -> str:
    return (
        f"{burst['rounds']} x {burst['conversations']} of {burst['tokens']} tokens, "
        f"{burst['host_memory'] / 1e9:g} GB"
    )


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        type=Path,
        help="what gives the pool's shape, the KV that a burst encodes, and the live server; "
        "without it the shape is SmolLM2-135M's and KV is random",
    )
    parser.add_argument(
        "--profile",
        type=Path,
        help="of the model; without it bursts are encoded losslessly, and the server takes the "
        "one in the user's cache folder",
    )
    parser.add_argument(
        "--decode-ms",
        type=float,
        help="milliseconds of a decode step; default: measured on a live server of --model, "
        "unknown without one",
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"default {','.join(PARTS)}")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="of the steps: what passes, or what the scheduler's thread computes (for a machine "
        "that is busy with other things); default wall",
    )
    parser.add_argument("--nodes", default="100,1000,10000", help="sizes of the trees")
    parser.add_argument("--repeats", type=int, default=200, help="requests of a size; default 200")
    parser.add_argument("--burst-tokens", default="1000", help="tokens of a conversation, its node")
    parser.add_argument("--burst-conversations", type=int, default=20, help="default 20")
    parser.add_argument("--burst-rounds", type=int, default=5, help="default 5")
    parser.add_argument(
        "--host-memory",
        default="4GB,1GB",
        help="budgets of a burst; a quarter bounds its staging; default 4GB,1GB",
    )
    parser.add_argument("--json", type=Path, help="where the result is written")
    options = parser.parse_args(arguments)
    try:
        for name in ("nodes", "burst_tokens"):
            numbers = [int(text) for text in getattr(options, name).split(",")]
            if min(numbers) < 8:
                raise ValueError(f"--{name.replace('_', '-')}: expected at least 8")
            setattr(options, name, numbers)
        for name in ("repeats", "burst_conversations", "burst_rounds"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')}: expected at least 1")
        options.host_memory = [parse_size(text) for text in options.host_memory.split(",")]
        options.parts = options.parts.split(",")
        if not set(options.parts) <= set(PARTS):
            raise ValueError(f"--parts: expected some of {', '.join(PARTS)}")
        for path in (options.model and options.model / "config.json", options.profile):
            if path is not None and not path.is_file():
                raise ValueError(f"{path}: no such file")
    except ValueError as error:
        parser.error(str(error))
    options.profile = options.profile and options.profile.absolute()
    return options


def facts(options: argparse.Namespace, shape: Shape, console: Console) -> dict[str, Any]:
    """The result without its measurements, but for a decode step's."""
    import torch

    decode_ms = options.decode_ms
    if decode_ms is None and options.model is not None:
        with console.status("a decode step of a live server"):
            decode_ms = decode_milliseconds(options.model, options.profile)
    return {
        "machine": machine(),
        "versions": versions(),
        "torch_threads": torch.get_num_threads(),
        "policy": "predictive, default settings",
        "burst_codec": "lossless" if options.profile is None else "predictive",
        "model": options.model and options.model.name,
        "shape": {"layers": shape.layers, "token_bytes": shape.token_bytes},
        "decode_ms": decode_ms,
        "clock": options.clock,
        "cores": {},
        "steps": [],
        "bursts": [],
    }


def measure(
    options: argparse.Namespace, shape: Shape, result: dict[str, Any], console: Console
) -> Iterator[Table]:
    """Add everything that is asked for to ``result``; a table as soon as it is complete."""
    decode_ms = result["decode_ms"]
    Clock.name = options.clock
    for nodes in options.nodes if "steps" in options.parts else ():
        found, result["cores"] = measure_steps(nodes, options.repeats, shape, console)
        result["steps"].append(found)
        yield _ops_table(found)
        yield _added_table(found, decode_ms)
    if "burst" not in options.parts:
        return
    with console.status("a text's KV"):
        kv = scheduler_burst.history(shape, options.model, max(options.burst_tokens))
    for tokens in options.burst_tokens:
        for memory in options.host_memory:
            burst = Burst(tokens, options.burst_conversations, options.burst_rounds, memory)
            with console.status(f"bursts of {tokens} tokens"):
                result["bursts"].append(scheduler_burst.run(burst, shape, options.profile, kv))
    yield _burst_table(result["bursts"], decode_ms)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = read_options(arguments)
    logging.getLogger("sglang").setLevel(logging.ERROR)
    console = Console()
    shape = Shape() if options.model is None else Shape.of(options.model)
    try:
        result = facts(options, shape, console)
        if result["decode_ms"] is not None:
            console.print(f"a decode step: {result['decode_ms']:.1f} ms")
        for table in measure(options, shape, result, console):
            console.print(table)
            if options.json:
                options.json.write_text(json.dumps(result, indent=1) + "\n")
    except (OSError, ValueError, ServerFailedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, core in result["cores"].items():
        console.print(f"{name}: tree core {core}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
