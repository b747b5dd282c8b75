"""A lossless codec whose reads go wrong where a test says so."""

import threading
from collections.abc import Iterator

import torch
from batches import step
from tree_rig import Rig

from krul_sglang.codec.base import Codec, CodecError, SegmentReader
from krul_sglang.codec.lossless import LosslessCodec
from krul_sglang.strategy.base import EXACT


class Faults:
    """Where the next reads go wrong. gate: a read of ``layer`` waits for it, and says so by
    setting ``at_gate``. encoded: set by every encoding."""

    def __init__(self) -> None:
        self.layer: int | None = None
        self.error: type[Exception] = CodecError
        self.gate: threading.Event | None = None
        self.at_gate = threading.Event()
        self.encoded = threading.Event()


class FaultyReader(SegmentReader):
    def __init__(self, inner: SegmentReader, faults: Faults) -> None:
        self._inner, self._faults = inner, faults
        self.tokens, self.start = inner.tokens, inner.start

    def layer_bytes(self) -> list[int]:
        return self._inner.layer_bytes()

    def describe(self):
        return self._inner.describe()

    def layers(self, lo: int, hi: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for layer, found in enumerate(self._inner.layers(lo, hi)):
            if layer == self._faults.layer:
                if self._faults.gate is None:
                    raise self._faults.error("as asked")
                self._faults.at_gate.set()
                self._faults.gate.wait(20)
            yield found


class FaultyCodec(Codec):
    """Lossless, with faults."""

    name, exact = "lossless", True

    def __init__(self, spec, faults: Faults) -> None:
        super().__init__(spec)
        self._inner, self._faults = LosslessCodec(spec), faults

    def encode(self, run, strategy) -> bytes:
        self._faults.encoded.set()
        return self._inner.encode(run, EXACT)

    def open(self, payload: bytes) -> SegmentReader:
        return FaultyReader(self._inner.open(payload), self._faults)


def install(rig: Rig, faults: Faults) -> None:
    """Everything the rig stores goes through the faulty codec."""
    codec = FaultyCodec(rig.krul.pool.spec, faults)
    rig.krul.store._codec_for = {"lossless": codec}.__getitem__


def converse(rig: Rig, tokens) -> None:
    """A turn through the hooks."""
    req = rig.request(tokens)
    rig.match(req)
    assert rig.admit(req)
    assert not step(rig, [req])
    for token in (1, 2):
        rig.decode(req, token)
    rig.finish(req)
