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
        the codec judge from the keys.
    pairs: ``(lower, upper)`` layers that ``pair_merge`` merges.
    shared: layers that ``predictive`` stores as nothing but their prediction from
        the layer below.
    """

    codec: str
    budget: float = 0.0
    classes: bytes = b""
    pairs: tuple[tuple[int, int], ...] = ()
    shared: tuple[int, ...] = ()


EXACT = Strategy(codec="lossless")
