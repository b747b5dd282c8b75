"""How much each direction of a cached K or V matters to the next tokens.

For small errors e of the cached history the divergence is quadratic, KL = e' F e / 2,
where F is the Fisher information: the covariance of the gradient of the log-likelihood
of tokens drawn from the model's own distribution. One backward pass of a continuation
over leaf K and V gives every layer's block of F at once, query energy, output projection
and layer sensitivity included, whatever the architecture.

A text that goes on hardly looks at what was said long ago, so its gradients know little of
the layers that find it again. A continuation of quotations (:func:`quotations`) needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from krul_sglang.quality.forward import continuation_logits, draw

QUOTATIONS, QUOTED = 8, 12
"""How many, and how many tokens each: the first few say what is quoted, the rest follow from it."""


def quotations(ids: Sequence[int], generator: torch.Generator) -> list[int]:
    """Passages from anywhere in ``ids``, end to end: a continuation that comes back to them."""
    last = max(1, len(ids) - QUOTED + 1)
    places = torch.randint(0, last, (QUOTATIONS,), generator=generator).tolist()
    return [token for place in places for token in ids[place : place + QUOTED]]


def kv_gradients(
    model: Any, k: torch.Tensor, v: torch.Tensor, ids: Sequence[int], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of one draw, shaped as ``k`` and ``v``, scaled so that the mean over
    draws of ``g g'`` is the Fisher block of the *mean* KL over the positions of ``ids``.
    """
    k = k.detach().float().requires_grad_(True)
    v = v.detach().float().requires_grad_(True)
    with torch.enable_grad():
        logp = continuation_logits(model, k, v, ids).log_softmax(-1)
        drawn = draw(logp.detach(), generator)
        # The draws of different positions are independent, so the cross terms of
        # the summed gradient vanish in the mean and one pass serves all positions.
        logp.gather(1, drawn).sum().backward()
    assert k.grad is not None
    assert v.grad is not None
    scale = len(ids) ** -0.5
    return k.grad * scale, v.grad * scale
