"""The remote tier: how fast it brings bytes, and what that is worth to a returning conversation.

    python benchmarks/remote.py --model DIR --json remote.json
    python benchmarks/remote.py --model DIR --remote redis://HOST:6379/9 --history 4096

rate: entries of one conversation are brought by a pull (looked up, fetched, checked) and, in
turns, by a plain GET of each of the same keys through the same client library.

turns: one server computes, evicts and sends conversations of random tokens. Another, which has
never seen them, then answers their next turn, and in turns with these, turns of conversations
that nobody has seen and that it has to compute. All other memory of both is their own.

Without --remote a server of redis-server's is started on this machine, in memory only. With it,
keys of a fingerprint of its own are written to the server given, and removed at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import redis
from restore import machine, versions
from rich.console import Console
from rich.table import Table

from krul_sglang.config import KrulConfigError, parse_remote
from krul_sglang.live_server import LiveServer, ServerFailedError, free_port
from krul_sglang.store.disk.entry import Namespace
from krul_sglang.store.ledger import Ledger
from krul_sglang.store.remote.address import parse_address
from krul_sglang.store.remote.pull import Pull, Stage
from krul_sglang.store.remote.tier import RemoteTier
from krul_sglang.store.segment import Origin, Segment, SegmentState

FINGERPRINT = b"remote benchmark"
SEGMENT_TOKENS, NEW_TOKENS = 1024, 16
PARTS = ("rate", "turns")


@contextlib.contextmanager
def own_server() -> Iterator[str]:
    """A server on this machine; yields its URL. Raises OSError where there is none."""
    binary = shutil.which("redis-server") or shutil.which("valkey-server")
    if binary is None:
        raise OSError("no redis-server or valkey-server here; install one or give --remote URL")
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        command = [
            binary,
            "--port",
            str(port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--dir",
            folder,
        ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            url = f"redis://127.0.0.1:{port}/0"
            client = redis.Redis.from_url(url)
            for _ in range(100):
                with contextlib.suppress(redis.ConnectionError):
                    client.ping()
                    break
                time.sleep(0.05)
            yield url
        finally:
            process.kill()
            process.wait()


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


# ---- the rate ----------------------------------------------------------------------------


def measure_rate(url: str, entry_bytes: int, entries: int, repeats: int) -> dict[str, Any]:
    """Megabytes a second of pulls and of plain GETs of the same keys."""
    tier = RemoteTier(url, FINGERPRINT)
    tier.serve(Ledger(1 << 40))
    client = redis.Redis.from_url(parse_address(url).url)
    pattern = f"krul:1:{FINGERPRINT.hex()}:*"
    ids = np.random.default_rng(1).integers(0, 1 << 16, entries * SEGMENT_TOKENS)
    noise = np.random.default_rng(2)
    try:
        for n in range(entries):
            start, stop = n * SEGMENT_TOKENS, (n + 1) * SEGMENT_TOKENS
            segment = Segment(
                n, stop - start, start, None, True, entry_bytes, stop - start, SegmentState.SEALED
            )
            segment.codec = "lossless"
            tier.offer(segment, noise.bytes(entry_bytes), Origin(Namespace(), ids[:stop], 0))
        if not tier.wait_sent(120) or tier.stats.sent != entries:
            raise OSError(f"{parse_address(url).shown} did not take the entries: {tier.degraded}")
        keys = sorted(client.scan_iter(f"{pattern}:kv:*"))
        pulls, gets, looks, nbytes = [], [], [], 0
        cpu: dict[str, list[float]] = {"pull": [], "get": []}
        for n in range(repeats):
            unknown = np.random.default_rng(100 + n).integers(0, 1 << 16, 2048)
            began = time.perf_counter()
            one = Pull(Namespace(), unknown, (0,), 0, worth=120)
            tier.look(one)
            one.wait(Stage.OVER, timeout=60)
            looks.append(1e3 * (time.perf_counter() - began))
            began, worked = time.perf_counter(), time.process_time()
            nbytes = sum(len(client.get(key)) for key in keys)
            gets.append(nbytes / (time.perf_counter() - began) / 1e6)
            cpu["get"].append(1e9 * (time.process_time() - worked) / nbytes)
            began, worked = time.perf_counter(), time.process_time()
            one = Pull(Namespace(), ids, (0,), 0, worth=120)
            tier.look(one)
            one.wait(Stage.FOUND, Stage.OVER, timeout=60)
            tier.fetch(one)
            one.wait(Stage.OVER, timeout=120)
            pulls.append(one.nbytes / (time.perf_counter() - began) / 1e6)
            cpu["pull"].append(1e9 * (time.process_time() - worked) / nbytes)
            if one.nbytes != nbytes:
                raise OSError(f"only {one.nbytes} of {nbytes} bytes came: {tier.stats.totals()}")
    finally:
        for key in client.scan_iter(pattern):
            client.delete(key)
        tier.close()
    quotient = [pull / get for pull, get in zip(pulls, gets, strict=True)]
    return {
        "entries": entries,
        "bytes": nbytes,
        "look_up_ms": spread(looks),
        "pull_mb_s": spread(pulls),
        "get_mb_s": spread(gets),
        "pull_by_get": spread(quotient),
        "pull_cpu_ms_a_mb": spread(cpu["pull"]),
        "get_cpu_ms_a_mb": spread(cpu["get"]),
    }


# ---- returning conversations -----------------------------------------------------------------


def talk(seed: int, tokens: int) -> list[int]:
    """A conversation of random tokens."""
    rng = random.Random(seed)
    return [rng.randrange(500, 40_000) for _ in range(tokens)]


def measure_turns(
    model: Path, url: str, history: int, repeats: int, policy: str, profile: Path | None
) -> dict[str, Any]:
    """Seconds to the first token of a turn, its history brought or computed."""
    flags = ["--enable-krul", "--krul-policy", policy, "--krul-remote", url]
    flags += ["--dtype", "float32", "--max-total-tokens", str(history + 512)]
    flags += [] if profile is None else ["--krul-profile", str(profile.resolve())]
    warm = repeats  # one more of each to warm up with
    with LiveServer(model, flags) as first:
        for n in range(repeats + 1):
            first.generate(talk(n, history), 1)
        first.generate(talk(-1, history), 1)
        until = time.monotonic() + 300
        while first.krul()["evicted_tokens"] < (repeats + 1) * history or _busy(first):
            if time.monotonic() > until:
                raise OSError(f"the conversations were not sent: {first.krul()['remote']}")
            time.sleep(0.1)
        sent = first.krul()["remote"]
    rows = []
    with LiveServer(model, flags) as second:
        for n in (warm, *range(repeats)):
            for how, seed in (("brought", n), ("computed", 1000 + n)):
                body = [*talk(seed, history), *talk(2000 + n, NEW_TOKENS)]
                began = time.perf_counter()
                answer = second.generate(body, 1)
                seconds = time.perf_counter() - began
                details = answer["meta_info"].get("cached_tokens_details") or {}
                if n != warm:
                    rows.append({"how": how, "seconds": seconds, "host": details.get("host", 0)})
        state = second.krul()
    seconds = {
        how: spread([row["seconds"] for row in rows if row["how"] == how])
        for how in ("brought", "computed")
    }
    return {
        "history": history,
        "new": NEW_TOKENS,
        "policy": policy,
        "repeats": repeats,
        "seconds": seconds,
        "restored_tokens": [row["host"] for row in rows if row["how"] == "brought"],
        "sent_bytes_a_conversation": sent["sent_bytes"] / max(1, repeats + 1),
        "link_bytes_per_second": state["restore"]["cost"]["link_bytes_per_second"].get("remote"),
        "remote": state["remote"],
        "rows": rows,
    }


def _busy(server: LiveServer) -> bool:
    state = server.krul()
    return bool(state["segments"] - state["sealed_segments"] + state["remote"]["waiting"])


# ---- the report ------------------------------------------------------------------------------


def show(out: Console, results: dict[str, Any]) -> None:
    """The tables."""
    if "rate" in results:
        rate = results["rate"]
        table = Table("", "median MB/s", "least", "most", "client's CPU, ms a MB", box=None)
        for name, key in (("pull", "pull"), ("plain GET", "get")):
            own, worked = rate[f"{key}_mb_s"], rate[f"{key}_cpu_ms_a_mb"]["median"]
            figures = (f"{own[k]:.0f}" for k in ("median", "min", "max"))
            table.add_row(name, *figures, f"{worked:.1f}")
        out.print(f"{rate['entries']} entries, {rate['bytes'] / 1e6:.0f} MB")
        out.print(table)
        own = rate["look_up_ms"]
        out.print(
            f"looking up 2,048 tokens that nobody stored: {own['median']:.1f} ms "
            f"({own['min']:.1f} - {own['max']:.1f})"
        )
    if "turns" in results:
        turns = results["turns"]
        table = Table("the history is", "median s", "least", "most", box=None)
        for how, own in turns["seconds"].items():
            table.add_row(how, *(f"{own[k]:.2f}" for k in ("median", "min", "max")))
        out.print(
            f"{turns['history']} tokens and {turns['new']} new, {turns['policy']}, "
            f"{turns['sent_bytes_a_conversation'] / 1e6:.2f} MB a conversation"
        )
        out.print(table)


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--profile", type=Path, help="by default the user's cache folder has it")
    parser.add_argument("--remote", help="URL of a server; by default one is started here")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--history", type=int, default=2048)
    parser.add_argument("--policy", default="predictive")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--entry-bytes", type=int, default=1 << 20)
    parser.add_argument("--entries", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    parts = options.parts.split(",")
    if not set(parts) <= set(PARTS):
        print(
            f"error: --parts={options.parts}: expected some of {','.join(PARTS)}", file=sys.stderr
        )
        return 2
    results: dict[str, Any] = {"machine": machine(), "versions": versions()}
    try:
        given = contextlib.nullcontext(parse_remote(options.remote)) if options.remote else None
        with given or own_server() as url:
            if "rate" in parts:
                results["rate"] = measure_rate(
                    url, options.entry_bytes, options.entries, options.repeats
                )
            if "turns" in parts:
                results["turns"] = measure_turns(
                    options.model,
                    url,
                    options.history,
                    options.repeats,
                    options.policy,
                    options.profile,
                )
    except (OSError, ValueError, KrulConfigError, ServerFailedError, redis.RedisError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(Console(), results)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
