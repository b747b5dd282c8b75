"""Time to first token when a conversation comes back, against what else brings it back.

    python benchmarks/restore.py --model DIR --json restore.json
    python benchmarks/restore_report.py restore.json DIR

Live servers hold two conversations in a KV pool with room for one, so that each is evicted by
the other and returns with a new turn. The time is taken at the client, over streaming HTTP.
Policies take turns, request by request; a request whose counters do not show what its policy
is about (nothing left on the device, all of the history kept) is an error and no number.

The file is written after every cell. The same command continues it: cells that are in it are
not measured again.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import json
import os
import platform
import signal
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))

import texts
from restore_cells import P99_REPEATS, UNTHROTTLED, Bandwidth, Cell, Results
from restore_peers import KRUL, POLICIES, krul_settings, usual_dtype
from restore_plan import Plan, Prompts
from restore_run import Benchmark

from krul_sglang.config import KrulConfig, KrulConfigError
from krul_sglang.live_server import has_gpu
from krul_sglang.profile.base import ProfileError
from krul_sglang.profile.conversations import chat_ids
from krul_sglang.profile.locate import ensure

HISTORIES = "512,1024,2048,4096,7000"
BANDWIDTHS = "unthrottled,4*balanced,balanced,balanced/4"
PACKAGES = ("sglang", "torch", "transformers", "krul-sglang")


def read_prompts(model: Path, longest: int, turn: int, turns: int) -> Prompts:
    """Two conversations of ``longest`` tokens and ``turns`` new turns of ``turn`` tokens: chats
    between people, put one behind the other until they are long enough.

    Each has a system prompt of its own: a shared one would stay on the device, and computing
    from a cached prefix on takes CPU attention more than twice as long as from the beginning,
    which `recompute` would pay for.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    chats = islice(texts.chats(), texts.CHATS[-1], None)

    def take(tokens: int, name: str) -> list[int]:
        messages = [{"role": "system", "content": f"{name} wants to chat."}]
        ids: list[int] = []
        while len(ids) < tokens:
            chat = next(chats, None)
            if chat is None:
                raise ValueError("there are not as many chats as turns: fewer --repeats")
            messages += chat["messages"]
            ids = chat_ids(tokenizer, messages, answer=False)
        return ids[:tokens]

    conversations = [take(longest, name) for name in ("Alice", "Robert")]
    rest = take((1 + turns) * turn, "Somebody")[turn:]
    slices = [rest[at : at + turn] for at in range(0, len(rest), turn)]
    return Prompts(conversations, slices)


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, cores, bytes of memory, accelerator."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    gpu = None
    if has_gpu():
        import torch

        gpu = torch.cuda.get_device_name()
    memory = round(psutil.virtual_memory().total / 1e9) * 10**9
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_bytes": memory, "gpu": gpu}


def versions() -> dict[str, str]:
    """Of everything that is measured."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found}


def _names(text: str, known: tuple[str, ...]) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"policy {name!r}: expected one of {', '.join(known)}{hint}")
    return names


def read_plan(options: argparse.Namespace) -> Plan:
    """Checked options. Raises ValueError (KrulConfigError, ProfileError) with one line."""
    if not (options.model / "config.json").is_file():
        raise ValueError(f"no model in {options.model}; run `make model`")
    config = json.loads((options.model / "config.json").read_text())
    policies = _names(options.policies, POLICIES)
    try:
        histories = [int(text) for text in options.histories.split(",")]
    except ValueError:
        raise ValueError(f"--histories {options.histories}: expected numbers of tokens") from None
    longest = config["max_position_embeddings"] - options.turn - options.answer
    for history in histories:
        if not 64 <= history <= longest:
            raise ValueError(f"history {history}: expected 64 to {longest} tokens for this model")
    for name in ("repeats", "turn", "answer"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}: expected at least 1")
    if options.p99_repeats < P99_REPEATS:
        raise ValueError(f"--p99-repeats {options.p99_repeats}: expected at least {P99_REPEATS}")
    if options.dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {options.dtype}: expected float32, bfloat16 or float16")
    profile = options.profile
    if profile is not None and not profile.is_file():
        raise ValueError(f"--profile {profile}: no such file")
    for policy in policies:
        if policy in KRUL:
            needed = KrulConfig.from_values(krul_settings(policy, options.recompute, None))
            if needed.needs_profile and profile is None:
                profile = ensure(options.model, 1, print)
    bandwidths = [Bandwidth.parse(text.strip()) for text in options.bandwidths.split(",")]
    p99_cells = [Cell.parse(text) for text in options.p99_cell]
    names = {UNTHROTTLED.name, *(bandwidth.name for bandwidth in bandwidths)}
    for text, cell in zip(options.p99_cell, p99_cells, strict=True):
        if not (cell.policy in policies and cell.history in histories and cell.bandwidth in names):
            raise ValueError(f"--p99-cell {text}: not among what is measured")
    return Plan(
        model=options.model,
        dtype=options.dtype or usual_dtype(),
        profile=profile,
        recompute=options.recompute,
        longest=longest,
        histories=histories,
        bandwidths=bandwidths,
        policies=policies,
        repeats=options.repeats,
        turn=options.turn,
        answer=options.answer,
        alive=options.alive,
        p99_cells=p99_cells,
        p99_repeats=options.p99_repeats,
    )


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True, help="written, or continued")
    parser.add_argument("--histories", default=HISTORIES, help=f"tokens; default {HISTORIES}")
    parser.add_argument(
        "--bandwidths",
        default=BANDWIDTHS,
        help="what brings stored bytes back: `unthrottled`, a rate such as 16MB/s, or balanced, "
        "balanced/4, 4*balanced, where balanced is the rate at which a history's raw KV arrives "
        "in this run's median time of recomputing it; default " + BANDWIDTHS,
    )
    names = ",".join(POLICIES)
    parser.add_argument("--policies", default=names, help=f"default {names}")
    parser.add_argument("--repeats", type=int, default=5, help="of a cell; default 5")
    parser.add_argument(
        "--p99-cell",
        action="append",
        default=[],
        metavar="POLICY:HISTORY:BANDWIDTH",
        help="a cell with --p99-repeats repeats; may be given again",
    )
    parser.add_argument("--p99-repeats", type=int, default=P99_REPEATS, help="at least 100")
    parser.add_argument(
        "--recompute",
        default="auto",
        help="--krul-recompute of the policies that may recompute: "
        + ", ".join(name for name, (_, may) in KRUL.items() if may)
        + "; default auto",
    )
    parser.add_argument("--profile", type=Path, help="default: the one in the user's cache folder")
    parser.add_argument("--dtype", help="of model and KV; default: what this machine does faster")
    parser.add_argument("--turn", type=int, default=64, help="new tokens; default 64")
    parser.add_argument("--answer", type=int, default=16, help="tokens generated; default 16")
    parser.add_argument(
        "--alive", type=int, help="servers side by side besides recompute; default: what fits"
    )
    return parser.parse_args()


def main() -> int:
    """Command line; returns the exit code."""
    options = read_options()
    console = Console(stderr=True)
    try:
        plan = read_plan(options)
        facts = {"machine": machine(), "versions": versions(), "settings": plan.settings()}
        results = Results(options.json, facts)
        # The model's longest: a file may be continued with other histories.
        prompts = read_prompts(plan.model, plan.longest, plan.turn, plan.turns)
        benchmark = Benchmark(plan, results, prompts, console)
        benchmark.run()
    except (ValueError, OSError, KrulConfigError, ProfileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if benchmark.failures:
        print(f"error: {benchmark.failures} cells failed; run again for them", file=sys.stderr)
    return 1 if benchmark.failures else 0


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    for name in (signal.SIGINT, signal.SIGTERM):  # a background shell ignores the first
        signal.signal(name, _stop)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
