"""What a restore did and when: two lanes, loading and computing, and where one stood idle.

A *bubble* is time in which one stream stands idle while the restore goes on. The restore
begins when its loads are asked for and ends with the forward pass that reads them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Span = tuple[float, float]
"""Begin and end, seconds of :func:`time.perf_counter`."""


class LoadTrace:
    """When each layer's bytes came and when they were decoded. Written under the pipeline's
    lock, read when the load is over."""

    def __init__(self, layers: int) -> None:
        self.began = time.perf_counter()
        self.bytes = 0
        """Bytes the link carried."""
        self.fetches: list[list[Span]] = [[] for _ in range(layers)]
        self.decodes: list[list[Span]] = [[] for _ in range(layers)]
        self.carried: dict[str, tuple[int, list[Span]]] = {}
        """By tier: bytes, and when its link carried them."""
        self.codec_seconds: dict[str, float] = {}
        """Seconds of decoding by codec, of all threads together."""

    def begin(self) -> None:
        """The load is asked for now."""
        self.began = time.perf_counter()

    def fetched(self, layer: int, began: float, ended: float, nbytes: int, tier: str) -> None:
        """A tier's link carried ``nbytes`` of a layer."""
        self.fetches[layer].append((began, ended))
        self.bytes += nbytes
        carried, spans = self.carried.get(tier, (0, []))
        spans.append((began, ended))
        self.carried[tier] = carried + nbytes, spans

    def decoded(self, layer: int, began: float, ended: float, codec: str) -> None:
        """A thread decoded some tokens of a layer and wrote them to their rows."""
        self.decodes[layer].append((began, ended))
        self.codec_seconds[codec] = self.codec_seconds.get(codec, 0.0) + ended - began

    @property
    def fetch_seconds(self) -> float:
        """Seconds the link was busy with this load."""
        return covered(span for layer in self.fetches for span in layer)

    @property
    def decode_seconds(self) -> float:
        """Seconds of decoding, of all threads together."""
        return sum(self.codec_seconds.values())

    def decode_seconds_since(self, began: float) -> float:
        """The part of them after ``began``."""
        spans = (span for layer in self.decodes for span in layer)
        return sum(max(0.0, end - max(begin, began)) for begin, end in spans)

    @property
    def ended(self) -> float:
        """When the last tokens were written."""
        return max((end for layer in self.decodes for _, end in layer), default=self.began)


def covered(spans: Iterable[Span]) -> float:
    """Seconds that lie in at least one of the spans."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


@dataclass
class RestoreTrace:
    """One forward pass and the loads it waited for; what was loaded while the request was in
    the queue lies before the beginning.

    waits: per layer, when the forward pass came to it and when it could go on (both the same
        where it did not wait); the first comes when the pass has begun.
    """

    began: float
    forward: Span
    waits: Sequence[Span]
    loads: Sequence[LoadTrace]
    tokens: int
    """Tokens restored."""
    recomputed: int
    """Stored tokens that the pass computed instead."""
    new: int
    """Tokens it computed that were not stored."""
    stored_bytes: int
    predicted: float | None = None
    """Seconds that the planner expected from the beginning to the end."""
    failed: bool = False

    @property
    def makespan(self) -> float:
        """Seconds from the first load to the end of the forward pass."""
        return self.forward[1] - self.began

    @property
    def wait_seconds(self) -> float:
        """Seconds that the forward pass stood waiting for layers."""
        return sum(end - begin for begin, end in self.waits)

    @property
    def bubbles(self) -> dict[str, float]:
        """Seconds each stream stood idle within the makespan."""
        end = self.forward[1]
        spans = (
            (max(a, self.began), min(b, end))
            for load in self.loads
            for lane in (load.fetches, load.decodes)
            for layer in lane
            for a, b in layer
        )
        busy = covered(span for span in spans if span[0] < span[1])
        computing = self.forward[1] - self.forward[0] - self.wait_seconds
        return {
            "load": max(0.0, self.makespan - busy),
            "compute": max(0.0, self.makespan - computing),
        }

    def to_json(self) -> dict[str, Any]:
        """Everything, in seconds since the restore began."""

        def spans(found: Iterable[Span]) -> list[list[float]]:
            return [[round(a - self.began, 6), round(b - self.began, 6)] for a, b in found]

        return {
            "tokens": self.tokens,
            "recomputed_tokens": self.recomputed,
            "new_tokens": self.new,
            "stored_bytes": self.stored_bytes,
            "makespan_seconds": round(self.makespan, 6),
            "predicted_seconds": None if self.predicted is None else round(self.predicted, 6),
            "wait_seconds": round(self.wait_seconds, 6),
            "bubble_seconds": {name: round(own, 6) for name, own in self.bubbles.items()},
            "failed": self.failed,
            "forward": spans([self.forward])[0],
            "waits": spans(self.waits),
            "loads": [
                {
                    "fetch": [spans(layer) for layer in load.fetches],
                    "decode": [spans(layer) for layer in load.decodes],
                }
                for load in self.loads
            ],
        }
