"""Full cache against restored cache, conversation by conversation, policy by policy.

The KV of a history is rounded to bfloat16 (what a server's pool holds); both the full
and the restored cache start from that, so an exact policy diverges by 0. The
continuation is the conversation's own text, teacher-forced.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from krul_sglang.codec.base import Codec, KVRun, KVSpec
from krul_sglang.codec.registry import make_codec
from krul_sglang.config import POLICIES
from krul_sglang.profile.conversations import chat_ids
from krul_sglang.quality.forward import (
    Divergence,
    attention_rows,
    continuation_logits,
    divergence,
    history_kv,
)
from krul_sglang.similarity.estimate import codes_of_maps
from krul_sglang.similarity.layers import similarity_of_maps
from krul_sglang.strategy.base import SINKS, Estimate, Selector, Strategy
from krul_sglang.strategy.budget import BudgetSelector
from krul_sglang.strategy.fixed import fixed_pairs
from krul_sglang.strategy.paper import select_pairs

if TYPE_CHECKING:
    from krul_sglang.profile.base import Profile


@dataclass(frozen=True)
class History(KVRun):
    """A run that can also say how its last tokens attend to it.

    attention: :func:`attention_rows` of the history, computed on the first call.
    """

    attention: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Restored:
    """What a policy gives back: k, v as in the run, bytes it stored, seconds it took."""

    k: torch.Tensor
    v: torch.Tensor
    stored_bytes: int
    encode_s: float = 0.0
    decode_s: float = 0.0


Policy = Callable[[History], Restored]


@dataclass(frozen=True)
class Conversation:
    """messages: role and content; an ``id`` of the form ``source/name`` names its source."""

    id: str
    messages: Sequence[Mapping[str, str]]

    @property
    def source(self) -> str:
        """What the id says before its first slash."""
        return self.id.split("/")[0] if "/" in self.id else "all"


@dataclass
class _Totals:
    raw: int = 0
    stored: int = 0
    encode_s: float = 0.0
    decode_s: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    kl: list[torch.Tensor] = field(default_factory=list)
    top1: list[torch.Tensor] = field(default_factory=list)
    nll: list[torch.Tensor] = field(default_factory=list)


def read_conversations(path: str | Path) -> list[Conversation]:
    """The conversations of a JSON Lines file: ``{"id", "messages": [{"role", "content"}]}``.

    Raises ValueError naming the line that is none.
    """
    out = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            messages = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
            out.append(Conversation(str(row["id"]), messages))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: not a conversation; a line is "
                '{"id": ..., "messages": [{"role": ..., "content": ...}]}'
            ) from error
    return out


def codec_policy(codec: Codec, strategy: Strategy) -> Policy:
    """A policy that stores a whole history as one segment of ``codec``.

    What the codec cannot hold is stored losslessly, as the store does.
    """

    def restore(run: KVRun) -> Restored:
        began = time.perf_counter()
        chosen = codec
        try:
            payload = codec.encode(run, strategy)
        except ValueError:
            chosen = make_codec("lossless", codec.spec)
            payload = chosen.encode(run, strategy)
        encoded = time.perf_counter()
        layers = list(chosen.open(payload).layers(0, run.tokens))
        decoded = time.perf_counter()
        k, v = torch.stack([k for k, _ in layers]), torch.stack([v for _, v in layers])
        return Restored(k, v, len(payload), encoded - began, decoded - encoded)

    return restore


def attending_policy(codec: Codec, selector: Selector) -> Policy:
    """As :func:`codec_policy`, told what the history's last tokens attended to where the model
    reports it. Measuring that is not part of the encoding time."""

    def restore(history: History) -> Restored:
        try:
            strategy = selector.choose(Estimate(codes_of_maps(history.attention(), SINKS)))
        except ValueError:
            strategy = selector.default
        return codec_policy(codec, strategy)(history)

    return restore


def selecting_policy(
    codec: Codec, pairs: int, strategy: Callable[[tuple[tuple[int, int], ...]], Strategy]
) -> Policy:
    """A policy whose ``strategy`` is made of the pairs that the paper selects for a history.

    pairs: the target number. Selecting is not part of the encoding time.
    """

    def restore(history: History) -> Restored:
        chosen = select_pairs(similarity_of_maps(history.attention()), pairs)
        return codec_policy(codec, strategy(chosen))(history)

    return restore


def takes_budget(name: str) -> bool:
    """Whether the policy is stored with the predictive codec, to a budget and from a profile."""
    return name.partition("@")[0].endswith("predictive")


def budget_of(name: str, default: float) -> float:
    """The budget of ``policy@budget``, ``default`` without one. Raises ValueError."""
    policy, at, own = name.partition("@")
    if at and not takes_budget(policy):
        raise ValueError(f"policy {name!r}: {policy} takes no budget")
    try:
        budget = float(own or default)
    except ValueError:
        budget = math.nan
    if not 0 < budget < math.inf:
        raise ValueError(f"policy {name!r}: a budget is a number of nats above 0")
    return budget


def check_names(names: Sequence[str], budget: float, known: Sequence[str] = POLICIES) -> None:
    """Raise ValueError for a name that is no policy, or a budget that is none."""
    for name in names:
        policy = name.partition("@")[0]
        if policy not in known:
            near = difflib.get_close_matches(policy, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown policy {name!r} (known: {', '.join(known)}){hint}")
        budget_of(name, budget)


def package_policies(
    names: Sequence[str], spec: KVSpec, profile: Profile | None, budget: float
) -> dict[str, Policy]:
    """The policies of a server by name, ``predictive@0.002`` for a budget of its own.

    ``fixed`` and ``paper`` are ``pair_merge`` with MiniCache's pairs and with as many
    pairs as those, selected per history as in the Krul paper: our reimplementations.
    Raises ValueError for a name that is none, or where a profile is needed and missing.
    """
    check_names(names, budget)
    out: dict[str, Policy] = {}
    fixed = fixed_pairs(spec.layers)
    for name in names:
        policy = name.partition("@")[0]
        if policy == "paper":
            merge = make_codec("pair_merge", spec)
            out[name] = selecting_policy(
                merge, len(fixed), lambda pairs: Strategy("pair_merge", pairs=pairs)
            )
            continue
        if policy == "predictive":
            codec = make_codec(policy, spec, profile)
            out[name] = attending_policy(codec, BudgetSelector(budget_of(name, budget)))
            continue
        if policy == "fixed":
            strategy = Strategy("pair_merge", pairs=fixed)
        else:
            strategy = Strategy(policy)
        out[name] = codec_policy(make_codec(strategy.codec, spec, profile), strategy)
    return out


def spec_of(model: Any) -> KVSpec:
    """Shape of the model's KV, from two tokens of it."""
    k, v = history_kv(model, [0, 0])
    return KVSpec(k.shape[0], k.shape[2], k.shape[3], v.shape[3], "bfloat16")


@torch.no_grad()
def measure(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    policies: Mapping[str, Policy],
    history: int = 1000,
    continuation: int = 120,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """``{"policies": {name: totals}, "conversations": {name: rows}, ...}``, JSON types only.

    Conversations shorter than ``history + continuation`` tokens are left out and
    named in ``skipped``. KL in nats, mean and 99th percentile over all positions;
    ``kl_ci95`` is a bootstrap interval over conversations.
    """
    totals = {name: _Totals() for name in policies}
    skipped = []
    for index, conversation in enumerate(conversations):
        ids = chat_ids(tokenizer, [dict(m) for m in conversation.messages], answer=False)
        if len(ids) < history + continuation:
            skipped.append(conversation.id)
            continue
        following = ids[history : history + continuation]
        k, v = (x.bfloat16() for x in history_kv(model, ids[:history]))
        full = continuation_logits(model, k, v, following)
        attention = functools.cache(functools.partial(attention_rows, model, ids[:history], k, v))
        for name, policy in policies.items():
            run = History(k.clone(), v.clone(), 0, attention)
            restored = policy(run)
            logits = continuation_logits(model, restored.k, restored.v, following)
            _add(totals[name], conversation, run, restored, divergence(full, logits, following))
        if progress:
            progress((index + 1) / len(conversations))
    return {
        "history": history,
        "continuation": continuation,
        "skipped": skipped,
        "policies": {name: _summary(total) for name, total in totals.items()},
        "conversations": {name: total.rows for name, total in totals.items()},
    }


def _add(
    total: _Totals, conversation: Conversation, run: KVRun, restored: Restored, d: Divergence
) -> None:
    raw = run.nbytes // run.k.element_size() * 2
    total.raw += raw
    total.stored += restored.stored_bytes
    total.encode_s += restored.encode_s
    total.decode_s += restored.decode_s
    total.kl.append(d.kl)
    total.top1.append(d.top1)
    total.nll.append(d.nll)
    total.rows.append(
        {
            "id": conversation.id,
            "source": conversation.source,
            "ratio": raw / restored.stored_bytes if restored.stored_bytes else None,
            "kl": float(d.kl.mean()),
            "top1": float(d.top1.float().mean()),
            "nll_delta": float(d.nll.mean()),
        }
    )


def _summary(total: _Totals) -> dict[str, Any]:
    if not total.rows:
        return {"conversations": 0}
    kl = torch.cat(total.kl)
    means = torch.tensor([row["kl"] for row in total.rows])
    gen = torch.Generator().manual_seed(0)
    draws = means[torch.randint(len(means), (2000, len(means)), generator=gen)].mean(1)
    return {
        "ratio": total.raw / total.stored if total.stored else None,
        "kl_mean": float(kl.mean()),
        "kl_ci95": [float(draws.quantile(0.025)), float(draws.quantile(0.975))],
        "kl_p99": float(kl.quantile(0.99)),
        "kl_worst_conversation": float(means.max()),
        "top1": float(torch.cat(total.top1).float().mean()),
        "nll_delta": float(torch.cat(total.nll).mean()),
        "raw_bytes": total.raw,
        "stored_bytes": total.stored,
        "encode_s": total.encode_s,
        "decode_s": total.decode_s,
        "conversations": len(total.rows),
    }


def is_held_out(identity: str) -> bool:
    """Whether a public data set's conversation is for evaluation (half of them are)."""
    return hashlib.sha256(identity.encode()).hexdigest()[-1] in "01234567"
