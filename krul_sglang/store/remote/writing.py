"""The thread that sends sealed segments to the server, behind everything else."""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import NamedTuple

from krul_sglang.codec.base import Payload
from krul_sglang.store.disk.entry import Entry, EntryName
from krul_sglang.store.disk.header import name_of, pack_head
from krul_sglang.store.ledger import Ledger
from krul_sglang.store.remote.backoff import Backoff
from krul_sglang.store.remote.client import ANSWER_SECONDS, Client, RemoteError
from krul_sglang.store.remote.keys import LISTED, Keys
from krul_sglang.store.remote.reading import NAME_BYTES, Reader
from krul_sglang.store.remote.stats import RemoteStats
from krul_sglang.store.segment import Origin, Segment, SegmentState

logger = logging.getLogger(__name__)

QUEUE_SHARE = 16
"""Part of the memory budget that what waits to be sent may take."""
MAX_VALUE = 512 << 20
"""Longest value that servers take unless told otherwise (proto-max-bulk-len)."""
SEND_SECONDS = 30.0
"""Nobody waits for it; a server that takes longer for one entry is given up for now."""
TRIES = 3


class _Job(NamedTuple):
    segment: Segment
    payload: Payload
    origin: Origin
    nbytes: int


class Writer:
    """The writing half of the remote tier. Thread-safe."""

    def __init__(
        self,
        client: Client,
        fingerprint: bytes,
        ttl: int,
        reader: Reader,
        reach: Backoff,
        room: Backoff,
        stats: RemoteStats,
    ) -> None:
        """reach, room: whether the server answers, and whether it takes what is sent."""
        self._client = client
        self._fingerprint = fingerprint
        self._ttl = ttl
        self._reader = reader
        self._reach, self._room = reach, room
        self._stats = stats
        self._ledger: Ledger
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._queued_bytes = self.unsent = 0
        self._idle = threading.Condition()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def serve(self, ledger: Ledger) -> None:
        """What waits is accounted there; to be called once, before anything else."""
        self._ledger = ledger

    def offer(self, segment: Segment, payload: Payload, origin: Origin) -> None:
        """Send a sealed segment in the background, if the queue has room for it."""
        nbytes = len(payload) + origin.ids.nbytes
        with self._idle:
            if self._closed.is_set():
                return
            # While the tier holds the payload too it is counted twice, but takes no more memory:
            # the limit is not asked, and what is gathered next finds less room.
            room = self._ledger.limit // QUEUE_SHARE
            if (self.unsent and self._queued_bytes + nbytes > room) or nbytes > MAX_VALUE:
                self._stats.add(unsent=1)
                return
            self.unsent += 1
            self._queued_bytes += nbytes
            self._ledger.add("remote", nbytes)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._write_forever, name="krul-send", daemon=True
                )
                self._thread.start()
        self._queue.put(_Job(segment, payload, origin, nbytes))

    def wait_sent(self, timeout: float) -> bool:
        """Wait until nothing waits to be sent; False after ``timeout`` seconds."""
        with self._idle:
            return self._idle.wait_for(lambda: self.unsent == 0, timeout)

    def close(self) -> None:
        """Send nothing more; a round trip under way may still end."""
        self._closed.set()
        self._queue.put(None)

    def _write_forever(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                self._send(job)
            except Exception:
                logger.exception("remote tier: segment %d could not be sent", job.segment.id)
                self._stats.add(unsent=1)
            with self._idle:
                self.unsent -= 1
                self._queued_bytes -= job.nbytes
                self._ledger.add("remote", -job.nbytes)
                self._idle.notify_all()
            del job

    def _send(self, job: _Job) -> None:
        for _ in range(TRIES):
            # What memory let go of meanwhile is worth sending all the more; what turned out to be
            # damaged is not.
            if not self._wait_until_well() or job.segment.state is SegmentState.LOST:
                break
            try:
                if self._publish(job):
                    return
            except RemoteError as error:
                self._reach.failed(str(error))
        self._stats.add(unsent=1)

    def _wait_until_well(self) -> bool:
        """Wait for the server, however long it takes; False where the tier was closed."""
        while not self._closed.is_set():
            left = max(self._reach.seconds_left, self._room.seconds_left)
            if left:
                self._closed.wait(left)
            elif not self._reach.reason or self._reader.ping():
                return True
        return False

    def _publish(self, job: _Job) -> bool:
        origin = job.origin
        entry = Entry.of(
            self._fingerprint,
            origin.namespace,
            origin.ids,
            job.segment.start,
            job.payload,
            codec=job.segment.codec,
            exact_tokens=origin.exact_tokens,
            raw_bytes=job.segment.raw_bytes,
        )
        head = pack_head(entry)
        name = name_of(entry, len(head))
        keys = Keys(self._fingerprint, origin.namespace)
        where = keys.list_of(origin.ids, name.stop)
        if self._is_present(keys, where, name):
            self._stats.add(present=1)
            return True
        value = b"".join((head, job.payload))
        commands = [
            ("SET", keys.entry(name), value, "EX", self._ttl),
            ("ZADD", where, time.time(), name.file),
            ("ZREMRANGEBYRANK", where, 0, -LISTED - 1),
            ("EXPIRE", where, self._ttl),
        ]
        replies = self._client.exchange(commands, SEND_SECONDS)
        refused = next((reply for reply in replies if isinstance(reply, Exception)), None)
        if refused is not None:
            self._room.failed(str(refused))
            return False
        self._room.succeeded()
        self._stats.add(sent=1, sent_bytes=len(value))
        return True

    def _is_present(self, keys: Keys, where: str, name: EntryName) -> bool:
        """Whether an entry is there that makes ``name`` needless; it is kept as long again."""
        (listed,) = self._client.exchange(
            [("ZREVRANGE", where, 0, LISTED - 1)], ANSWER_SECONDS, LISTED * NAME_BYTES
        )
        for other in listed if isinstance(listed, list) else ():
            found = EntryName.parse(self._fingerprint, bytes(other).decode("ascii", "replace"))
            if found is None or found[1:4] != name[1:4] or found.end != name.end:
                continue
            if found.exact_tokens >= name.exact_tokens:
                used = [("EXPIRE", key, self._ttl) for key in (keys.entry(found), where)]
                if self._client.exchange(used, ANSWER_SECONDS)[0] == 1:
                    return True
        return False
