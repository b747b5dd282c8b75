"""One of two ranks: the same requests on both, trouble on one. Prints what it ended with."""

import json
import sys
from datetime import timedelta

import torch.distributed as dist
from batches import step
from kv_oracle import LAYERS
from tree_rig import Rig

from krul_sglang.runtime.restoring import LayerCounter


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


def failure_under_way_on_one_rank(rig: Rig, rank: int) -> dict:
    """A load overlaps with the pass and fails on rank 1: both start the request anew."""
    rig.cache.restores.overlapped = True
    rig.krul.pool.register_layer_counter(LayerCounter(rig.cache.restores, LAYERS))
    history = stored_and_damaged(rig, rank)
    req = rig.request([*history, 5])
    loaded, anew = [], []
    for _ in range(2):
        rig.match(req)
        assert rig.admit(req)
        loaded.append(req.prefix_len)
        anew.append(len(step(rig, [req])))
    rig.decode(req, 6)
    rig.finish(req)
    return {"loaded": loaded, "anew": anew}


SCENES = (
    failure_under_way_on_one_rank,
    damage_on_one_rank,
    budget_short_on_one_rank,
    victim_too_large_for_one_rank,
)


def main(rank: int, store: str) -> None:
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, 2),
        rank=rank,
        world_size=2,
        # A rank that decides alone leaves the other waiting in a collective.
        timeout=timedelta(seconds=30),
    )
    out = {}
    for scene in SCENES:
        rig = Rig(group=dist.group.WORLD)
        assert rig.cache.tp_world_size == 2
        out[scene.__name__] = scene(rig, rank)
        rig.check()
        rig.close()
    dist.barrier()
    print(json.dumps(out))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
