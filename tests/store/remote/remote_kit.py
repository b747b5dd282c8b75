"""Conversations for the remote tier: what is sent, what is asked for, what came."""

from __future__ import annotations

import itertools

import numpy as np

from krul_sglang.store.disk.entry import Namespace
from krul_sglang.store.remote.pull import Pull, Stage
from krul_sglang.store.remote.tier import RemoteTier
from krul_sglang.store.segment import Origin, Segment, SegmentState

FINGERPRINT = b"remote tests" + bytes(4)
NOBODY = Namespace()

_numbers = itertools.count(1)


def ids_of(talk: int, tokens: int) -> np.ndarray:
    """The first ``tokens`` of a conversation."""
    return np.random.default_rng(talk).integers(0, 50_000, 100_000)[:tokens]


def payload_of(start: int, stop: int) -> bytes:
    return np.random.default_rng(stop).bytes(37 * (stop - start))


def offer(
    tier: RemoteTier,
    ids: np.ndarray,
    start: int,
    *,
    namespace: Namespace = NOBODY,
    exact: int = 0,
    payload: bytes | None = None,
) -> Segment:
    """Offer tokens ``start .. len(ids)`` of a conversation."""
    stop = len(ids)
    payload = payload_of(start, stop) if payload is None else payload
    segment = Segment(
        id=next(_numbers),
        tokens=stop - start,
        start=start,
        strategy=None,
        exact=True,
        raw_bytes=100 * (stop - start),
        live_tokens=stop - start,
        state=SegmentState.SEALED,
        codec="lossless",
        payload=payload,
    )
    tier.offer(segment, payload, Origin(namespace, ids, exact))
    return segment


def send(tier: RemoteTier, ids: np.ndarray, stops: list[int], **kwargs) -> list[bytes]:
    """Store a conversation cut at ``stops``; returns the payloads."""
    sent = [
        offer(tier, ids[:stop], start, **kwargs) for start, stop in itertools.pairwise([0, *stops])
    ]
    assert tier.wait_sent(20)
    return [bytes(segment.payload or b"") for segment in sent]


def pull(
    tier: RemoteTier,
    ids: np.ndarray,
    *,
    covered: int = 0,
    starts: tuple[int, ...] = (0,),
    namespace: Namespace = NOBODY,
    worth: float = 20.0,
    **kwargs,
) -> Pull:
    """A whole pull, as the scheduler would have it done; it is over when this returns."""
    one = Pull(namespace, ids, starts, covered, worth=worth, **kwargs)
    tier.look(one)
    assert one.wait(Stage.FOUND, Stage.OVER, timeout=10)
    if one.stage is Stage.FOUND:
        tier.fetch(one)
        assert one.wait(Stage.OVER, timeout=30)
    return one


def came(one: Pull) -> list[bytes]:
    """Payloads that arrived."""
    return [bytes(arrival.payload) for arrival in one.arrivals]
