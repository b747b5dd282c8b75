"""What a live server's restores cost: top-1 agreement with a run that was never evicted.

    python benchmarks/quality.py --collect held_out.jsonl
    python benchmarks/live_quality.py --model DIR --conversations held_out.jsonl --json live.json

The KV pool holds one conversation. Each is computed once with nothing cached, which is the
reference; the next one evicts it; when all have passed, each comes back: its history is
restored, and the tokens after it are computed on that. Both times the server reports the
likeliest token at every position of the continuation. The ratio is the server's own,
checked against the sealed bytes in its ledger.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from krul_sglang.live_server import LiveServer, ServerFailedError, faster_cpu_dtype, has_gpu
from krul_sglang.profile.conversations import chat_ids
from krul_sglang.profile.locate import ensure
from krul_sglang.quality.measure import read_conversations


def likeliest(server: LiveServer, ids: Sequence[int], history: int) -> dict[str, Any]:
    """Per token after ``history``: its log-probability, and the likeliest one in its place."""
    answer = server.post(
        "/generate",
        {
            "input_ids": list(ids),
            "sampling_params": {"temperature": 0, "max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": history - 1,
            "top_logprobs_num": 1,
        },
    )
    meta = answer["meta_info"]
    rows = [row for row in meta["input_top_logprobs"] if row]
    return {
        "top": [row[0][1] for row in rows] + answer["output_ids"][:1],
        "logprob": [row[0] for row in meta["input_token_logprobs"] if row[0] is not None],
        "restored": (meta.get("cached_tokens_details") or {}).get("host", 0),
    }


def sealed(server: LiveServer) -> dict[str, Any]:
    """The krul block, once nothing waits to be encoded. Raises OSError when that never comes:
    what could not be encoded stays in staging."""
    deadline = time.monotonic() + 120
    while (state := server.krul())["memory"]["staging"]:
        if time.monotonic() > deadline:
            raise OSError("the server does not finish encoding; see its log")
        time.sleep(0.1)  # between two questions over HTTP
    return state


def run(server: LiveServer, prompts: Sequence[Sequence[int]], history: int) -> dict[str, Any]:
    """Both passes over all prompts; the figures."""
    passes: list[list[dict[str, Any]]] = []
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("conversations", total=2 * len(prompts))
        for _ in range(2):
            passes.append([])
            for ids in prompts:
                passes[-1].append(likeliest(server, ids, history))
                bar.advance(task)
            state = sealed(server)
    rows = []
    for first, again in zip(*passes, strict=True):
        same = [a == b for a, b in zip(first["top"], again["top"], strict=True)]
        delta = [a - b for a, b in zip(first["logprob"], again["logprob"], strict=True)]
        rows.append(
            {
                "restored": again["restored"],
                "top1": statistics.mean(same),
                "nll_delta": statistics.mean(delta),
            }
        )
    return {
        "top1": statistics.mean(row["top1"] for row in rows),
        "nll_delta": statistics.mean(row["nll_delta"] for row in rows),
        "restored_least": min(row["restored"] for row in rows),
        "conversations": rows,
        "krul": state,
    }


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--conversations", type=Path, required=True)
    parser.add_argument("--policy", default="predictive")
    parser.add_argument("--budget", default="0.01")
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--history", type=int, default=1000)
    parser.add_argument("--continuation", type=int, default=120)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console(highlight=False)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    length = options.history + options.continuation
    texts = read_conversations(options.conversations)
    prompts = [chat_ids(tokenizer, [dict(m) for m in t.messages], answer=False) for t in texts]
    prompts = [ids[:length] for ids in prompts if len(ids) >= length]
    if len(prompts) < 2:
        print(f"error: fewer than two conversations of {length} tokens", file=sys.stderr)
        return 2
    dtype = "auto" if has_gpu() else faster_cpu_dtype()
    flags = ["--enable-krul", "--krul-policy", options.policy, "--dtype", dtype]
    flags += ["--max-total-tokens", str(length + 64), "--krul-quality-budget", options.budget]
    if options.policy == "predictive":
        profile = options.profile or ensure(options.model, 1, console.print)
        flags += ["--krul-profile", str(profile.absolute())]
    try:
        with LiveServer(options.model, flags) as server:
            figures = run(server, prompts, options.history)
    except (ServerFailedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    krul = figures["krul"]
    console.print(
        f"{len(prompts)} conversations on a live server, {options.policy}, {dtype}: at least "
        f"{figures['restored_least']} of {options.history} tokens restored; top-1 agreement "
        f"{figures['top1']:.1%}, NLL {figures['nll_delta']:+.4f}; ratio {krul['ratio']:.2f}x of "
        f"{dtype} rows, {krul['fallbacks']} of {krul['segments']} segments lossless by fallback; "
        f"stored {krul['stored_bytes']:,} bytes, sealed in the ledger {krul['memory']['tier']:,}"
    )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
