"""Reads a segment that is not encoded yet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from krul_sglang.codec.base import Description, KVRun, SegmentReader, StoredLayer

if TYPE_CHECKING:
    import torch


class RawReader(SegmentReader):
    """Reads a segment that is not encoded yet."""

    def __init__(self, run: KVRun) -> None:
        self._run = run
        self.tokens = run.tokens
        self.start = run.start

    def layers(self, lo: int, hi: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """See :class:`SegmentReader`; yields views."""
        for layer in range(self._run.k.shape[0]):
            yield self._run.k[layer, lo:hi], self._run.v[layer, lo:hi]

    def layer_bytes(self) -> list[int]:
        """See :class:`SegmentReader`."""
        layers = self._run.k.shape[0]
        return [self._run.nbytes // layers] * layers

    def describe(self) -> Description:
        """See :class:`SegmentReader`."""
        layers = self._run.k.shape[0]
        return Description(0, (StoredLayer(self._run.nbytes // layers, error=0.0),) * layers)
