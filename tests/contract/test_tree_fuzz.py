"""Random life on one rank: after every step tree, rows, store and ledger must agree.

Conversations begin, go on, branch off one another, are chunked, retracted and aborted in
every phase, while nodes are evicted, stored payloads damaged and the cache flushed.
"""

import random
from collections import Counter
from pathlib import Path

import pytest
from kv_oracle import ROUNDING
from tree_rig import Rig

END = 9  # the token that ends a turn
SYSTEM = [*range(1000, 1012), END]
SEEDS = 200
QUICK = 25  # of each of eight rigs: 200 interleavings in the normal run
FAMILIES = {
    "lossless": {},
    "lossy": {"lossy": ROUNDING, "turn_ends": [END]},
    "lossy-recompute": {"lossy": ROUNDING, "turn_ends": [END], "recompute": "0.3"},
    # A token is 384 bytes raw: stored leaves must go all the time.
    "tight": {"lossy": ROUNDING, "turn_ends": [END], "host_memory": 24_000},
    # What memory cannot hold is on a disk that cannot hold all of it either.
    "disk": {"turn_ends": [END], "host_memory": 24_000, "disk": True, "disk_limit": 100_000},
}


def settings(family: str, root: Path) -> dict:
    """The rig's arguments, with a directory of its own where it has a disk."""
    found = dict(FAMILIES[family])
    if found.get("disk"):
        found["disk"] = root
    return found


class Life:
    """Draws steps from one seeded generator and applies them to a rig."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self.rig, self.rng = rig, random.Random(seed)
        self.histories: list[list[int]] = []
        self.waiting: list = []
        self.decoding: set[str] = set()
        self.done: dict[str, int] = {}

    def step(self) -> None:
        weights, calls = zip(*self.steps, strict=True)
        call = self.rng.choices(calls, weights)[0]
        if call(self):
            self.done[call.__name__] = self.done.get(call.__name__, 0) + 1
        self.rig.check()
        store = self.rig.krul.store
        held = store.ledger.snapshot()
        # The check above reads all that is stored at once, from the disk too.
        reached = held["peak"] if store.disk is None else store.ledger.used - held["loading"]
        assert reached <= held["limit"], f"over the budget: {held}"

    def tokens(self, low: int, high: int) -> list[int]:
        return [self.rng.randrange(20, 60) for _ in range(self.rng.randrange(low, high))]

    def arrive(self) -> bool:
        """A new conversation, the next turn of an old one, or a branch off it."""
        rng = self.rng
        if len(self.waiting) + len(self.rig.running) >= 4:
            return False
        kind = rng.random()
        if not self.histories or kind < 0.3:
            prompt = SYSTEM + self.tokens(3, 30)
        elif kind < 0.75:
            prompt = rng.choice(self.histories) + self.tokens(1, 25)
        else:
            old = rng.choice(self.histories)
            prompt = old[: rng.randrange(1, len(old) + 1)] + self.tokens(1, 25)
        req = self.rig.request([*prompt[:150], END], exact=rng.random() < 0.3)
        self.rig.match(req)
        self.waiting.append(req)
        return True

    def go_on(self) -> bool:
        """Take one request one phase further."""
        rig, rng = self.rig, self.rng
        if self.waiting and (not rig.running or rng.random() < 0.4):
            req = self.waiting.pop(rng.randrange(len(self.waiting)))
            rig.match(req)  # the scheduler matches again before it admits
            rig.admit(req)  # without room it is turned away
            return True
        if not rig.running:
            return False
        req = rng.choice(rig.running)
        length = len(req.full_untruncated_fill_ids)
        if req.rid not in self.decoding:  # prefill, maybe in chunks
            left = length - req.prefix_len
            chunk = length if left < 2 or rng.random() < 0.7 else req.prefix_len + left // 2
            if not self.fits(chunk - req.prefix_len):
                rig.abort(req)
                return True
            rig.prefill(req, chunk)
            if chunk == length:
                self.decoding.add(req.rid)
                req.output_ids.append(rng.randrange(20, 60))
            rig.checkpoint(req)
            return True
        if rng.random() < 0.6 and self.fits(1):
            rig.decode(req, rng.randrange(20, 60))
            return True
        rig.finish(req)
        self.histories.append([*req.origin_input_ids, *req.output_ids, END])
        return True

    def fits(self, tokens: int) -> bool:
        rig = self.rig
        free = rig.allocator.available_size() + rig.cache.full_evictable_size()
        return free >= tokens + 2 * rig.page_size

    def drop_waiting(self) -> bool:
        return bool(self.waiting) and self.waiting.pop() is not None

    def abort(self) -> bool:
        if self.rig.running:
            self.rig.abort(self.rng.choice(self.rig.running))
            return True
        return False

    def retract(self) -> bool:
        held = [r for r in self.rig.running if r.kv.holds_kv]
        if not held:
            return False
        req = self.rng.choice(held)
        self.rig.retract(req)
        self.decoding.discard(req.rid)
        self.waiting.append(req)
        return True

    def evict(self) -> bool:
        self.rig.evict(self.rng.choice([self.rig.page_size, 30, None]))
        return True

    def damage(self) -> bool:
        # A file is damaged in test_disk.py: here the rig is to know what is.
        self.rig.sealed()
        sealed = [s.id for s in self.rig.krul.store._segments.values() if s.payload is not None]
        if sealed:
            self.rig.damage(self.rng.choice(sealed), at=-self.rng.randrange(1, 60))
        return bool(sealed)

    def flush(self) -> bool:
        """Only ever asked for while nothing runs, like the scheduler's."""
        if self.rig.running:
            return False
        self.rig.cache.reset()
        self.rig.allocator.clear()
        self.rig.req_to_token_pool.clear()
        self.rig.damaged.clear()
        self.waiting = [r for r in self.waiting if self.rig.match(r) == 0]
        return True

    # Weight and step; a step says whether it had anything to do.
    steps = (
        (6, arrive),
        (12, go_on),
        (1, drop_waiting),
        (2, abort),
        (1, retract),
        (3, evict),
        (1, damage),
        (0.3, flush),
    )


def live(rig: Rig, seed: int, steps: int = 60) -> dict[str, int]:
    life = Life(rig, seed)
    for _ in range(steps):
        life.step()
    for req in list(rig.running):
        rig.abort(req)
    rig.check(idle=True)
    return life.done


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_interleavings(make_rig, tmp_path, family: str, page_size: int) -> None:
    """A few seeds of each family; the counters show that the run met what it is about."""
    restored = lost = 0
    done: Counter[str] = Counter()
    for seed in range(QUICK):
        rig = make_rig(page_size, **settings(family, tmp_path / str(seed)))
        done.update(live(rig, seed))
        restored += rig.krul.counters.restored_tokens
        lost += rig.krul.store.stats.lost_segments
        rig.close()
    assert restored > 0
    assert lost > 0 or family != "lossless"
    assert done.keys() == {step.__name__ for _, step in Life.steps}, "a kind of step never ran"


@pytest.mark.long
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_many_interleavings(make_rig, tmp_path, family: str, page_size: int) -> None:
    """The same over 200 seeds."""
    for seed in range(QUICK, SEEDS):
        rig = make_rig(page_size, **settings(family, tmp_path / str(seed)))
        live(rig, seed)
        rig.close()
