"""The profile: what calibration knows about one model (and one rank of it).

Coordinates: ``x`` of a token and layer is its pre-RoPE K and its V side by side,
``[kv_heads * head_dim + kv_heads * v_head_dim]``. All tensors are float32.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from krul_sglang.codec.base import KVSpec
from krul_sglang.profile.rope import Rope


class ProfileError(ValueError):
    """A profile that does not belong to this model, or is damaged; says what differs."""


@dataclass(frozen=True)
class LayerMaps:
    """How one layer is predicted from the rebuilt layer below and what is left of it.

    prediction = ``bias + x_below @ down @ up``; coefficients of the residual
    = ``(x - prediction) @ forward``; rebuilt = ``prediction + coefficients @ inverse``.

    bias: ``[dim]``; down: ``[dim, rank]``; up: ``[rank, dim]``; rank 0 in layer 0.
    forward: ``[dim, n]``; inverse: ``[n, dim]``, whitened by the importance metric, so
        that one step fits all coefficients of all layers.
    sigma: ``[n]`` standard deviation of the coefficients, falling.
    token: ``[dim + 1]`` weights (the last one constant): the log importance of a
        token in this layer, 0 on average.
    attended: ``[dim + 3]``, the same where attention was measured: of K and V, of the
        token's level in this layer, of its mean level over all layers, and a constant.
    """

    bias: torch.Tensor
    down: torch.Tensor
    up: torch.Tensor
    forward: torch.Tensor
    inverse: torch.Tensor
    sigma: torch.Tensor
    token: torch.Tensor
    attended: torch.Tensor

    def predict(self, below: torch.Tensor | None, order: torch.Tensor) -> torch.Tensor:
        """Predictions ``[n, dim]`` from rows ``order`` (``[n]``) of the rebuilt layer below,
        None in layer 0. A tensor of the caller's own."""
        if below is None:
            return self.bias.expand(len(order), -1).clone()
        # Reordered where it is narrowest.
        return torch.addmm(self.bias, (below @ self.down)[order], self.up)


@dataclass(frozen=True)
class Profile:
    """Maps of every layer, the rotation to undo, and what a step costs.

    curve: ``(step, KL in nats, error in the importance metric)``, all rising, measured
        on held-out text; nine of ten conversations cost less than the KL.
    fingerprint: names what the profile was made from; compared on loading.
    novelty: how far held-out text is from the samples, per quarter of the layers.
    """

    kv_heads: int
    head_dim: int
    v_head_dim: int
    rope: Rope
    layers: Sequence[LayerMaps]
    curve: Sequence[tuple[float, float, float]]
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    novelty: Sequence[float] = ()

    @cached_property
    def id(self) -> str:
        """Hash of everything a payload depends on; payloads carry it."""
        digest = hashlib.sha256()
        digest.update(repr((self.kv_heads, self.head_dim, self.v_head_dim)).encode())
        digest.update(self.rope.inv_freq.numpy().tobytes() + repr(self.rope.scale).encode())
        for maps in self.layers:
            for tensor in vars(maps).values():
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def step_for(self, budget: float) -> float:
        """The step that costs ``budget`` nats; log-log between measured points.

        Above what was measured the line goes on for a factor e of KL and no farther.
        """
        if not budget > 0:
            raise ValueError(f"a budget of {budget} nats; only exact codecs serve 0")
        most = self.curve[-1][1] * math.e
        return _on_line([(kl, step) for step, kl, _ in self.curve], min(budget, most))

    def cost_at(self, step: float) -> tuple[float, float]:
        """KL and error that held-out text shows at ``step``."""
        return (
            _on_line([(s, kl) for s, kl, _ in self.curve], step),
            _on_line([(s, error) for s, _, error in self.curve], step),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        tensors = (tensor for maps in self.layers for tensor in vars(maps).values())
        return sum(tensor.nbytes for tensor in tensors)

    def check_spec(self, spec: KVSpec) -> None:
        """Raise :class:`ProfileError` unless the profile is for KV of this shape."""
        found = {
            "layers": len(self.layers),
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "v_head_dim": self.v_head_dim,
        }
        for name, value in found.items():
            if value != getattr(spec, name):
                raise ProfileError(
                    f"profile is for {name} {value}, the model has {getattr(spec, name)}"
                )


def _on_line(points: Sequence[tuple[float, float]], x: float) -> float:
    """Log-log interpolation between rising points; the end segments go on."""
    (x0, y0), (x1, y1) = next(
        (pair for pair in itertools.pairwise(points) if x <= pair[1][0]), points[-2:]
    )
    return y0 * (x / x0) ** (math.log(y1 / y0) / math.log(x1 / x0))
