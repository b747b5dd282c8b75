"""Imports SGLang once, then forks a server for each request it reads.

    python tests/zygote.py SOCKET

A request is one JSON line: ``argv``, ``env``, ``cwd``, ``log``. Answered with the server's process
id, and when it has ended with its exit code, a line each. Starts nothing that a fork would lose:
no thread, no parallel region. Ends when its standard input does, and its servers with it: a test
runner that is killed leaves none behind.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import selectors
import signal
import socket
import sys
from typing import Any

import setproctitle

MODULES = (
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.model_executor.model_runner",
    "sglang.srt.layers.attention.torch_native_backend",
    "sglang.srt.mem_cache.unified_radix_cache",
    "sglang.srt.models.registry",
)
"""What a server of the tests imports, most of it. None of Krul: that is what is tested."""


def _fork_children() -> None:
    """Have SGLang fork its own processes, too, where it asks for them to be spawned."""
    original = multiprocessing.set_start_method

    def choose(method: str | None, force: bool = False) -> None:
        original("fork" if method == "spawn" else method, force=force)

    multiprocessing.set_start_method = choose


def serve(request: dict[str, Any]) -> int:
    """In the child: be the server. Returns its exit code."""
    os.setsid()
    with open(os.devnull) as nothing, open(request["log"], "wb") as log:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = ["sglang.launch_server", *request["argv"]]
    _fork_children()
    try:
        runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return 1
    return 0


def main() -> None:
    """Command line."""
    for name in MODULES:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would be lost in a fork"
    setproctitle.getproctitle()  # finds where titles go while the environment is as it was
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(sys.argv[1])
    listener.listen()
    print("ready", flush=True)
    waiting: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in selector.select(0.1)}
            if sys.stdin in ready:
                for process in waiting:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process, signal.SIGKILL)
                return
            if listener in ready:
                connection, _ = listener.accept()
                with connection.makefile() as lines:
                    request = json.loads(lines.readline())
                process = os.fork()
                if process == 0:
                    for one in (listener, connection, *waiting.values()):
                        one.close()
                    selector.close()
                    code = serve(request)
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
                connection.sendall(f"{process}\n".encode())
                waiting[process] = connection
            while waiting:
                process, status = os.waitpid(-1, os.WNOHANG)
                if process == 0:
                    break
                connection = waiting.pop(process)
                connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                connection.close()


if __name__ == "__main__":
    main()
