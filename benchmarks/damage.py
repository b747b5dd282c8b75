"""Does the estimate rank the layers as their damage does?

    python benchmarks/damage.py --model DIR --conversations held_out.jsonl --json damage.json
    python benchmarks/damage.py --model DIR --conversations held_out.jsonl --as rounded

For each conversation every layer alone is damaged, all others kept, and the divergence of what
comes next is measured. A layer can be damaged in three ways (--as):

- ``stored``: as the server stores and restores it. Its step is allotted so that layers hurt
  alike, which leaves little to rank.
- ``rounded``: to 4 bits, every layer in the same way: by channel for K, by token for V. So much
  do layers differ before anything is allotted.
- ``dropped``: it becomes what its map makes of the rebuilt layer below.

That is held against what could be known before:

- ``metric``: the layer's squared error in the profile's importance metric
- ``weighted``: the same, each token weighted by its importance from K, V and attention
- ``attention``: total variation between the attention of the history's last queries over the
  original and over the rebuilt keys
- ``prior``: the layer's mean damage in the other conversations
- ``both``: ``attention``, times what the layer's damage is of it in the other conversations

Spearman's rank correlation over the layers, a conversation at a time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # also where PYTHONSAFEPATH is set

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from krul_sglang.codec.base import KVRun
from krul_sglang.codec.predictive import PredictiveCodec, _given_levels
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
from krul_sglang.strategy.base import SINKS, Strategy

HISTORY, CONTINUATION = 1000, 120
WAYS = ("stored", "rounded", "dropped")
MEASURED = ("metric", "weighted", "attention")


def predictions(
    codec: PredictiveCodec,
    restored: Sequence[tuple[torch.Tensor, torch.Tensor]],
    tables: tuple[torch.Tensor, torch.Tensor],
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """K and V ``[tokens, kv_heads, dim]`` of each layer as predicted from the rebuilt one below;
    sink tokens stay as they were restored."""
    profile, below = codec.profile, None
    out = []
    for (k, v), maps in zip(restored, profile.layers, strict=True):
        x = maps.predict(below, torch.arange(len(k)))
        keys = k[0].numel()
        own_k = profile.rope.apply(x[:, :keys].view_as(k), tables)
        own_v = x[:, keys:].reshape(v.shape)
        out.append(tuple(torch.cat([a[:SINKS], b[SINKS:]]) for a, b in ((k, own_k), (v, own_v))))
        below = torch.cat([profile.rope.undo(k, tables).flatten(1), v.flatten(1)], 1)
    return out


def rounded(x: torch.Tensor, dim: int) -> torch.Tensor:
    """``x`` in 15 levels, scaled by its largest entry along ``dim``."""
    scale = (x.abs().amax(dim, keepdim=True) / 7).clamp_min(1e-30)
    return (x / scale).round() * scale


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; ties are not expected."""
    ranks = torch.stack([torch.tensor(x).argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


@torch.no_grad()
def damage(
    model: Any, ids: Sequence[int], codec: PredictiveCodec, budget: float, way: str
) -> dict[str, Any]:
    """Per layer: the divergence measured, and what was estimated."""
    history, following = ids[:HISTORY], ids[HISTORY : HISTORY + CONTINUATION]
    k, v = (x.bfloat16().float() for x in history_kv(model, history))
    full = continuation_logits(model, k, v, following)
    maps = attention_rows(model, history, k, v)
    attention = codes_of_maps(maps, SINKS).numpy().tobytes()
    strategy = Strategy("predictive", budget, attention=attention)
    run = KVRun(k.bfloat16(), v.bfloat16(), 0)
    payload, _ = codec.encode_at(run, strategy, codec.profile.step_for(budget))
    restored = [(a.float(), b.float()) for a, b in codec.open(payload).layers(0, HISTORY)]
    tables = codec.profile.rope.tables(0, HISTORY)
    levels = _given_levels(attention, len(restored), HISTORY)

    def flat(own_k: torch.Tensor, own_v: torch.Tensor) -> torch.Tensor:
        return torch.cat([codec.profile.rope.undo(own_k, tables).flatten(1), own_v.flatten(1)], 1)

    if way == "dropped":
        restored = predictions(codec, restored, tables)
    elif way == "rounded":
        restored = [
            (rounded(own_k, 0), rounded(own_v, 2)) for own_k, own_v in zip(k, v, strict=True)
        ]
    out: dict[str, list[float]] = {name: [] for name in ("kl", *MEASURED)}
    for layer, (own_k, own_v) in enumerate(restored):
        weights = codec.profile.layers[layer]
        x = flat(k[layer], v[layer])
        error = ((flat(own_k, own_v) - x) @ weights.forward).square().sum(1)[SINKS:]
        dim = x.shape[1]
        importance = x @ weights.attended[:dim] + weights.attended[dim:-1] @ levels[layer]
        importance += weights.attended[-1]
        rk, rv = k.clone(), v.clone()
        rk[layer], rv[layer] = own_k, own_v
        logits = continuation_logits(model, rk, rv, following)
        changed = attention_rows(model, history, rk, rv)[layer]
        out["kl"].append(float(divergence(full, logits, following).kl.mean()))
        out["metric"].append(float(error.mean()))
        out["weighted"].append(float((error * importance[SINKS:].exp()).mean()))
        out["attention"].append(float((changed - maps[layer]).abs().sum(-1).mean() / 2))
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--conversations", type=Path, required=True)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--budget", type=float, default=0.01)
    parser.add_argument("--as", dest="way", choices=WAYS, default=WAYS[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.conversations.is_file():
        parser.error(f"--conversations {options.conversations}: no such file")
    path = options.profile or ensure(options.model, 1, print)
    model, tokenizer = load_model(options.model)
    codec = PredictiveCodec(spec_of(model), load_ranks(options.model, path, 1)[0])
    console, found = Console(), []
    for chat in track(read_conversations(options.conversations), console=console):
        ids = chat_ids(tokenizer, [dict(m) for m in chat.messages], answer=False)
        if len(ids) >= HISTORY + CONTINUATION:
            found.append({"id": chat.id, **damage(model, ids, codec, options.budget, options.way)})
    if not found:
        raise ValueError(
            f"--conversations {options.conversations}: none has {HISTORY + CONTINUATION} tokens"
        )
    kl = torch.tensor([one["kl"] for one in found])
    variation = torch.tensor([one["attention"] for one in found])
    for i, one in enumerate(found):
        others = [j for j in range(len(found)) if j != i] or [i]
        prior, expected = kl[others].mean(0), variation[others].mean(0)
        one["prior"] = prior.tolist()
        one["both"] = (variation[i] * prior / expected).tolist()
    table = Table("estimate", "Spearman, mean", "least", "most")
    summary = {}
    for way in (*MEASURED, "prior", "both"):
        values = [spearman(one[way], one["kl"]) for one in found]
        summary[way] = {"mean": sum(values) / len(values), "range": [min(values), max(values)]}
        table.add_row(
            way, f"{summary[way]['mean']:.2f}", f"{min(values):.2f}", f"{max(values):.2f}"
        )
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps({"summary": summary, "conversations": found}, indent=1))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
