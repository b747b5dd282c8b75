"""Teacher-forced forward passes over a given KV cache, with the model's own code.

transformers runs the model; the KV handed in and out is the layout of
:class:`krul_sglang.codec.base.KVRun`. float32 throughout, so that what is measured is
the codec and not the arithmetic.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from krul_sglang.similarity.window import DECODE

if TYPE_CHECKING:
    from collections.abc import Sequence


ATTENTION_ROWS = DECODE.reach
"""Query rows at the end of a history that stand for those to come."""


@dataclass(frozen=True)
class Divergence:
    """Per continuation position, full cache against restored cache.

    kl: ``[n]`` nats, KL(full || restored) of the next-token distributions.
    top1: ``[n]`` bool, whether both put the same token first.
    nll: ``[n - 1]`` nats, restored minus full negative log-likelihood of the text.
    """

    kl: torch.Tensor
    top1: torch.Tensor
    nll: torch.Tensor


def load_model(model_dir: str | Path) -> tuple[Any, Any]:
    """The model in float32 and its tokenizer, from local files only. Raises OSError."""
    if not (Path(model_dir) / "config.json").is_file():
        raise OSError(f"{model_dir}: no model there (no config.json)")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=torch.float32)
    model.requires_grad_(False)
    return model.eval(), AutoTokenizer.from_pretrained(str(model_dir))


def check_known(model: Any, ids: Sequence[int]) -> None:
    """Raise OSError where the model has no embedding of a token the tokenizer gave."""
    known = model.get_input_embeddings().num_embeddings
    if max(ids, default=0) >= known:
        raise OSError(
            f"{model.config.name_or_path}: its tokenizer gives token {max(ids)}, and the model "
            f"knows {known} tokens; they are not of one model"
        )


@torch.no_grad()
def history_kv(model: Any, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """``(k, v)`` of the tokens, ``[layers, tokens, kv_heads, dim]`` float32, k post-RoPE.

    Raises OSError for ids the model does not know."""
    from transformers import DynamicCache

    check_known(model, ids)
    cache = DynamicCache()
    model(torch.tensor([list(ids)]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    layers: list[Any] = list(cache.layers)
    k = torch.stack([layer.keys[0].transpose(0, 1) for layer in layers])
    v = torch.stack([layer.values[0].transpose(0, 1) for layer in layers])
    return k, v


def continuation_logits(
    model: Any, k: torch.Tensor, v: torch.Tensor, ids: Sequence[int]
) -> torch.Tensor:
    """Next-token logits ``[len(ids), vocab]`` of ``ids`` fed after the cache ``(k, v)``.

    Differentiable in ``k`` and ``v`` where autograd is on.
    """
    return model(torch.tensor([list(ids)]), past_key_values=cache_of(k, v), use_cache=True).logits[
        0
    ]


@torch.no_grad()
def logits_by_layer(
    model: Any,
    cache: tuple[torch.Tensor, torch.Tensor],
    other: tuple[torch.Tensor, torch.Tensor],
    ids: Sequence[int],
    layers: Sequence[int],
) -> torch.Tensor:
    """Logits ``[len(layers), len(ids), vocab]`` of ``ids`` fed after a cache ``(k, v)`` in which
    one layer, each of ``layers`` in turn, is that of another. All at once, in one batch."""
    from transformers import DynamicCache

    batch = DynamicCache()
    for layer in range(len(cache[0])):
        both = []
        for own, theirs in zip(cache, other, strict=True):
            rows = own[layer].transpose(0, 1).float().expand(len(layers), -1, -1, -1)
            if layer in layers:
                rows = rows.clone()
                rows[layers.index(layer)] = theirs[layer].transpose(0, 1)
            both.append(rows)
        batch.update(both[0], both[1], layer)
    fed = torch.tensor([list(ids)] * len(layers))
    return model(fed, past_key_values=batch, use_cache=True).logits


def cache_of(k: torch.Tensor, v: torch.Tensor) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache()
    # Unbound, not indexed: an index's gradient is as large as all layers together.
    layers = zip(k.unbind(), v.unbind(), strict=True) if k.shape[1] else ()
    for layer, (own_k, own_v) in enumerate(layers):
        cache.update(
            own_k.transpose(0, 1)[None].float(), own_v.transpose(0, 1)[None].float(), layer
        )
    return cache


def draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One index a row of ``[n, vocab]``, int64 ``[n, 1]``, from the softmax's distribution.

    By its cumulative sum: `torch.multinomial` draws a number for every token of the vocabulary,
    which takes a seventh of a decoding step.
    """
    below = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    wanted = torch.rand(len(below), 1, dtype=torch.float64, generator=generator) * below[:, -1:]
    return torch.searchsorted(below, wanted, right=True).clamp_max(below.shape[1] - 1)


@torch.no_grad()
def attention_rows(
    model: Any, ids: Sequence[int], k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """Attention probabilities of the last tokens, ``[layers, heads, queries, keys]`` float32.

    The last :data:`ATTENTION_ROWS` of ``ids`` (all of them if fewer) are fed after the
    cache ``(k, v)`` of the rest; keys are all of ``ids``. Raises ValueError where the model
    reports no attention, or not that of every layer.
    """
    cut = max(0, len(ids) - ATTENTION_ROWS)
    cache = cache_of(k[:, :cut], v[:, :cut])
    kept = model.config._attn_implementation
    model.set_attn_implementation("eager")  # no other one returns its probabilities
    try:
        output = model(
            torch.tensor([list(ids[cut:])]),
            past_key_values=cache,
            use_cache=True,
            output_attentions=True,
            logits_to_keep=1,
        )
    finally:
        model.set_attn_implementation(kept)
    rows = [row[0] for row in output.attentions or () if row is not None]
    if len(rows) != k.shape[0] or any(row.shape[-1] != len(ids) for row in rows):
        raise ValueError("this model does not report the attention of every layer")
    return torch.stack(rows).float()


def divergence(full: torch.Tensor, restored: torch.Tensor, ids: Sequence[int]) -> Divergence:
    """Compare two ``[n, vocab]`` logits of the same teacher-forced ``ids``."""
    p, q = full.log_softmax(-1), restored.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    following = torch.tensor(list(ids))[1:, None]
    nll = (p[:-1].gather(1, following) - q[:-1].gather(1, following))[:, 0]
    return Divergence(kl, full.argmax(-1) == restored.argmax(-1), nll)
