"""Threads that ask the server which entries continue a conversation, and bring them."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence

from krul_sglang.codec.base import CodecError
from krul_sglang.store.disk.entry import EntryName
from krul_sglang.store.disk.index import Index
from krul_sglang.store.disk.lookup import longest_path
from krul_sglang.store.remote.arrival import ForeignArrivalError, receive
from krul_sglang.store.remote.backoff import Backoff
from krul_sglang.store.remote.client import ANSWER_SECONDS, Client, RemoteError
from krul_sglang.store.remote.keys import LISTED, Keys, mark_of, marks
from krul_sglang.store.remote.pull import Pull, Stage
from krul_sglang.store.remote.stats import RemoteStats

logger = logging.getLogger(__name__)

READERS = 2
"""Pulls that go on at a time: one may decode the reply of a round trip while another waits."""
BATCH_BYTES = 4 << 20
"""Bytes after which a round trip ends: what came until then is kept when the next one fails."""
NAME_BYTES = 256
"""Of a listed name, with what the protocol adds; more than the longest there is."""
IDLE_SECONDS = 1.0


class Reader:
    """The reading half of the remote tier. Thread-safe."""

    def __init__(
        self, client: Client, fingerprint: bytes, ttl: int, reach: Backoff, stats: RemoteStats
    ) -> None:
        self._client = client
        self._fingerprint = fingerprint
        self._ttl = ttl
        self._reach = reach
        self._stats = stats
        self._queue: queue.SimpleQueue[Pull | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=self._read_forever, name=f"krul-pull-{n}", daemon=True)
            for n in range(READERS)
        ]
        for thread in self._threads:
            thread.start()

    def take(self, pull: Pull) -> None:
        """Go on with a pull that is to be looked for, or fetched."""
        self._queue.put(pull)

    def close(self) -> None:
        """Bring nothing more; a round trip under way may still end."""
        self._closed.set()
        for _ in self._threads:
            self._queue.put(None)

    def ping(self) -> bool:
        """Whether the server is well; to be asked when it was not."""
        try:
            (reply,) = self._client.exchange([("PING",)], ANSWER_SECONDS)
            if isinstance(reply, Exception):
                raise RemoteError(str(reply))
        except RemoteError as error:
            self._reach.failed(str(error))
            return False
        self._reach.succeeded()
        return True

    def _read_forever(self) -> None:
        while not self._closed.is_set():
            try:
                pull = self._queue.get(timeout=self._reach.seconds_left or IDLE_SECONDS)
            except queue.Empty:
                if self._reach.reason and not self._reach.seconds_left:
                    self.ping()
                continue
            if pull is None:
                return
            self._serve(pull)
            del pull

    def _serve(self, pull: Pull) -> None:
        if self._reach.reason:  # it failed while this one was in the queue
            pull.end()
            return
        try:
            match pull.stage:
                case Stage.LOOKING:
                    self._look(pull)
                case Stage.FETCHING:
                    self._fetch(pull)
                    pull.end()
                    self._keep_alive(pull)
        except RemoteError as error:
            self._stats.add(failed=1)
            pull.end()
            logger.debug("remote tier: %s", error)
            # Perhaps it was only the request's time that was up: something small tells.
            self.ping()
        except Exception:
            logger.exception("remote tier: a pull failed")
            pull.end()

    # ---- which entries there are -------------------------------------------------

    def _look(self, pull: Pull) -> None:
        self._stats.add(asked=1)
        names = self._names(pull)
        if not names:
            pull.found([])
            return
        self._stats.add(found=1)
        pull.found(names)
        if not pull.names:
            self._stats.add(no_room=1)
        if pull.stage is Stage.FOUND and not pull.is_worth_it:
            self._stats.add(declined=1)
            pull.end()

    def _names(self, pull: Pull) -> Sequence[EntryName]:
        """Names of entries that lead furthest along the conversation, from where it is covered."""
        keys = Keys(self._fingerprint, pull.namespace)
        lists = keys.lists(pull.ids, list(marks(pull.covered, len(pull.ids))))
        if not lists:
            return ()
        commands = [("ZREVRANGE", key, 0, LISTED - 1) for key in lists]
        seconds = min(pull.remaining, ANSWER_SECONDS)
        replies = self._client.exchange(commands, seconds, len(lists) * LISTED * NAME_BYTES)
        refusals = [reply for reply in replies if isinstance(reply, Exception)]
        if len(refusals) == len(replies):
            raise RemoteError(str(refusals[0]))
        index = Index()
        for reply in replies:
            for listed in reply if isinstance(reply, list) else ():
                name = _parsed(self._fingerprint, listed)
                if name is not None:
                    index.add(name, 0)
        path = longest_path(
            index, self._fingerprint, pull.namespace, pull.ids, pull.starts, lambda name: True
        )
        if path is None or path.stop <= pull.covered:
            return ()
        return [name for name in path.names if name.stop > pull.covered]

    # ---- bringing them -------------------------------------------------------------

    def _fetch(self, pull: Pull) -> None:
        keys = Keys(self._fingerprint, pull.namespace)
        for batch in _batches(pull.names):
            began = time.perf_counter()
            commands = [("GET", keys.entry(name)) for name in batch]
            replies = self._client.exchange(
                commands, pull.remaining, sum(name.size for name in batch)
            )
            seconds = (time.perf_counter() - began) / len(batch)
            for name, raw in zip(batch, replies, strict=True):
                if not self._arrived(pull, keys, name, raw, seconds):
                    return

    def _arrived(self, pull: Pull, keys: Keys, name: EntryName, raw: object, seconds: float):
        if not isinstance(raw, bytes):  # gone, or the key holds something else
            self._stats.add(vanished=1)
            self._remove(pull, keys, name)
            return False
        try:
            arrival = receive(name, raw, pull.namespace, pull.ids)
        except CodecError as error:
            if self._stats.add(damaged=1).damaged == 1:
                logger.warning(
                    "remote tier: %s is damaged (%s) and removed; further ones are only counted",
                    name.file,
                    error,
                )
            self._remove(pull, keys, name)
            return False
        except ForeignArrivalError:
            self._stats.add(foreign=1)
            return False
        if not pull.arrived(arrival, seconds):
            self._stats.add(late=1)
            return False
        self._stats.add(pulled=1, pulled_bytes=name.size)
        return True

    def _keep_alive(self, pull: Pull) -> None:
        """What was read is kept as long again; nobody waits for this."""
        names = [arrival.name for arrival in pull.arrivals]
        if not names:
            return
        keys = Keys(self._fingerprint, pull.namespace)
        lists = keys.lists(pull.ids, sorted({mark_of(name.stop) for name in names}))
        used = [*(keys.entry(name) for name in names), *lists]
        self._client.exchange([("EXPIRE", key, self._ttl) for key in used], ANSWER_SECONDS)

    def _remove(self, pull: Pull, keys: Keys, name: EntryName) -> None:
        """An entry that cannot be read is not to be found again, and is stored anew."""
        where = keys.list_of(pull.ids, name.stop)
        commands = [("DEL", keys.entry(name)), ("ZREM", where, name.file)]
        self._client.exchange(commands, ANSWER_SECONDS)


def _parsed(fingerprint: bytes, listed: object) -> EntryName | None:
    try:
        return EntryName.parse(fingerprint, bytes(listed).decode("ascii"))  # type: ignore[call-overload]
    except (TypeError, ValueError):
        return None


def _batches(names: Sequence[EntryName]) -> Iterator[list[EntryName]]:
    batch: list[EntryName] = []
    size = 0
    for name in names:
        if batch and size + name.size > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += name.size
    if batch:
        yield batch
