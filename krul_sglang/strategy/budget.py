"""The policy ``predictive``: the fewest bytes within a quality budget, for this conversation.

With ``D`` the divergence and ``R`` the bits, token ``t`` of layer ``l`` stored at step ``s``
costs about ``D = w(l, t) s^2`` and ``R = -n log2 s`` (``n`` coefficients). The least ``R`` for
a given sum of ``D`` has the same ``w s^2`` everywhere (reverse water-filling):

    s(l, t) = step / sqrt(w(l, t))

The layers' part of ``w`` is in the metric that the profile's coefficients are whitened
by, so one step serves all layers. The tokens' part is

    log w(l, t) = a_l . x(l, t) + b_l A(l, t) + c_l mean_l A(l, t) + d_l

with ``x`` the token's K and V, ``A`` the attention level measured, and the weights fitted by
calibration to the gradients of what the model says next. The encoder rounds ``s`` to one
of four classes. What explains only part of ``w`` is followed only in part, or the noise of the
guess costs more than it saves. The step is the coarsest that the guard lets through: the
profile's for the budget, finer where this text is unlike any calibrated. It is the same
whether or not attention was measured: what is known makes the tokens that matter finer,
not the others coarser, because the next question may be about what nobody has looked at.

Which layers to drop or to pair is not chosen per conversation: see docs/NEGATIVE_RESULTS.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from krul_sglang.similarity.window import STRIDE
from krul_sglang.strategy.base import SINKS, Estimate, Selector, Strategy

if TYPE_CHECKING:
    import torch

    from krul_sglang.similarity.window import QueryWindow


class BudgetSelector(Selector):
    """Tells the codec what each token drew; the codec knows the rest from the profile."""

    stride: ClassVar[int] = STRIDE

    def __init__(self, budget: float) -> None:
        """budget: mean KL in nats."""
        self._default = Strategy("predictive", budget)

    @property
    def default(self) -> Strategy:
        """Token classes from K and V alone."""
        return self._default

    def measure(
        self, window: QueryWindow, keys: Sequence[torch.Tensor], rows: torch.Tensor, scale: float
    ) -> Estimate:
        """See :class:`Selector`."""
        from krul_sglang.similarity.estimate import attention_codes

        return Estimate(codes=attention_codes(window, keys, rows, scale, SINKS))

    def choose(self, estimate: Estimate) -> Strategy:
        """See :class:`Selector`."""
        if estimate.codes is None:
            return self._default
        return replace(self._default, attention=estimate.codes.contiguous().numpy().tobytes())
