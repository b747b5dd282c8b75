"""Live servers that start in a fraction of the time: forked from a process that imported SGLang.

Two thirds of a start are the imports of three processes. What is left out is only those: the same
command line is parsed by the same main module, the plugin is loaded as ever, and SGLang starts
its processes itself. ``TEST_COLD_START=1`` starts every server anew.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from krul_sglang.live_server import LiveServer, server_environment

ZYGOTE = Path(__file__).with_name("zygote.py")


class Forked:
    """A server's process as :class:`subprocess.Popen` would show it; another's child."""

    def __init__(self, connection: socket.socket) -> None:
        self._lines = connection.makefile("rb")
        self._connection = connection
        self.pid = int(self._lines.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises :class:`subprocess.TimeoutExpired`."""
        import select

        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("server", timeout or 0)
            # Nothing but an end of file where the zygote itself was killed.
            self.returncode = int(self._lines.readline() or -signal.SIGKILL)
            self._connection.close()
        return self.returncode


class Zygote:
    """The process that forks servers. To be closed."""

    def __init__(self) -> None:
        self._work = tempfile.TemporaryDirectory(prefix="krul-warm-")
        self._address = str(Path(self._work.name) / "socket")
        self._log = Path(self._work.name) / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ZYGOTE), self._address],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**server_environment(), "OPENBLAS_NUM_THREADS": "1"},
                cwd=self._work.name,
                start_new_session=True,
            )
        assert self.process.stdout is not None
        if not self.process.stdout.readline():
            raise RuntimeError(f"no server can be forked:\n{self._log.read_text()[-2000:]}")

    def fork(self, argv: list[str], env: dict[str, str], cwd: Path, log: str) -> Forked:
        """A server that runs ``python -m sglang.launch_server ARGV``."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(self._address)
        request: dict[str, Any] = {"argv": argv, "env": env, "cwd": str(cwd), "log": log}
        connection.sendall(json.dumps(request).encode() + b"\n")
        return Forked(connection)

    def close(self) -> None:
        """End it, and every server it forked."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(20)
        self._work.cleanup()


class WarmServer(LiveServer):
    """A live server that a zygote forks."""

    def __init__(
        self, zygote: Zygote, model: Path | str, flags: Sequence[str], **more: Any
    ) -> None:
        super().__init__(model, flags, **more)
        self._zygote = zygote

    def _spawn(self, log: IO[bytes]) -> Any:
        arguments = self.command[self.command.index("--model-path") :]
        return self._zygote.fork(arguments, self._env, self._cwd, log.name)
