"""Run a real SGLang server as a child process: the demo, the tests and the benchmarks.

Only the command line and HTTP are used, so nothing here imports sglang.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any


class ServerFailedError(RuntimeError):
    """The server ended or did not come up; the message carries its last lines."""


def free_port() -> int:
    """A TCP port on the loopback that was free a moment ago.

    Not one of those the system hands out by itself (from 32768 on): between the choice and the
    server's own bind its ranks open sockets of that range, and have taken the port chosen.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free TCP port on the loopback in 100 tries between 20000 and 32000")


def has_gpu() -> bool:
    """Whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def faster_cpu_dtype() -> str:
    """``bfloat16`` where this CPU multiplies it at least as fast as float32.

    Without AVX-512 or AMX bfloat16 support a CPU emulates it several times slower.
    """
    import torch

    def seconds(dtype: torch.dtype) -> float:
        x, w = torch.randn(256, 512, dtype=dtype), torch.randn(512, 512, dtype=dtype)
        best = float("inf")
        for _ in range(4):
            began = time.perf_counter()
            torch.nn.functional.linear(x, w)
            best = min(best, time.perf_counter() - began)
        return best

    return "bfloat16" if seconds(torch.bfloat16) <= seconds(torch.float32) else "float32"


def server_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment a server starts in: CPU engine where there is no GPU, offline."""
    env = dict(os.environ)
    # A folder in the working directory must never shadow a package.
    env["PYTHONSAFEPATH"] = "1"
    env.setdefault("HF_HUB_OFFLINE", "1")
    if not has_gpu():
        env["SGLANG_USE_CPU_ENGINE"] = "1"
        # Two threads collapse as soon as another process is busy.
        env.setdefault("OMP_NUM_THREADS", "1")
    env.update(extra or {})
    return env


def _end_like_ctrl_c() -> None:
    in_main = threading.current_thread() is threading.main_thread()
    if in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)


class LiveServer:
    """``with LiveServer(model, ["--enable-krul"]) as server: server.generate(...)``."""

    def __init__(
        self,
        model: Path | str,
        flags: Sequence[str] = (),
        *,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
        ready_seconds: float = 240,
        entry: Sequence[str] = ("-m", "sglang.launch_server"),
        cwd: Path | None = None,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._ready_seconds = ready_seconds
        self._env = server_environment(env)
        self._work = None if cwd else tempfile.TemporaryDirectory(prefix="krul-server-")
        self._cwd = cwd or Path(self._work.name)  # type: ignore[union-attr]
        self.log = log or Path(tempfile.mkstemp(prefix="krul-server-", suffix=".log")[1])
        self._keep_log = log is not None
        flags = list(flags)
        device = [] if has_gpu() or "--device" in flags else ["--device", "cpu"]
        self.command = [
            sys.executable,
            *entry,
            "--model-path",
            str(Path(model).resolve() if Path(model).exists() else model),
            "--port",
            str(self.port),
            *device,
            *flags,
        ]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, progress: Callable[[float], None] | None = None) -> LiveServer:
        """Start and wait until it answers. Raises :class:`ServerFailedError`.

        From now on SIGTERM ends this process as Ctrl-C does, unless it has a handler of its own:
        the server, which leads a session of its own, would go on for ever.
        """
        _end_like_ctrl_c()
        self._cwd.mkdir(exist_ok=True)  # gone where the server had been stopped before
        with self.log.open("wb") as sink:
            self.process = self._spawn(sink)
        began = time.monotonic()
        try:
            while not self._answers():
                if self.process.poll() is not None:
                    raise ServerFailedError(
                        f"the server ended with exit code {self.process.returncode}:\n{self.tail()}"
                    )
                if time.monotonic() - began > self._ready_seconds:
                    raise ServerFailedError(
                        f"the server was not ready after {self._ready_seconds:.0f} s:\n"
                        f"{self.tail()}"
                    )
                if progress is not None:
                    progress(time.monotonic() - began)
                time.sleep(0.3)
        except BaseException:
            self.stop()
            raise
        return self

    def _spawn(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=self._env,
            cwd=self._cwd,
            start_new_session=True,
        )

    def _answers(self) -> bool:
        import requests

        try:
            return requests.get(f"{self.url}/health", timeout=5).status_code == 200
        except requests.RequestException:
            return False

    def tail(self, lines: int = 15) -> str:
        """The log's last lines, without the one-line dump of all server arguments."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        kept = [line for line in text.splitlines() if "server_args=" not in line]
        refusal = [line for line in kept if line.startswith("krul: error:")]
        return "\n".join(refusal or kept[-lines:])

    def post(self, path: str, body: dict[str, Any], timeout: float = 600) -> Any:
        """POST JSON, return JSON. Raises requests' errors."""
        import requests

        answer = requests.post(f"{self.url}{path}", json=body, timeout=timeout)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def generate(
        self, input_ids: Sequence[int], max_new_tokens: int, **sampling: Any
    ) -> dict[str, Any]:
        """Greedy ``/generate`` from token ids; the whole answer."""
        params = {"temperature": 0, "max_new_tokens": max_new_tokens, **sampling}
        return self.post("/generate", {"input_ids": list(input_ids), "sampling_params": params})

    def krul(self) -> dict[str, Any]:
        """The ``krul`` block of /server_info (the first rank's)."""
        import requests

        answer = requests.get(f"{self.url}/server_info", timeout=60)
        answer.raise_for_status()
        return answer.json()["internal_states"][0].get("krul", {})

    def flush(self) -> None:
        """``/flush_cache``; raises requests' errors when the server refuses."""
        import requests

        requests.post(f"{self.url}/flush_cache", timeout=60).raise_for_status()

    def stop(self) -> None:
        """End the server and everything it started. Idempotent."""
        process = self.process
        if process is not None:
            for sig, patience in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):
                try:
                    os.killpg(process.pid, sig)
                except ProcessLookupError:
                    break
                try:
                    process.wait(patience)
                except subprocess.TimeoutExpired:
                    continue
            # Children that ignored the first signal keep the group alive.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(5)
            self.process = None
        if self._work is not None:
            self._work.cleanup()

    def discard_log(self) -> None:
        """Remove a log file this object made itself."""
        if not self._keep_log:
            self.log.unlink(missing_ok=True)

    def __enter__(self) -> LiveServer:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        if kind is None:
            self.discard_log()
