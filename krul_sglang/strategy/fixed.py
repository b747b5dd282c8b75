"""The policy ``fixed``: the same pairs of layers for every conversation, as in MiniCache."""

from __future__ import annotations

from krul_sglang.strategy.base import Selector, Strategy


def fixed_pairs(layers: int) -> tuple[tuple[int, int], ...]:
    """Neighbouring layers of the deep half, as MiniCache pairs them (arXiv 2405.14366).

    The first layer of the deep half is ``layers // 2``; an odd one at the end is left out.
    """
    return tuple((upper - 1, upper) for upper in range(layers // 2 + 1, layers, 2))


class FixedSelector(Selector):
    """Merges :func:`fixed_pairs`; measures nothing."""

    def __init__(self, layers: int) -> None:
        self._default = Strategy("pair_merge", pairs=fixed_pairs(layers))

    @property
    def default(self) -> Strategy:
        """See :class:`Selector`."""
        return self._default
