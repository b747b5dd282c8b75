"""Chooses nothing: everything is stored exactly. What is left when the profile no longer fits the
model, as its weights were changed under the server."""

from __future__ import annotations

from krul_sglang.strategy.base import EXACT, Selector, Strategy


class ExactSelector(Selector):
    """Measures nothing; what was stored lossily before stays known as lossy."""

    @property
    def default(self) -> Strategy:
        """See :class:`Selector`."""
        return EXACT
