"""What a restored cache costs in quality, and what it saves: policies and baselines.

    python benchmarks/quality.py --collect held_out.jsonl --prose DIR
    python benchmarks/quality.py --model DIR --collect-unlike unlike.jsonl
    python benchmarks/quality.py --model DIR --profile FILE --conversations held_out.jsonl \
        --policies predictive,predictive@0.002,lossless,int4,raw_share --json out.json

Policies are the package's codecs (``codec@budget`` for a budget of its own), ``fixed`` and
``paper`` (our reimplementations of MiniCache's layer pairs and of the Krul paper's
selection, both merged as in MiniCache), ``paper_predictive`` (that selection with the
predictive codec, also with ``@budget``) and the baselines below, which are what the field
compares with and no part of the package.
"""

from __future__ import annotations

import argparse
import base64
import importlib
import inspect
import json
import random
import sys
from pathlib import Path

import torch

from krul_sglang.codec.base import KVRun, KVSpec
from krul_sglang.codec.predictive import PredictiveCodec
from krul_sglang.profile.base import Profile
from krul_sglang.profile.file import load_profile
from krul_sglang.quality.forward import load_model
from krul_sglang.quality.measure import (
    Policy,
    Restored,
    is_held_out,
    measure,
    package_policies,
    read_conversations,
    selecting_policy,
    spec_of,
)
from krul_sglang.strategy.base import Strategy
from krul_sglang.strategy.pairs import fixed_pairs

LOCALES = ["fr_FR", "de_DE", "ru_RU", "zh_CN", "ar_AA", "el_GR", "ja_JP", "pl_PL", "he_IL", "th_TH"]
MODULES = ("argparse", "dataclasses", "socketserver", "tarfile", "zipfile", "pickle", "ast", "uuid")


def _grid(x: torch.Tensor, dim: int, levels: int) -> tuple[torch.Tensor, int]:
    """``x`` rounded to ``levels`` per slice along ``dim``, and the bytes of its scales."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    low, scale = low.half().float(), ((high - low) / (levels - 1)).half().float().clamp_min(1e-8)
    return ((x - low) / scale).round().clamp(0, levels - 1) * scale + low, low.numel() * 4


def _quantize(run: KVRun, bits: int, group: int) -> Restored:
    """K per channel over ``group`` tokens, V per token and head (KIVI, arXiv 2402.02750)."""
    scales = 0
    keys = []
    for block in run.k.float().split(group, dim=1):
        rounded, cost = _grid(block, 1, 1 << bits)
        keys.append(rounded)
        scales += cost
    v, cost = _grid(run.v.float(), 3, 1 << bits)
    stored = (run.k.numel() + run.v.numel()) * bits // 8 + scales + cost
    return Restored(torch.cat(keys, 1), v, stored)


def int8(run: KVRun) -> Restored:
    """8 bits a scalar."""
    return _quantize(run, 8, 128)


def int4_kivi(run: KVRun) -> Restored:
    """4 bits a scalar, as the package's ``int4`` but without zstd."""
    return _quantize(run, 4, 128)


def recompute(run: KVRun) -> Restored:
    """Nothing is stored, nothing is lost."""
    return Restored(run.k, run.v, 0)


def _share(run: KVRun, source: list[int]) -> Restored:
    kept = sorted(set(source))
    stored = run.nbytes * len(kept) // len(source)
    return Restored(run.k[source], run.v[source], stored)


def raw_share(run: KVRun) -> Restored:
    """The deep half's layers in pairs, the upper one reusing the lower one's KV as it is."""
    layers = run.k.shape[0]
    source = list(range(layers))
    for layer in range(layers // 2 + 1, layers, 2):
        source[layer] = layer - 1
    return _share(run, source)


def dissimilar(run: KVRun) -> Restored:
    """A quarter of the layers reuse the layer they differ from most (KVSharer, 2410.18517)."""
    layers = run.k.shape[0]
    flat = torch.cat([run.k.float().flatten(2), run.v.float().flatten(2)], 2).mean(1)
    distance = torch.cdist(flat, flat)
    source, used = list(range(layers)), set[int]()
    pairs = sorted(
        ((float(distance[i, j]), i, j) for j in range(layers) for i in range(j)), reverse=True
    )
    for _, i, j in pairs:
        if len({n for n, s in enumerate(source) if n != s}) >= layers // 4:
            break
        if source[j] == j and source[i] == i and j not in used:
            source[j] = i
            used.add(i)
    return _share(run, source)


BASELINES: dict[str, Policy] = {
    "recompute": recompute,
    "int8": int8,
    "int4_kivi": int4_kivi,
    "raw_share": raw_share,
    "dissimilar": dissimilar,
}


PAPER_PREDICTIVE = "paper_predictive"


class _Unguarded(PredictiveCodec):
    """The guard sees what shared layers cost and refuses them; here that cost is measured."""

    def encode(self, run: KVRun, strategy: Strategy) -> bytes:
        return self.encode_at(run, strategy, self.profile.step_for(strategy.budget))[0]


def paper_predictive(spec: KVSpec, profile: Profile | None, budget: float) -> Policy:
    """The paper's pairs, each upper layer stored as nothing but its calibrated prediction.

    The prediction starts from the layer just below, whichever layer it is paired with.
    """
    if profile is None:
        raise ValueError(f"{PAPER_PREDICTIVE} needs a profile: run `krul calibrate`")
    return selecting_policy(
        _Unguarded(spec, profile),
        len(fixed_pairs(spec.layers)),
        lambda pairs: Strategy("predictive", budget, shared=tuple(upper for _, upper in pairs)),
    )


def policies_of(
    names: list[str], spec: KVSpec, profile: Profile | None, budget: float
) -> dict[str, Policy]:
    """Every policy that ``--policies`` names, in that order."""
    out: dict[str, Policy] = {}
    for name in names:
        base, _, own = name.partition("@")
        if name in BASELINES:
            out[name] = BASELINES[name]
        elif base == PAPER_PREDICTIVE:
            out[name] = paper_predictive(spec, profile, float(own or budget))
        else:
            out |= package_policies([name], spec, profile, budget)
    return out


def collect(out: Path, prose: Path | None, per_source: int) -> None:
    """Held-out conversations: people chatting, prose, program text; about 5,000 chars each."""
    rows = []
    import chitchat_dataset  # PyPI, MIT

    for identity, chat in sorted(chitchat_dataset.Dataset().items()):
        messages = [
            {"role": ("user", "assistant")[i % 2], "content": " ".join(m["text"] for m in group)}
            for i, group in enumerate(chat["messages"])
        ]
        if is_held_out(identity) and sum(len(m["content"]) for m in messages) > 5000:
            rows.append({"id": f"chat/{identity}", "messages": messages})
        if len(rows) == per_source:
            break
    texts = [("code", name, inspect.getsource(importlib.import_module(name))) for name in MODULES]
    for path in sorted(prose.glob("*.txt"))[:per_source] if prose else ():
        texts.append(("prose", path.stem, path.read_text(errors="replace")[20000:]))
    rows += [_read_this(f"{source}/{name}", text) for source, name, text in texts]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))


def collect_unlike(out: Path, model: Path) -> None:
    """Texts no calibration has seen the like of: other languages, and no language at all."""
    from faker import Faker  # PyPI, MIT
    from transformers import AutoTokenizer

    gen = random.Random(0)
    Faker.seed(0)
    texts = []
    for locale in LOCALES:
        paragraphs = Faker(locale).paragraphs(40)
        texts.append((f"language/{locale}", "\n".join(paragraphs * 3)))
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    for i in range(5):
        texts.append((f"base64/{i}", base64.b64encode(gen.randbytes(8000)).decode()))
        ids = [gen.randrange(len(tokenizer)) for _ in range(1600)]
        texts.append((f"random/{i}", tokenizer.decode(ids, skip_special_tokens=True)))
        numbers = [str(gen.randrange(10 ** gen.randrange(1, 8))) for _ in range(3000)]
        texts.append((f"numbers/{i}", " ".join(numbers)))
    for i, phrase in enumerate(("The quick brown fox jumps over the lazy dog. ", "0", "ab\n")):
        texts.append((f"repeated/{i}", phrase * 3000))
    out.write_text("".join(json.dumps(_read_this(name, text)) + "\n" for name, text in texts))


def _read_this(identity: str, text: str) -> dict[str, object]:
    """A conversation that is one long text."""
    messages = [
        {"role": "user", "content": "Read this."},
        {"role": "assistant", "content": text[:9000]},
    ]
    return {"id": identity, "messages": messages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--collect", type=Path, metavar="OUT", help="write held-out conversations")
    parser.add_argument(
        "--collect-unlike", type=Path, metavar="OUT", help="write texts unlike any calibration"
    )
    parser.add_argument("--prose", type=Path, help="directory of .txt files for --collect")
    parser.add_argument("--per-source", type=int, default=8)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--conversations", type=Path)
    parser.add_argument("--policies", default="predictive,lossless,int4," + ",".join(BASELINES))
    parser.add_argument("--budget", type=float, default=0.01)
    parser.add_argument("--history", type=int, default=1000)
    parser.add_argument("--continuation", type=int, default=120)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.collect:
        collect(options.collect, options.prose, options.per_source)
        return
    if options.collect_unlike and options.model:
        collect_unlike(options.collect_unlike, options.model)
        return
    if not options.model or not options.conversations:
        parser.error("--model and --conversations are needed")
    model, tokenizer = load_model(options.model)
    profile = load_profile(options.profile) if options.profile else None
    names = options.policies.split(",")
    result = measure(
        model,
        tokenizer,
        read_conversations(options.conversations),
        policies_of(names, spec_of(model), profile, options.budget),
        options.history,
        options.continuation,
        lambda done: print(f"\r{done:4.0%}", end="", file=sys.stderr, flush=True),
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print("\npolicy | ratio | mean KL | 95 % | worst conversation | top-1 | NLL delta")
    for name, row in result["policies"].items():
        ratio = f"{row['ratio']:.2f}x" if row["ratio"] else "-"
        low, high = row["kl_ci95"]
        print(
            f"{name} | {ratio} | {row['kl_mean']:.4f} | {low:.4f} - {high:.4f} | "
            f"{row['kl_worst_conversation']:.4f} | {row['top1']:.3f} | {row['nll_delta']:+.4f}"
        )


if __name__ == "__main__":
    main()
