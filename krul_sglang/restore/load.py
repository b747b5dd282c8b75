"""Load stored tokens layer by layer into a sink.

Several segments are decoded at once (the decompressors release the GIL); each
writes to its own tokens, so their order does not matter.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from krul_sglang.codec.base import CodecError
from krul_sglang.store.slots import SlotRun

if TYPE_CHECKING:
    import torch

    from krul_sglang.store.memory import MemoryStore

logger = logging.getLogger(__name__)

# Called as sink(layer, first, k, v): write tokens [first, first + len(k)) of a layer.
Sink = Callable[[int, int, "torch.Tensor", "torch.Tensor"], None]


@dataclass(frozen=True)
class LoadOutcome:
    """What one load did. ``lost`` holds ids of the segments that could not be read."""

    tokens: int
    stored_bytes: int
    lost: tuple[int, ...]

    @property
    def ok(self) -> bool:
        """Whether every token reached the sink."""
        return not self.lost


class Loader:
    """Reads runs of slots from a store, throttled to ``bandwidth`` bytes a second if given."""

    def __init__(self, store: MemoryStore, threads: int, bandwidth: float | None = None) -> None:
        self._store = store
        self._bandwidth = bandwidth
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="krul-load")

    def load(self, runs: Sequence[SlotRun], sink: Sink) -> LoadOutcome:
        """Write all tokens of ``runs``, in order from token 0 of the sink. Never raises for
        bad bytes: the segments that failed are reported, and the sink's tokens are then
        undefined."""
        began = time.perf_counter()
        offsets, total = [], 0
        for run in runs:
            offsets.append(total)
            total += run.tokens
        jobs = [
            self._pool.submit(self._load_run, run, offset, sink)
            for run, offset in zip(runs, offsets, strict=True)
        ]
        lost, nbytes = [], 0
        for run, job in zip(runs, jobs, strict=True):
            try:
                nbytes += job.result()
            except CodecError:
                lost.append(run.segment)
            except Exception:
                # Not a bad byte but a bug or no memory. It must not leave this loop: the
                # other jobs still write into rows that the caller would free.
                logger.exception("segment %d could not be loaded", run.segment)
                lost.append(run.segment)
        if self._bandwidth is not None and not lost:
            owed = nbytes / self._bandwidth - (time.perf_counter() - began)
            if owed > 0:
                time.sleep(owed)
        return LoadOutcome(total, nbytes, tuple(dict.fromkeys(lost)))

    def _load_run(self, run: SlotRun, offset: int, sink: Sink) -> int:
        segment = self._store.get(run.segment)
        if segment is None:
            raise CodecError(f"segment {run.segment} is gone")
        reader = self._store.open(segment)
        layers = 0
        for layer, (k, v) in enumerate(reader.layers(run.lo, run.hi)):
            sink(layer, offset, k, v)
            layers += 1
        if layers != self._store.spec.layers:
            raise CodecError(f"segment {run.segment} holds {layers} layers")
        return round((segment.stored_bytes or segment.raw_bytes) * run.tokens / segment.tokens)

    def close(self) -> None:
        """Stop the threads; loads under way finish first."""
        self._pool.shutdown(wait=True, cancel_futures=True)
