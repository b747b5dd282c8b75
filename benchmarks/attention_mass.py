"""Time and memory of the attention-mass op beside the full rows x keys map.

    python benchmarks/attention_mass.py --keys 16384 --rows 64 --out mass.json

Both run in turn, in one process, on the GPU if there is one; their results are compared first.
Prints one JSON object; times in milliseconds, sizes in bytes.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from krul_kernels.attention_mass import window_attention_mass

Mass = Callable[[], torch.Tensor]


def full_map(
    q: torch.Tensor, pool: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Mass ``[keys, kv_heads]`` from the whole softmax, in float32."""
    keys = pool[slots].float()
    queries = q.float().unflatten(1, (keys.shape[1], -1)) * q.shape[2] ** -0.5
    logits = torch.einsum("rhgd,khd->rhgk", queries, keys)
    hidden = torch.arange(len(keys), device=q.device) > positions[:, None]
    return logits.masked_fill_(hidden[:, None, None], -torch.inf).softmax(3).sum((0, 2)).T


def milliseconds(run: Mass, device: str) -> float:
    began = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1000


def peak_bytes(run: Mass, device: str) -> int:
    """The most that torch's allocator held at once above what it held before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, default=8192, help="tokens of the conversation")
    parser.add_argument("--rows", type=int, default=64, help="query rows: the last tokens")
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=10, help="timed runs of each")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    pool = torch.randn(args.keys + 64, args.kv_heads, args.dim, dtype=dtype, device=device)
    q = torch.randn(args.rows, args.heads, args.dim, dtype=dtype, device=device)
    slots = torch.randperm(len(pool), device=device)[: args.keys].int()
    positions = torch.arange(args.keys - args.rows, args.keys, device=device).int()
    one = torch.ones(1, dtype=torch.int32, device=device)
    starts = torch.tensor([0, 1], dtype=torch.int32, device=device)

    def op() -> torch.Tensor:
        mass, _ = window_attention_mass(
            q,
            starts * args.rows,
            pool.unsqueeze(1),
            starts * args.keys,
            slots,
            one,
            positions,
            total_kv=args.keys,
        )
        return mass

    def naive() -> torch.Tensor:
        return full_map(q, pool, slots, positions)

    error = float((op() - naive()).abs().max())
    if error > 1e-3:
        raise SystemExit(f"error: the op and the full map differ by {error}")
    times: dict[str, list[float]] = {"op": [], "full_map": []}
    for _ in range(args.repeats):  # in turn, so that a disturbance meets both
        for name, run in (("op", op), ("full_map", naive)):
            times[name].append(milliseconds(run, device))

    settings = {k: v for k, v in vars(args).items() if k != "out"}
    report: dict[str, object] = {
        **settings,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "largest_difference": error,
        "bytes_of_keys": args.keys * args.kv_heads * args.dim * dtype.itemsize,
        "bytes_of_map": args.rows * args.heads * args.keys * 4,
    }
    for name, run in (("op", op), ("full_map", naive)):
        report[name] = {
            "median_ms": round(statistics.median(times[name]), 3),
            "min_ms": round(min(times[name]), 3),
            "max_ms": round(max(times[name]), 3),
            "peak_bytes": peak_bytes(run, device),
        }
    text = json.dumps(report, indent=2)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
