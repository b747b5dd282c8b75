"""Conversations that only the disk has, coming back: what the tests of it share."""

import time
from pathlib import Path

from batches import step
from faulty_codec import converse
from kv_oracle import oracle
from tree_rig import FINGERPRINT, Rig

HISTORY = list(range(1000, 1120))
OPENING = 3
"""Reads that opening a file takes: its head, and two of the payload."""


def store(rig: Rig, tokens=HISTORY) -> None:
    converse(rig, tokens)
    rig.evict()
    rig.written()
    demote(rig)


def demote(rig: Rig) -> None:
    rig.krul.store.demote(1 << 40)
    assert rig.krul.store.ledger.snapshot()["tier"] == 0


def files(root: Path) -> list[Path]:
    return sorted((root / "v1" / FINGERPRINT.hex()).rglob("*.krul"))


def returning(rig: Rig, *tail: int, history=HISTORY):
    req = rig.request([*history, *tail])
    rig.match(req)
    assert rig.admit(req)
    return req


def finish(rig: Rig, *reqs, hanging: bool = False) -> None:
    """The requests end well. hanging: the disk still does, and cannot be looked at."""
    for req in reqs:
        tokens = tuple(req.full_untruncated_fill_ids)
        assert rig.rows_of(req, len(tokens)).equal(oracle(tokens)), "not what a prefill gives"
        rig.decode(req, 5)
        rig.finish(req)
    if not hanging:
        idle(rig)


def idle(rig: Rig) -> None:
    """Nothing is held for anyone any more, and all that is stored is right."""
    nothing_loading(rig)
    assert rig.krul.store.ledger.snapshot()["prefetch"] == 0
    rig.check()


def flush(rig: Rig) -> None:
    """What SGLang does for /flush_cache."""
    rig.cache.reset()
    rig.req_to_token_pool.clear()
    rig.allocator.clear()


def gone(rig: Rig) -> None:
    """Nothing that is stored now can be read any more."""
    rig.damaged.update(rig.krul.store._segments)


def nothing_loading(rig: Rig) -> None:
    until = time.monotonic() + 5
    while rig.krul.store.ledger.snapshot()["loading"]:
        assert time.monotonic() < until, "bytes of a load that is over are kept"
        time.sleep(0.001)


def again(rig: Rig, reqs, hanging: bool = False) -> None:
    """Schedule requests that start anew; once is enough."""
    for req in reqs:
        rig.match(req)
        assert rig.admit(req)
    assert not step(rig, list(reqs)), "a request starts anew for ever"
    finish(rig, *reqs, hanging=hanging)


def comes_back(rig: Rig, tail: int) -> int:
    """Tokens restored for one more turn, all of it from the disk."""
    rig.evict()
    rig.written()
    demote(rig)
    req = returning(rig, tail)
    assert not step(rig, [req])
    finish(rig, req)
    return req.host_loaded_length
