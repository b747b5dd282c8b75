"""Round trips to the server: several commands at once, within bounds of time and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from krul_sglang.store.remote.address import Address
from krul_sglang.store.remote.limits import CONNECTIONS, limited

ANSWER_SECONDS = 1.0
"""Within which a server that is well connects, and answers what costs nothing to carry."""
READ_BYTES = 1 << 18
"""Received at once; the client's default makes four times as many calls."""
SLACK_BYTES = 1 << 16
"""What the protocol and error messages add to a reply."""

Command = tuple[Any, ...]


class RemoteError(Exception):
    """The server cannot be reached, does not answer, or does not let us in."""


class Client:
    """Thread-safe; each thread that is in an exchange has a connection of its own."""

    def __init__(self, address: Address) -> None:
        """Connects when something is first asked for."""
        pool = redis.ConnectionPool.from_url(
            address.url,
            connection_class=CONNECTIONS[address.url.partition(":")[0]],
            protocol=2,  # every server speaks it
            socket_read_size=READ_BYTES,
            socket_connect_timeout=ANSWER_SECONDS,
            socket_timeout=ANSWER_SECONDS,
            # Who asks knows better than the client how long it is worth trying.
            retry=Retry(NoBackoff(), 0),
        )
        self._redis = redis.Redis(connection_pool=pool)

    def exchange(
        self, commands: Sequence[Command], seconds: float, reply_bytes: int = 0
    ) -> list[Any]:
        """One round trip; the replies in order, an exception in place of a reply that is one.

        reply_bytes: that the replies may take. Raises :class:`RemoteError`, after ``seconds``
        at the latest, but for the look-up of the server's name.
        """
        try:
            with limited(seconds, reply_bytes + SLACK_BYTES):
                pipeline = self._redis.pipeline(transaction=False)
                for command in commands:
                    pipeline.execute_command(*command)
                return pipeline.execute(raise_on_error=False)
        except Exception as error:
            # What the client makes of a reply of another shape than its command's may be a
            # TypeError as well: whatever it is, the server did not answer.
            raise RemoteError(str(error) or type(error).__name__) from error

    def close(self) -> None:
        """Drop the connections that are not in use."""
        self._redis.connection_pool.disconnect(inuse_connections=False)
