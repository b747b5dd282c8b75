"""The topic switches back: does a fact that nobody looked at since survive?

    python benchmarks/recall.py --model DIR --texts held_out.jsonl --json recall.json

A conversation opens with a few codes to remember, goes on about something else for 400 to
2,000 tokens, and then asks for one of them. What the other text attended to decides how finely
tokens are stored, so the codes are stored coarsely. Compared on the question and its answer:
the full cache, ``attention`` (the server's default), ``profile`` and ``flat`` (no token
classes), all three in the same bytes. Only codes that the full cache recalls count for recall;
the answer is right when every digit is the model's first choice.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # also where PYTHONSAFEPATH is set

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from selection import encode_in, interval

from krul_sglang.codec.base import KVRun
from krul_sglang.codec.layout import FACTORS
from krul_sglang.codec.predictive import PredictiveCodec
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

DISTANCES = (400, 700, 1000, 2000)
"""Tokens between the codes and the question."""
PLACES = ("garden", "office", "harbour", "library", "museum", "school", "station", "theatre")
CODES = 3
"""In one conversation."""
LEADS = ("\nThe code of the {} is", "\nOnce more: the code of the {} is")
"""The two ways to ask."""
WAYS = ("attention", "profile", "flat")


def opening(gen: random.Random) -> tuple[str, dict[str, str]]:
    """What is to be remembered, and the code of each place."""
    codes = {place: f"{gen.randrange(100, 1000)}" for place in gen.sample(PLACES, CODES)}
    facts = " ".join(f"The code of the {place} is {code}." for place, code in codes.items())
    return f"Please remember these codes. {facts}", codes


def asked(tokenizer: Any, lead: str, place: str, code: str) -> tuple[list[int], int]:
    """Ids of the question and its answer, and how many of them are the answer.

    As the beginning of the sentence: asked in the words of a chat, SmolLM2-135M recalls none.
    """
    lead = tokenizer(lead.format(place))["input_ids"]
    answer = tokenizer(f" {code}")["input_ids"]
    return [*lead, *answer], len(answer)


@torch.no_grad()
def compare(
    model: Any,
    tokenizer: Any,
    codec: PredictiveCodec,
    filler: Sequence[int],
    seed: int,
    budget: float,
    ways: Sequence[str],
) -> list[dict[str, Any]]:
    """One row a code: KL and whether it was recalled, by way."""
    gen = random.Random(seed)
    text, codes = opening(gen)
    chat = [
        {"role": "user", "content": text},
        {"role": "assistant", "content": "I will remember all of these codes."},
    ]
    ids = [*chat_ids(tokenizer, chat, answer=False), *filler]
    k, v = (x.bfloat16() for x in history_kv(model, ids))
    run = KVRun(k, v, 0)
    attention = codes_of_maps(attention_rows(model, ids, k, v), SINKS).numpy().tobytes()
    plain = Strategy("predictive")
    flat = bytes([FACTORS.index(1.0)]) * len(ids)
    chosen = {
        "attention": replace(plain, attention=attention),
        "profile": plain,
        "flat": replace(plain, classes=flat),
    }
    caches, sizes = {"full": (k, v)}, {}
    step = codec.profile.step_for(budget)
    for way in ways:
        strategy = chosen[way]
        encode = lambda step, s=strategy: codec.encode_at(run, s, step)[0]  # noqa: E731
        if sizes:
            payload, _ = encode_in(encode, step, sizes[ways[0]])
        else:
            payload = encode(step)
        sizes[way] = len(payload)
        layers = list(codec.open(payload).layers(0, run.tokens))
        rk, rv = (torch.stack(list(part)) for part in zip(*layers, strict=True))
        caches[way] = rk, rv
    ratio = {way: run.nbytes / sizes[way] for way in ways}
    rows = []
    for place, code in codes.items():
        recalled: dict[str, list[bool]] = {way: [] for way in caches}
        kl = dict.fromkeys(ways, 0.0)
        for lead in LEADS:
            question, digits = asked(tokenizer, lead, place, code)
            logits = {
                way: continuation_logits(model, rk, rv, question)
                for way, (rk, rv) in caches.items()
            }
            right = torch.tensor(question[-digits:])
            for way, own in logits.items():
                recalled[way].append(bool((own[-digits - 1 : -1].argmax(-1) == right).all()))
            for way in ways:
                own = divergence(logits["full"], logits[way], question).kl.mean()
                kl[way] += float(own) / len(LEADS)
        rows.append({"recalled": recalled, "kl": kl, "ratio": ratio})
    return rows


def recall(rows: Sequence[dict[str, Any]], way: str) -> tuple[int, int]:
    """Answers that are right, and of how many: each code that the full cache recalls, asked in
    one way, counts where it is asked in the other."""
    last = len(LEADS) - 1
    found = [
        row["recalled"][way][last - lead]
        for row in rows
        for lead in range(len(LEADS))
        if row["recalled"]["full"][lead]
    ]
    return sum(found), len(found)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True, help="what is talked about meanwhile")
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--budget", type=float, default=0.01)
    parser.add_argument("--conversations", type=int, default=144)
    parser.add_argument("--first", type=int, default=0, help="number of the first of them")
    parser.add_argument(
        "--ways",
        default=",".join(WAYS),
        help=f"some of {', '.join(WAYS)}, in the first one's bytes",
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    ways = options.ways.split(",")
    if not set(ways) <= set(WAYS):
        raise ValueError(f"--ways {options.ways}: expected some of {', '.join(WAYS)}")
    path = options.profile or ensure(options.model, 1, print)
    model, tokenizer = load_model(options.model)
    codec = PredictiveCodec(spec_of(model), load_ranks(options.model, path, 1)[0])
    texts = [
        chat_ids(tokenizer, [dict(m) for m in chat.messages], answer=False)
        for chat in read_conversations(options.texts)
    ]
    console, found = Console(), []
    seeds = range(options.first, options.first + options.conversations)
    for seed in track(seeds, console=console):
        distance = DISTANCES[seed % len(DISTANCES)]
        fitting = [ids for ids in texts if len(ids) >= distance]
        filler = fitting[seed // len(DISTANCES) % len(fitting)][:distance]
        for row in compare(model, tokenizer, codec, filler, seed, options.budget, ways):
            found.append({"distance": distance, **row})
        if options.json:
            options.json.write_text(
                json.dumps({"budget": options.budget, "cases": found}, indent=1)
            )
    columns = (*(f"recalled, {way}" for way in ("full", *ways)), *(f"KL {w}" for w in ways))
    table = Table("tokens between", "codes", "cases", *columns)
    for distance in (*DISTANCES, None):
        own = [row for row in found if distance in (row["distance"], None)]
        counts = [recall(own, way) for way in ("full", *ways)]
        share = [f"{right} ({right / max(1, cases):.1%})" for right, cases in counts]
        kl = [f"{sum(r['kl'][w] for r in own) / len(own):.5f}" for w in ways]
        table.add_row(str(distance or "all"), str(len(own)), str(counts[0][1]), *share, *kl)
    console.print(table)
    stored = sum(1 / row["ratio"][ways[0]] for row in found) / len(found)
    console.print(f"stored bytes: {1 / stored:.2f} times fewer")
    for way in ways[1:]:
        ratios = [math.log(r["kl"][ways[0]] / r["kl"][way]) for r in found]
        low, high = (math.exp(x) for x in interval(ratios))
        mean = math.exp(sum(ratios) / len(ratios))
        console.print(
            f"KL of {ways[0]} against {way}: {mean:.2f} times (95 %: {low:.2f} - {high:.2f})"
        )


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
