"""Does the loss add up? Ten turns, with an eviction and a restore between all of them.

    python benchmarks/turns.py --model DIR --conversations held_out.jsonl --json turns.json

The conversation's own text is fed turn by turn. One cache is never evicted. The other is
what a server holds: each turn is computed on the restored cache, its new KV is stored as a
segment of its own, and everything comes back from the segments before the next turn.
Segments are never encoded twice. As a control, the exact history is stored and restored
once, just before the turn. Divergence by turn, against the cache that is never evicted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from krul_sglang.codec.base import KVRun, KVSpec
from krul_sglang.codec.registry import make_codec
from krul_sglang.profile.conversations import chat_ids
from krul_sglang.profile.locate import ensure, load_ranks
from krul_sglang.quality.forward import cache_of, divergence, load_model
from krul_sglang.quality.measure import Policy, codec_policy, read_conversations, spec_of
from krul_sglang.strategy.base import Strategy


@torch.no_grad()
def turn(
    model: Any, k: torch.Tensor, v: torch.Tensor, ids: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of ``ids`` fed after the cache ``(k, v)``, and the ids' own k and v, in the
    cache's layout, float32. The cache may be empty (no tokens) and is left as it is."""
    cache = cache_of(k, v)
    out = model(torch.tensor([list(ids)]), past_key_values=cache, use_cache=True)
    own: list[Any] = list(cache.layers)
    new_k = torch.stack([layer.keys[0, :, k.shape[1] :].transpose(0, 1) for layer in own])
    new_v = torch.stack([layer.values[0, :, k.shape[1] :].transpose(0, 1) for layer in own])
    return out.logits[0], new_k, new_v


def follow(
    model: Any, spec: KVSpec, ids: list[int], turns: int, policy: Policy
) -> list[dict[str, float]]:
    """KL (nats), the control's KL, top-1 agreement and ratio, from the second turn on."""
    size = len(ids) // (turns + 1)
    empty = torch.empty(spec.layers, 0, spec.kv_heads, spec.head_dim, dtype=torch.bfloat16)
    full, restored = (empty, empty), (empty, empty)
    stored, rows = 0, []
    for number in range(turns + 1):
        new = ids[number * size : (number + 1) * size]
        exact, k, v = turn(model, *full, new)
        if number:
            back = policy(KVRun(*full, 0))
            once = divergence(exact, turn(model, back.k, back.v, new)[0], new).kl
        full = torch.cat([full[0], k.bfloat16()], 1), torch.cat([full[1], v.bfloat16()], 1)
        lossy, k, v = turn(model, *restored, new)
        if number:
            d = divergence(exact, lossy, new)
            raw = 2 * 2 * restored[0].numel()
            row = {"kl": float(d.kl.mean()), "once": float(once.mean()), "ratio": raw / stored}
            rows.append({**row, "top1": float(d.top1.float().mean())})
        back = policy(KVRun(k.bfloat16(), v.bfloat16(), number * size))
        stored += back.stored_bytes
        restored = torch.cat([restored[0], back.k], 1), torch.cat([restored[1], back.v], 1)
    return rows


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--conversations", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=1320, help="of a conversation, all turns")
    parser.add_argument("--budget", type=float, default=0.01)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console(highlight=False)
    path = options.profile or ensure(options.model, 1, console.print)
    (profile,) = load_ranks(options.model, path, 1)
    model, tokenizer = load_model(options.model)
    spec = spec_of(model)
    codec = make_codec("predictive", spec, profile)
    policy = codec_policy(codec, Strategy("predictive", options.budget))
    found = []
    for text in track(read_conversations(options.conversations), console=Console(stderr=True)):
        ids = chat_ids(tokenizer, [dict(m) for m in text.messages], answer=False)[: options.tokens]
        if len(ids) == options.tokens:
            found.append({"id": text.id, "turns": follow(model, spec, ids, options.turns, policy)})
    if not found:
        print(f"error: no conversation of {options.tokens} tokens", file=sys.stderr)
        return 2
    table = Table(title=f"{len(found)} conversations, budget {options.budget:g} nats")
    for column in ("turn", "mean KL", "against the first", "stored once", "top-1", "ratio"):
        table.add_column(column, justify="right")
    means = [
        {key: sum(f["turns"][t][key] for f in found) / len(found) for key in found[0]["turns"][t]}
        for t in range(options.turns)
    ]
    for number, row in enumerate(means, 1):
        table.add_row(
            str(number),
            f"{row['kl']:.5f}",
            f"{row['kl'] / means[0]['kl']:.2f}",
            f"{row['once']:.5f}",
            f"{row['top1']:.1%}",
            f"{row['ratio']:.2f}x",
        )
    console.print(table)
    if options.json:
        figures = {"budget": options.budget, "turns": means, "conversations": found}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
