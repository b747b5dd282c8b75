"""Load stored tokens layer by layer into a sink.

Several segments are decoded at once (the decompressors release the GIL); each
writes to its own tokens, so their order does not matter. Short neighbours that their
codec can join are decoded as one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from krul_sglang.codec.base import CodecError, Part
from krul_sglang.store.slots import SlotRun

if TYPE_CHECKING:
    import torch

    from krul_sglang.store.memory import MemoryStore

logger = logging.getLogger(__name__)

# As long as the longest segment: enough for the arithmetic, and threads share what is left.
BATCH_TOKENS = 1024

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


class _Part(NamedTuple):
    """Tokens of a segment, where in the sink they go, and their share of its bytes."""

    segment: int
    offset: int
    stored_bytes: int
    part: Part


def _batches(parts: Sequence[_Part]) -> Iterator[list[_Part]]:
    """Parts that are decoded in one go: neighbours in the sink that their codec can join."""
    batch: list[_Part] = []
    end = tokens = 0
    for one in parts:
        key, size = one.part.reader.batch_key, one.part.hi - one.part.lo
        joins = (
            batch
            and key is not None
            and key == batch[0].part.reader.batch_key
            and type(one.part.reader) is type(batch[0].part.reader)
            and one.offset == end
            and tokens + size <= BATCH_TOKENS
        )
        if batch and not joins:
            yield batch
            batch, tokens = [], 0
        batch.append(one)
        tokens += size
        end = one.offset + size
    if batch:
        yield batch


class Loader:
    """Reads runs of slots from a store, throttled to ``bandwidth`` bytes a second if given."""

    def __init__(self, store: MemoryStore, threads: int, bandwidth: float | None = None) -> None:
        self._store = store
        self._bandwidth = bandwidth
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="krul-load")

    def load(self, runs: Sequence[SlotRun], sink: Sink) -> LoadOutcome:
        """Write all tokens of ``runs``, in order from token 0 of the sink. Never raises for
        bad bytes: the segments that failed are reported, and the sink's tokens are then
        undefined. Tokens may be written twice."""
        began = time.perf_counter()
        parts: list[_Part] = []
        lost: dict[int, int] = {}  # the segment, by where in the sink it fails
        total = nbytes = 0
        for run in runs:
            try:
                parts.append(self._open(run, total))
                nbytes += parts[-1].stored_bytes
            except CodecError:
                lost[total] = run.segment
            total += run.tokens
        jobs = [self._pool.submit(self._read, batch, sink) for batch in _batches(parts)]
        for job in jobs:
            lost |= {part.offset: part.segment for part in job.result()}
        if self._bandwidth is not None and not lost:
            owed = nbytes / self._bandwidth - (time.perf_counter() - began)
            if owed > 0:
                time.sleep(owed)
        failed = dict.fromkeys(lost[offset] for offset in sorted(lost))
        return LoadOutcome(total, nbytes, tuple(failed))

    def _open(self, run: SlotRun, offset: int) -> _Part:
        segment = self._store.get(run.segment)
        if segment is None:
            raise CodecError(f"segment {run.segment} is gone")
        reader = self._store.open(segment)
        whole = segment.stored_bytes or segment.raw_bytes
        nbytes = round(whole * run.tokens / segment.tokens)
        return _Part(run.segment, offset, nbytes, Part(reader, run.lo, run.hi))

    def _read(self, parts: Sequence[_Part], sink: Sink) -> Sequence[_Part]:
        """Read parts that follow each other; returns those that failed."""
        try:
            layers = parts[0].part.reader.layers_of([one.part for one in parts])
            count = 0
            for layer, (k, v) in enumerate(layers):
                sink(layer, parts[0].offset, k, v)
                count += 1
            if count != self._store.spec.layers:
                raise CodecError(f"segment {parts[0].segment} holds {count} layers")
        except CodecError:
            return parts if len(parts) == 1 else self._each(parts, sink)
        except Exception:
            # Not a bad byte but a bug or no memory. It must not leave this loop: the
            # other jobs still write into rows that the caller would free.
            logger.exception("segments %s could not be loaded", [one.segment for one in parts])
            return parts if len(parts) == 1 else self._each(parts, sink)
        return ()

    def _each(self, parts: Sequence[_Part], sink: Sink) -> list[_Part]:
        return [one for one in parts if self._read([one], sink)]

    def close(self) -> None:
        """Stop the threads; loads under way finish first."""
        self._pool.shutdown(wait=True, cancel_futures=True)
