"""What the finished codec costs on one sequence: the divergence of what follows from what it
restores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from krul_sglang.codec.base import KVRun, KVSpec
from krul_sglang.codec.guard import Measured
from krul_sglang.codec.predictive import PredictiveCodec
from krul_sglang.profile.base import Profile
from krul_sglang.quality.forward import (
    continuation_logits,
    divergence,
    history_kv,
    logits_by_layer,
)
from krul_sglang.strategy.base import Strategy

SIDE_BY_SIDE = 6
"""Layers that are restored alone in one batch: as many times the cache is in memory."""


def heads_of(x: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """The KV heads that tensor parallel rank ``rank`` holds, a view of ``x``,
    ``[layers, tokens, kv_heads, dim]``."""
    share = max(1, x.shape[2] // size)
    first = rank * x.shape[2] // size
    return x[:, :, first : first + share]


class Trial:
    """One sequence and its cache."""

    def __init__(
        self,
        model: Any,
        ids: Sequence[int],
        rank: int,
        kv_heads: int,
        cuts: Sequence[int],
        following: int,
    ) -> None:
        """rank: whose heads are restored, ``kv_heads`` of them. cuts: where the sequence is
        continued by its own next ``following`` tokens; up to the last one it is the history."""
        self.model, self.rank, self.ids = model, rank, ids
        self.cuts, self.following, self.history = cuts, following, max(cuts)
        self.k, self.v = history_kv(model, ids[: self.history])
        self.ranks = max(1, self.k.shape[2] // kv_heads)

    @cached_property
    def full(self) -> list[torch.Tensor]:
        """Logits after the cache as it is, by cut."""
        return [self._continue(self.k, self.v, cut) for cut in self.cuts]

    def _continue(self, k: torch.Tensor, v: torch.Tensor, cut: int) -> torch.Tensor:
        following = self.ids[cut : cut + self.following]
        return continuation_logits(self.model, k[:, :cut], v[:, :cut], following).detach()

    def _kl(self, k: torch.Tensor, v: torch.Tensor) -> float:
        """Mean KL (nats) over the cuts of continuing from another cache."""
        found = 0.0
        for cut, full in zip(self.cuts, self.full, strict=True):
            following = self.ids[cut : cut + self.following]
            other = self._continue(k, v, cut)
            found += float(divergence(full, other, following).kl.mean())
        return found / len(self.cuts)

    def kl(self, profile: Profile, step: float) -> float:
        """Mean KL (nats) of continuing from what the codec restores at ``step``."""
        return self.cost(profile, step)[0]

    def cost(self, profile: Profile, step: float) -> tuple[float, Measured]:
        """The same, and what the encoder itself could see."""
        rk, rv, measured = self._restored(profile, step)
        return self._kl(rk, rv), measured

    def cost_by_layer(self, profile: Profile, step: float) -> tuple[list[float], Measured]:
        """Mean KL (nats) where one layer alone is what the codec restores, for each layer; and
        what the encoder could see."""
        *restored, measured = self._restored(profile, step)
        found = [0.0] * len(self.k)
        for cut, full in zip(self.cuts, self.full, strict=True):
            following = self.ids[cut : cut + self.following]
            own, other = ((k[:, :cut], v[:, :cut]) for k, v in ((self.k, self.v), restored))
            for first in range(0, len(found), SIDE_BY_SIDE):
                layers = range(first, min(first + SIDE_BY_SIDE, len(found)))
                logits = logits_by_layer(self.model, own, other, following, layers)
                for layer, one in zip(layers, logits, strict=True):
                    kl = float(divergence(full, one, following).kl.mean())
                    found[layer] += kl / len(self.cuts)
        return found, measured

    def measured(self, profile: Profile, step: float) -> Measured:
        """Only what the encoder could see."""
        return self._encode(profile, step)[2]

    def _restored(
        self, profile: Profile, step: float
    ) -> tuple[torch.Tensor, torch.Tensor, Measured]:
        """The cache with the rank's heads as the codec restores them."""
        codec, payload, measured = self._encode(profile, step)
        rk, rv = self.k.clone(), self.v.clone()
        for layer, (own_k, own_v) in enumerate(codec.open(payload).layers(0, self.history)):
            heads_of(rk, self.rank, self.ranks)[layer] = own_k
            heads_of(rv, self.rank, self.ranks)[layer] = own_v
        return rk, rv, measured

    def _encode(self, profile: Profile, step: float) -> tuple[PredictiveCodec, bytes, Measured]:
        kinds = (profile.kv_heads, profile.head_dim, profile.v_head_dim)
        codec = PredictiveCodec(KVSpec(len(profile.layers), *kinds, "float32"), profile)
        own = [heads_of(x, self.rank, self.ranks) for x in (self.k, self.v)]
        strategy = Strategy("predictive")
        return codec, *codec.encode_at(KVRun(own[0], own[1], 0), strategy, step)
