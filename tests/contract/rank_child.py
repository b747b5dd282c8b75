"""One of two ranks: the same requests on both, trouble on one. Prints what it ended with."""

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import torch.distributed as dist
from batches import step
from faulty_codec import Faults, install
from kv_oracle import LAYERS, oracle
from tree_rig import Rig

from krul_sglang.runtime import restoring


def stored_and_damaged(rig: Rig, rank: int) -> list[int]:
    """A conversation of one segment that has left the device; rank 1's copy is bad."""
    history = list(range(100, 164))
    rig.turn(history, answer=[1])
    rig.evict()
    rig.sealed()
    if rank == 1:
        (segment,) = rig.krul.store._segments
        rig.damage(segment)
    return history


def damage_on_one_rank(rig: Rig, rank: int) -> dict:
    """Rank 1's copy is bad: neither rank may use its own."""
    history = stored_and_damaged(rig, rank)
    missed = rig.turn([*history, 5], answer=[2])
    rig.evict()
    rig.sealed()
    again = rig.turn([*history, 6], answer=[3])
    return {"missed": missed.host_loaded_length, "again": again.host_loaded_length}


def budget_short_on_one_rank(rig: Rig, rank: int) -> dict:
    """Rank 1 has room for one conversation: both ranks keep the same ones."""
    if rank == 1:
        rig.krul.store.ledger.limit = 30_000
    for begin in (1000, 2000, 3000):
        rig.turn(range(begin, begin + 48), answer=[1])
        rig.evict()
    stored = [rig.match(rig.request(range(b, b + 49))) for b in (1000, 2000, 3000)]
    return {"stored": stored, "dropped": rig.krul.counters.dropped_tokens}


def victim_too_large_for_one_rank(rig: Rig, rank: int) -> dict:
    if rank == 1:
        rig.krul.store.ledger.limit = 4_000
    rig.turn(range(100, 164), answer=[1])
    rig.evict()
    return {"dropped": rig.krul.counters.dropped_tokens, "nodes": len(rig.nodes())}


def under_way(rig: Rig, rank: int, layer: int | None, stalls: bool = False) -> dict:
    """Two requests return to one node, whose load overlaps with the pass. On rank 1 it fails at
    ``layer`` (None: its bytes are bad) or does not get past it. Both ranks start both anew."""
    faults = Faults()
    install(rig, faults)
    history = stored_and_damaged(rig, rank if layer is None else 0)
    if rank == 1:
        faults.layer = layer
        faults.gate = threading.Event() if stalls else None
    waiting = [rig.request([*history, last]) for last in (5, 6)]
    reqs, loaded, anew = list(waiting), [], []
    while waiting:
        for req in waiting:
            rig.match(req)
            assert rig.admit(req)
            loaded.append(req.host_loaded_length)
        with releasing(faults.gate):
            waiting = step(rig, waiting)
        anew.append(len(waiting))
        assert len(anew) < 3, "requests start anew for ever"
        faults.layer = None
    for req in reqs:
        tokens = tuple(req.full_untruncated_fill_ids)
        assert rig.rows_of(req, len(tokens)).equal(oracle(tokens)), "not what a prefill gives"
        rig.decode(req, 7)
        rig.finish(req)
    return {"loaded": loaded, "anew": anew, "late": rig.cache.restores.totals.late > 0}


@contextmanager
def releasing(gate: threading.Event | None) -> Iterator[None]:
    """Let a load that stalls go on after half a second, long after patience has ended."""
    if gate is None or gate.is_set():
        yield
        return
    timer = threading.Timer(0.5, gate.set)
    timer.start()
    yield
    timer.join()


SCENES: dict[str, Callable[[Rig, int], dict]] = {
    **{f"fails at layer {n}": partial(under_way, layer=n) for n in range(LAYERS)},
    "stalls": partial(under_way, layer=1, stalls=True),
    "bad bytes": partial(under_way, layer=None),
    **{
        scene.__name__: scene
        for scene in (damage_on_one_rank, budget_short_on_one_rank, victim_too_large_for_one_rank)
    },
}


def main(rank: int, store: str) -> None:
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, 2),
        rank=rank,
        world_size=2,
        # A rank that decides alone leaves the other waiting in a collective.
        timeout=timedelta(seconds=30),
    )
    restoring.PATIENCE = 0.1
    out = {}
    for name, scene in SCENES.items():
        rig = Rig(group=dist.group.WORLD, overlapped=isinstance(scene, partial))
        assert rig.cache.tp_world_size == 2
        out[name] = scene(rig, rank)
        rig.check()
        rig.close()
    dist.barrier()
    print(json.dumps(out))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
