"""What the remote tier has of a request in the queue: brought while the request waits there.

A request of which the local tiers do not have much is set aside when it is first seen, before
a batch is formed, until the server has said what it has and that has come; the others go on.
It never waits longer than computing the tokens would take. What came joins the tree as stored
tokens, and the request finds them like any others. The scheduler thread itself asks nobody.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from krul_sglang.restore.cost import Prefill, Rate
from krul_sglang.runtime import adoption, backup
from krul_sglang.runtime.planning import PLAN
from krul_sglang.store.remote.pull import Pull, Stage
from krul_sglang.store.segment import RECORD_BYTES, SLOT_BYTES

if TYPE_CHECKING:
    from krul_sglang.runtime.cache import KrulRadixCache
    from krul_sglang.store.remote.tier import RemoteTier

LEAST = 64
"""Tokens below which the server is not asked."""
SHARE = 4
"""Part of the memory budget that one request may bring."""
TELLING_BYTES = 1 << 16
"""Bytes below which a pull says more of the round trip than of the rate."""
LONGEST_WAIT = 60.0
"""Seconds that a request waits at most where the operator wants nothing recomputed."""
POLL_SECONDS = 0.001
"""Between two looks where there is nothing else to do."""

# Set on a request that the server has been asked about.
_ASKED = "krul_remote_asked"


class Coverage(NamedTuple):
    """How far the local tiers have a key: ``matched`` tokens, which end at a node."""

    key: Any
    node_id: int
    matched: int


@dataclass(eq=False)
class Held:
    """A request set aside. ids: its tokens, int64, whole pages.

    pull: None where this rank asks nothing. granted: bytes accounted for it, None until room
    was asked for. leader: one that is being brought the same tokens.
    """

    req: Any
    ids: np.ndarray
    matched: int
    pull: Pull | None = None
    granted: int | None = None
    leader: Held | None = None


class Pulls:
    """One rank's requests that wait for the remote tier. Scheduler thread only.

    Every rank holds the same requests, lets them go at the same step, and has the same tokens
    of them join the tree.
    """

    def __init__(self, cache: KrulRadixCache) -> None:
        self._cache = cache
        self._krul = cache.krul
        self._held: list[Held] = []
        self._aside: list[Any] = []
        self._order: dict[int, int] = {}
        self._asking = False
        self._coverage: Coverage | None = None

    # ---- around the forming of a batch -------------------------------------------

    def set_aside(self, scheduler: Any) -> None:
        """Take requests that wait for the server out of the queue, for this step."""
        remote = self._krul.store.remote
        if remote is None:
            self.drop_all()
            return
        queue = scheduler.waiting_queue
        if self._held:
            queued = {id(req) for req in queue}
            for held in [held for held in self._held if id(held.req) not in queued]:
                self._drop(held)
        for req in queue:
            if not hasattr(req, _ASKED):
                setattr(req, _ASKED, True)
                self._consider(remote, req)
        if self._held:
            self._advance(remote)
        if self._held:
            waiting = {id(held.req) for held in self._held}
            self._order = {id(req): place for place, req in enumerate(queue)}
            self._aside = [req for req in queue if id(req) in waiting]
            scheduler.waiting_queue = [req for req in queue if id(req) not in waiting]

    def put_back(self, scheduler: Any, idle: bool) -> None:
        """Give them their places again. idle: whether there is no batch to run."""
        if not self._aside:
            return
        queue, self._aside = [*scheduler.waiting_queue, *self._aside], []
        scheduler.waiting_queue = sorted(
            queue, key=lambda req: self._order.get(id(req), len(queue))
        )
        if idle:
            time.sleep(POLL_SECONDS)

    def note(self, key: Any, node_id: int, matched: int) -> None:
        """A request was matched with what the local tiers have."""
        if self._asking:
            self._coverage = Coverage(key, node_id, matched)

    def _cover(self, req: Any) -> Coverage | None:
        """How far the local tiers have a request; the disk's entries join the tree for it."""
        self._asking, self._coverage = True, None
        try:
            req.init_next_round_input(self._cache)
        finally:
            self._asking = False
        return self._coverage

    # ---- asking --------------------------------------------------------------------

    def _consider(self, remote: RemoteTier, req: Any, may_follow: bool = True) -> None:
        cache = self._cache
        # An answer that has begun does not go on from other KV than it began with.
        if len(req.origin_input_ids) <= LEAST or req.output_ids or cache.is_exact(req):
            return
        if cache.tp_world_size == 1 and not remote.may_ask:
            return
        found = self._cover(req)
        if found is None:
            return
        tokens = len(found.key) // cache.page_size * cache.page_size
        if tokens - found.matched < LEAST:
            return
        ids = np.asarray(found.key.token_ids[:tokens], np.int64)
        held = Held(req, ids, found.matched)
        if may_follow:
            held.leader = next((one for one in self._held if _leads(one, held)), None)
        if held.leader is None and remote.may_ask:
            held.pull = self._pull(found, ids)
            remote.look(held.pull)
        self._held.append(held)

    def _pull(self, found: Coverage, ids: np.ndarray) -> Pull:
        starts, end = [0, found.matched], found.matched
        for node in self._cache.path(found.node_id):
            end -= len(node.key)
            starts.append(end)
        krul, new = self._krul, float(len(ids) - found.matched)
        worth = LONGEST_WAIT
        if krul.config.recompute_fraction is None:
            worth = float(krul.planner.compute.seconds(Prefill.of(new, found.matched)))
        rate = krul.planner.load.links.get("remote")
        return Pull(
            adoption.namespace(found.key),
            ids,
            starts,
            found.matched,
            worth=worth,
            rate=0.0 if rate is None else rate.seconds,
            room=krul.store.ledger.limit // SHARE,
        )

    # ---- waiting -------------------------------------------------------------------

    def _advance(self, remote: RemoteTier) -> None:
        flags: list[int] = []
        for held in self._held:
            stage = Stage.OVER if held.pull is None else held.pull.stage
            wanted = self._bytes_for(held) if stage is Stage.FOUND else 0
            flags += [int(stage is Stage.LOOKING), wanted, int(stage is not Stage.OVER)]
        agreed = self._cache.agree(flags)
        triples = zip(agreed[::3], agreed[1::3], agreed[2::3], strict=True)
        for held, (looking, wanted, waiting) in zip([*self._held], triples, strict=True):
            if held.leader is not None:
                if held.leader not in self._held:
                    self._held.remove(held)
                    self._consider(remote, held.req, may_follow=False)
            elif wanted and not looking and held.granted is None:
                self._grant(remote, held, self._make_room(wanted))
            elif not waiting:
                self._release(held)

    def _grant(self, remote: RemoteTier, held: Held, has_room: bool) -> None:
        held.granted = 0
        if held.pull is None:
            return
        if has_room:
            held.granted = self._bytes_for(held)
            self._krul.store.ledger.add("remote", held.granted)
            remote.fetch(held.pull)
        else:
            remote.stats.add(no_room=1)
            held.pull.end()

    def _bytes_for(self, held: Held) -> int:
        """That what was found takes: on its way, and when it has joined the tree."""
        names = [] if held.pull is None else held.pull.names
        origins = SLOT_BYTES if self._krul.store.disk is not None else 0
        return sum(
            name.size + RECORD_BYTES + SLOT_BYTES * name.tokens + origins * name.stop
            for name in names
        )

    def _make_room(self, nbytes: int) -> bool:
        """Let stored leaves go for what is to be brought; the same answer on every rank."""
        store, cache = self._krul.store, self._cache
        while True:
            store.demote(store.ledger.used + nbytes - store.ledger.limit)
            excess = store.ledger.used + nbytes - store.ledger.limit
            excess, victims = cache.agree([excess, backup.tokens_worth(cache, excess)])
            if excess <= 0:
                return True
            if cache.evict_host(victims) == 0:
                return False

    # ---- what came -------------------------------------------------------------------

    def _release(self, held: Held) -> None:
        """The request waits no longer; what came for it on every rank joins the tree."""
        pull = held.pull
        if pull is not None:
            pull.end()
            self._learn(pull)
        arrivals = [] if pull is None else pull.arrivals
        reached = -self._cache.agree([-arrivals[-1].name.stop if arrivals else 0])[0]
        path = [adoption.Found(a.name, a.entry, a.name.stop, a.payload) for a in arrivals]
        self._drop(held)
        if reached:
            self._join(held.req, path)

    def _join(self, req: Any, path: list[adoption.Found]) -> None:
        cache, found = self._cache, self._cover(req)
        if found is None:
            return
        stop = path[-1].stop
        # What was covered may have gone meanwhile.
        if path[0].name.start > found.matched or not adoption.fits(cache, path):
            stop = 0
        stop = -cache.agree([-stop])[0] // cache.page_size * cache.page_size
        if stop > found.matched:
            adoption.graft(cache, found.key, found.node_id, found.matched, stop, path)
            self._krul.counters.pulled_tokens += stop - found.matched
            # It was planned without them.
            req.__dict__.pop(PLAN, None)

    def _learn(self, pull: Pull) -> None:
        links = self._krul.planner.load.links
        if pull.nbytes >= TELLING_BYTES and pull.seconds > 0:
            links.setdefault("remote", Rate(0.0)).observe(pull.nbytes, pull.seconds)
        elif pull.names and "remote" in links:
            links["remote"].hope()

    # ---- giving up -------------------------------------------------------------------

    def _drop(self, held: Held) -> None:
        if held.pull is not None:
            held.pull.end()
        if held.granted:
            self._krul.store.ledger.add("remote", -held.granted)
            held.granted = 0
        self._held.remove(held)

    def drop_all(self) -> None:
        """Nobody waits any more, and nothing that came is used."""
        for held in [*self._held]:
            self._drop(held)


def _leads(one: Held, other: Held) -> bool:
    """Whether ``one`` is being brought tokens that ``other`` lacks too."""
    same = one.ids[: len(other.ids)] == other.ids[: len(one.ids)]
    common = len(same) if same.all() else int(np.argmin(same))
    return (
        one.leader is None
        and common - max(one.matched, other.matched) >= LEAST
        and (one.req.extra_key, one.req.cache_salt) == (other.req.extra_key, other.req.cache_salt)
    )
