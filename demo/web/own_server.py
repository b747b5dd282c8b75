"""The demo's own server: started under a progress line, started again when it dies."""

from __future__ import annotations

import threading
from collections.abc import Callable

from krul_sglang.live_server import LiveServer, ServerFailedError

RESTARTS = 5
LOOK = 1.0


class OwnServer:
    """Watches a started server from a thread of its own until :meth:`stop`."""

    def __init__(self, server: LiveServer, say: Callable[[str], None]) -> None:
        """say: prints a line for whoever started the demo."""
        self.server, self._say = server, say
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="own-server", daemon=True)

    def watch(self) -> None:
        """Start watching."""
        self._thread.start()

    def stop(self) -> None:
        """End the server for good. Idempotent."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=60)
        self.server.stop()
        self.server.discard_log()

    def _watch(self) -> None:
        restarts = 0
        while not self._closed.wait(LOOK):
            process = self.server.process
            if process is not None and process.poll() is None:
                continue
            restarts += 1
            if restarts > RESTARTS:
                self._say(f"the server ended {restarts} times; it is not started again")
                return
            tail = self.server.tail(5)
            self._say(f"the server ended; starting it again. Its last lines:\n{tail}")
            try:
                self.server.stop()
                self.server.start(self._still_wanted)
                self._say("the server is back")
            except (ServerFailedError, OSError) as error:
                self._say(str(error))
            except InterruptedError:
                return

    def _still_wanted(self, _: float) -> None:
        if self._closed.is_set():
            raise InterruptedError
