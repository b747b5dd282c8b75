"""Does choosing per conversation pay? Ways to choose, all with one codec at equal bytes.

    python benchmarks/selection.py --model DIR --conversations held_out.jsonl --json out.json

Every way stores a history in the bytes that `predictive` takes for it at the budget; the step
is sought until it does. So only the divergence differs, and only by what is chosen:

- ``attention``: token classes from K, V and the attention measured (the server's default)
- ``profile``: token classes from K and V alone, by the profile (what needs no measurement)
- ``flat``: no token classes, one step for all
- ``shuffled``: the classes of ``attention``, dealt to other tokens (control)
- ``recent``: as many tokens of each class, the latest first
- ``attention, one for all layers``: the mean level of all layers in each
- ``fixed`` and ``paper``: the upper layer of each pair stored as its prediction, of MiniCache's
  fixed pairs and of those the paper's selection finds; token classes by the profile
- ``random pairs``: as many pairs of neighbours at random
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from krul_sglang.codec.base import KVRun
from krul_sglang.codec.layout import FACTORS
from krul_sglang.codec.predictive import PredictiveCodec, _given_levels, _judge
from krul_sglang.profile.conversations import chat_ids
from krul_sglang.profile.locate import ensure, load_ranks
from krul_sglang.quality.forward import (
    attention_rows,
    continuation_logits,
    divergence,
    history_kv,
    load_model,
)
from krul_sglang.quality.measure import read_conversations, spec_of
from krul_sglang.similarity.estimate import codes_of_maps
from krul_sglang.similarity.layers import similarity_of_maps
from krul_sglang.similarity.levels import codes_of
from krul_sglang.strategy.base import SINKS, Strategy
from krul_sglang.strategy.fixed import fixed_pairs
from krul_sglang.strategy.paper import select_pairs

HISTORY, CONTINUATION = 1000, 120
CLOSE = 0.003
"""How far from the bytes wanted a payload may be."""


def classes_of(codec: PredictiveCodec, run: KVRun, attention: bytes) -> torch.Tensor:
    """``[layers, tokens]`` the classes the encoder gives, sinks included."""
    layers, tokens = run.k.shape[:2]
    tables = codec.profile.rope.tables(0, tokens)
    levels = _given_levels(attention, layers, tokens)
    out = []
    for layer, maps in enumerate(codec.profile.layers):
        k = codec.profile.rope.undo(run.k[layer].float(), tables)
        x = torch.cat([k.flatten(1), run.v[layer].float().flatten(1)], 1)
        own = None if levels is None else levels[layer]
        out.append(torch.from_numpy(_judge(x, maps, own)))
    return torch.stack(out)


def strategies(
    codec: PredictiveCodec, run: KVRun, maps: torch.Tensor, seed: int
) -> dict[str, Strategy]:
    """What each way of choosing comes to for this history."""
    layers, tokens = run.k.shape[:2]
    plain = Strategy("predictive")
    codes = codes_of_maps(maps, SINKS)
    attention = codes.numpy().tobytes()
    classes = classes_of(codec, run, attention)
    gen = torch.Generator().manual_seed(seed)
    shuffled = torch.stack([own[torch.randperm(tokens, generator=gen)] for own in classes])
    recent = torch.stack([own.sort(descending=True)[0] for own in classes])
    mass = maps.mean((1, 2))
    together = codes_of(mass.mean(0, keepdim=True).expand(layers, -1).contiguous(), SINKS)
    fixed = fixed_pairs(layers)
    neighbours = [(i - 1, i) for i in range(1, layers)]
    drawn = random.Random(seed).sample(neighbours, len(fixed))
    paper = select_pairs(similarity_of_maps(maps), len(fixed))

    def given(own: torch.Tensor) -> Strategy:
        return replace(plain, classes=own.to(torch.uint8).contiguous().numpy().tobytes())

    def shared(pairs: Sequence[tuple[int, int]]) -> Strategy:
        return replace(plain, shared=tuple(upper for _, upper in pairs))

    return {
        "attention": replace(plain, attention=attention),
        "attention, one for all layers": replace(plain, attention=together.numpy().tobytes()),
        "profile": plain,
        "flat": given(torch.full_like(classes, FACTORS.index(1.0))),
        "shuffled": given(shuffled),
        "recent": given(recent),
        "fixed": shared(fixed),
        "paper": shared(paper),
        "random pairs": shared(drawn),
    }


def encode_in(encode: Callable[[float], bytes], step: float, wanted: int) -> tuple[bytes, float]:
    """A payload of about ``wanted`` bytes and its step; the nearest found where none is."""
    tried: list[tuple[float, int, bytes]] = []
    for _ in range(7):
        payload = encode(step)
        tried.append((step, len(payload), payload))
        if abs(len(payload) / wanted - 1) < CLOSE:
            break
        slope = -0.6  # of log bytes over log step
        if len(tried) > 1:
            (s0, b0, _), (s1, b1, _) = sorted(tried, key=lambda t: abs(t[1] - wanted))[:2]
            if s0 != s1 and b0 != b1:
                slope = math.log(b1 / b0) / math.log(s1 / s0)
        # Bytes that hardly follow the step would ask for a leap.
        leap = math.log(wanted / len(payload)) / min(slope, -0.1)
        step *= math.exp(max(-1.5, min(1.5, leap)))
    step, _, payload = min(tried, key=lambda t: abs(t[1] - wanted))
    return payload, step


@torch.no_grad()
def compare(model: Any, ids: Sequence[int], codec: PredictiveCodec, budget: float, seed: int):
    """``{way: row}`` for one conversation."""
    history, following = ids[:HISTORY], ids[HISTORY : HISTORY + CONTINUATION]
    k, v = (x.bfloat16() for x in history_kv(model, history))
    full = continuation_logits(model, k, v, following)
    maps = attention_rows(model, history, k, v)
    run = KVRun(k, v, 0)
    step = codec.profile.step_for(budget)
    rows, wanted = {}, 0
    for way, strategy in strategies(codec, run, maps, seed).items():
        encode = lambda step, s=strategy: codec.encode_at(run, s, step)[0]  # noqa: E731
        payload, own_step = (encode(step), step) if not wanted else encode_in(encode, step, wanted)
        wanted = wanted or len(payload)
        layers = list(codec.open(payload).layers(0, HISTORY))
        rk, rv = (torch.stack(list(part)) for part in zip(*layers, strict=True))
        d = divergence(full, continuation_logits(model, rk, rv, following), following)
        rows[way] = {
            "kl": float(d.kl.mean()),
            "top1": float(d.top1.float().mean()),
            "ratio": run.nbytes / len(payload),
            "step": own_step,
        }
    return rows


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    gen = torch.Generator().manual_seed(0)
    x = torch.tensor(values)
    draws = x[torch.randint(len(x), (4000, len(x)), generator=gen)].mean(1)
    return float(draws.quantile(0.025)), float(draws.quantile(0.975))


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per way: mean KL and top-1, ratio, and KL against ``attention``'s on the same texts."""
    out = {}
    for way in found[0]["ways"]:
        rows = [one["ways"][way] for one in found]
        against = [
            math.log(r["kl"] / one["ways"]["attention"]["kl"])
            for r, one in zip(rows, found, strict=True)
        ]
        low, high = interval(against)
        out[way] = {
            "kl": sum(r["kl"] for r in rows) / len(rows),
            "kl_ci95": interval([r["kl"] for r in rows]),
            "top1": sum(r["top1"] for r in rows) / len(rows),
            "ratio": len(rows) / sum(1 / r["ratio"] for r in rows),
            "times_attention": math.exp(sum(against) / len(against)),
            "times_attention_ci95": [math.exp(low), math.exp(high)],
            "worse_than_attention": sum(x > 0 for x in against),
        }
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--conversations", type=Path, required=True)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--budget", type=float, default=0.01)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    path = options.profile or ensure(options.model, 1, print)
    profile = load_ranks(options.model, path, 1)[0]
    model, tokenizer = load_model(options.model)
    codec = PredictiveCodec(spec_of(model), profile)
    console = Console()
    found: list[dict[str, Any]] = []
    for seed, chat in enumerate(track(read_conversations(options.conversations), console=console)):
        ids = chat_ids(tokenizer, [dict(m) for m in chat.messages], answer=False)
        if len(ids) >= HISTORY + CONTINUATION:
            found.append({"id": chat.id, "ways": compare(model, ids, codec, options.budget, seed)})
            if options.json:
                result = {"budget": options.budget, "summary": summary(found), "texts": found}
                options.json.write_text(json.dumps(result, indent=1))
    table = Table(
        "way", "mean KL", "95 %", "top-1", "ratio", "KL against attention", "95 %", "worse in"
    )
    for way, row in summary(found).items():
        low, high = row["kl_ci95"]
        less, more = row["times_attention_ci95"]
        table.add_row(
            way, f"{row['kl']:.5f}", f"{low:.4f} - {high:.4f}", f"{row['top1']:.1%}",
            f"{row['ratio']:.2f}x", f"{row['times_attention']:.2f}", f"{less:.2f} - {more:.2f}",
            f"{row['worse_than_attention']} of {len(found)}",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
