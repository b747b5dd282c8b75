"""What a compression strategy is, and what a selector must do to choose one.

Data flow: when a request finishes, :meth:`Selector.measure` turns its sampled queries and
its keys, still on the device, into an :class:`Estimate`; when its tokens leave the device,
:meth:`Selector.choose` turns that into the :class:`Strategy` of each segment.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch

    from krul_sglang.similarity.layers import LayerSimilarity
    from krul_sglang.similarity.window import QueryWindow


@dataclass(frozen=True)
class Strategy:
    """How one segment is to be encoded.

    codec: name of the codec in :mod:`krul_sglang.codec.registry`.
    budget: mean KL in nats that the restored segment may add; 0 for exact codecs.
    classes: how much each token matters, one byte each: 0 the most, 3 the least.
        ``tokens`` bytes (the same for all layers) or ``layers * tokens``; empty lets
        the codec judge from K, V and ``attention``.
    pairs: ``(lower, upper)`` layers that ``pair_merge`` merges.
    shared: layers that ``predictive`` stores as nothing but their prediction from
        the layer below.
    attention: what each token drew from the conversation's own queries, ``layers * tokens``
        codes of :mod:`krul_sglang.similarity.levels`; empty where it was not measured.
    similarity: what ``pairs`` were chosen by, for whoever asks later; None where nothing was
        measured.
    """

    codec: str
    budget: float = 0.0
    classes: bytes = b""
    pairs: tuple[tuple[int, int], ...] = ()
    shared: tuple[int, ...] = ()
    attention: bytes = b""
    similarity: LayerSimilarity | None = field(default=None, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of what it carries a segment or a token."""
        measured = self.similarity
        matrices = 0 if measured is None else measured.edges.nbytes + measured.distance.nbytes
        return len(self.classes) + len(self.attention) + matrices


EXACT = Strategy(codec="lossless")

SINKS = 4
"""Leading tokens of a sequence that draw attention from everywhere, whatever they say: errors
in them cost most and their bytes least, so they stay exact."""


@dataclass(frozen=True)
class Estimate:
    """What was measured of a run of tokens; what a selector does not use is None.

    codes: uint8 ``[layers, tokens]`` attention levels (:mod:`krul_sglang.similarity.levels`).
    layers: how alike the layers attend, over the whole conversation.
    """

    codes: torch.Tensor | None = None
    layers: LayerSimilarity | None = None


class Selector(ABC):
    """Chooses strategies for what may be stored lossily. Stateless."""

    stride: ClassVar[int] = 0
    """Every how many layers it wants queries sampled; 0 asks for no measurement."""

    @property
    @abstractmethod
    def default(self) -> Strategy:
        """For tokens of which nothing was measured."""

    def measure(
        self, window: QueryWindow, keys: Sequence[torch.Tensor], rows: torch.Tensor, scale: float
    ) -> Estimate:
        """What it needs to know of a conversation, on the keys' device, without waiting for it.

        Arguments as in :func:`krul_sglang.similarity.estimate.attention_mass`.
        """
        return Estimate()

    def choose(self, estimate: Estimate) -> Strategy:
        """For tokens of which ``estimate`` is known; its tensors are on the host."""
        return self.default
