"""A real Redis or Valkey server on a port of this machine, and what tests do to it."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from krul_sglang.live_server import free_port

NAMES = ("redis-server", "valkey-server")


class RedisServer:
    """Started on construction, in memory only. Raises RuntimeError where it does not come up."""

    def __init__(self, folder: Path, *flags: str) -> None:
        binary = next(filter(None, map(shutil.which, NAMES)), None)
        if binary is None:
            pytest.skip(f"there is no {' or '.join(NAMES)} (Debian: apt-get install redis-server)")
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        where = ("--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(folder))
        unsaved = ("--save", "", "--appendonly", "no")
        self._command = [binary, *where, *unsaved, *flags]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it (again, on the same port, with nothing in it)."""
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(self._command, stdout=quiet, stderr=quiet, stdin=quiet)
        until = time.monotonic() + 10
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{self._command[0]} did not come up")
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as probe:
                probe.sendall(b"PING\r\n")
                return probe.recv(1) != b""
        except OSError:
            return False

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def client(self):
        """A plain client, to look at what is stored and to damage it."""
        import redis

        return redis.Redis.from_url(self.url)
