"""What a compression strategy is."""

from __future__ import annotations

from dataclasses import dataclass


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
    """

    codec: str
    budget: float = 0.0
    classes: bytes = b""
    pairs: tuple[tuple[int, int], ...] = ()
    shared: tuple[int, ...] = ()
    attention: bytes = b""


EXACT = Strategy(codec="lossless")
