"""What a compression strategy is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Strategy:
    """How one segment is to be encoded.

    codec: name of the codec in :mod:`krul_sglang.codec.registry`.
    budget: mean KL in nats that the restored segment may add; 0 for exact codecs.
    """

    codec: str
    budget: float = 0.0


EXACT = Strategy(codec="lossless")
