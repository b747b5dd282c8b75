"""One of two ranks that bring the same requests, each from a server of its own; trouble on one.
Prints what it ended with."""

import json
import sys
from datetime import timedelta

import redis
import torch.distributed as dist
from remote_queue import Queue
from tree_rig import Rig

HISTORY = list(range(1000, 1090))


def stored(url: str) -> None:
    """A conversation that another server's ranks sent to this rank's."""
    redis.Redis.from_url(url).flushdb()
    rig = Rig(group=dist.group.WORLD, remote=url)
    rig.turn(HISTORY, answer=[7])
    rig.evict()
    rig.sent()
    rig.close()


def brought(rig: Rig, requests: int = 1) -> dict:
    """What requests find that wait in the queue first."""
    waiting = [rig.request([*HISTORY, n]) for n in range(requests)]
    queue = Queue(rig, *waiting)
    queue.until_free(*waiting)
    found = [rig.match(req) for req in waiting]
    assert rig.krul.store.ledger.snapshot()["remote"] == 0
    return {"found": found, "pulled": rig.krul.counters.pulled_tokens}


def sound(url: str, rank: int) -> dict:
    return brought(Rig(group=dist.group.WORLD, remote=url))


def a_burst(url: str, rank: int) -> dict:
    return brought(Rig(group=dist.group.WORLD, remote=url), requests=3)


def damage_on_one_rank(url: str, rank: int) -> dict:
    if rank == 1:
        client = redis.Redis.from_url(url)
        (key,) = client.keys("krul:1:*:kv:*")
        client.set(key, client.get(key)[:-1])
    return brought(Rig(group=dist.group.WORLD, remote=url))


def gone_on_one_rank(url: str, rank: int) -> dict:
    if rank == 1:
        redis.Redis.from_url(url).flushdb()
    return brought(Rig(group=dist.group.WORLD, remote=url))


def no_server_on_one_rank(url: str, rank: int) -> dict:
    there = url if rank == 0 else "redis://127.0.0.1:1"
    return brought(Rig(group=dist.group.WORLD, remote=there))


def no_room_on_one_rank(url: str, rank: int) -> dict:
    rig = Rig(group=dist.group.WORLD, remote=url)
    if rank == 1:
        rig.krul.store.ledger.limit = 20_000
    return brought(rig)


SCENES = (
    sound,
    a_burst,
    damage_on_one_rank,
    gone_on_one_rank,
    no_server_on_one_rank,
    no_room_on_one_rank,
)


def main(rank: int, store: str, server: str) -> None:
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, 2),
        rank=rank,
        world_size=2,
        # A rank that decides alone leaves the other waiting in a collective.
        timeout=timedelta(seconds=30),
    )
    url = f"{server}/{rank}"
    out = {}
    for scene in SCENES:
        stored(url)
        out[scene.__name__] = scene(url, rank)
    dist.barrier()
    print(json.dumps(out))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
