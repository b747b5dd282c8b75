"""Fixtures every test folder shares: the real chat model and live servers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import hypothesis
import pytest
from filelock import FileLock
from warm_server import WarmServer, Zygote

from krul_sglang.live_server import LiveServer, has_gpu
from krul_sglang.profile.base import ProfileError
from krul_sglang.profile.locate import load_ranks

if not has_gpu():
    # SGLang chooses its platform when it is first imported, also by in-process tests.
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background job ignores it, and so would every child that a test interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Other tests take the cores meanwhile: how long an example took says nothing.
hypothesis.settings.register_profile("shared", deadline=None)
hypothesis.settings.load_profile("shared")

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long the soak lasts: `make test-long ARGS=--soak-minutes=30`."""
    parser.addoption("--soak-minutes", type=float, default=2.0, help="default 2")


Serve = Callable[..., AbstractContextManager[LiveServer]]


@pytest.fixture(autouse=True)
def krul_environment() -> Iterator[None]:
    """No test leaves ``KRUL_*`` settings behind: a server started later would obey them."""
    before = {name: value for name, value in os.environ.items() if name.startswith("KRUL_")}
    yield
    for name in [name for name in os.environ if name.startswith("KRUL_")]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def chat_model() -> Path:
    """The folder of the real chat model."""
    if not (MODEL / "config.json").is_file():
        pytest.skip("the chat model is not prepared; run `make model`")
    return MODEL


@pytest.fixture(scope="session")
def chat_profile(chat_model: Path) -> Path:
    """The chat model's profile, made by `krul calibrate` (four minutes) if there is none."""
    path = chat_model.with_suffix(".krul.safetensors")
    with FileLock(f"{path}.lock"):  # test processes run side by side
        try:
            load_ranks(chat_model, path, 1)
        except ProfileError:
            krul = [sys.executable, "-m", "krul_sglang.cli", "calibrate"]
            subprocess.run([*krul, "--model", chat_model, "--out", path], check=True)
    return path


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote | None]:
    """What forks servers; None where each is to start anew."""
    if has_gpu() or os.environ.get("TEST_COLD_START"):
        yield None
        return
    zygote = Zygote()
    yield zygote
    zygote.close()


@pytest.fixture(scope="session")
def serve(chat_model: Path, zygote: Zygote | None) -> Serve:
    """``with serve("--enable-krul", ...) as server``: the chat model in float32.

    float32, because greedy tokens in bfloat16 may differ between two correct runs
    that put different numbers of rows through one forward pass. The leak check is
    strict: a leaked slot ends the server. Idle servers sleep: several are up at a time.
    killed: the test ends it by itself. cold: start it anew, imports and all.
    """

    @contextmanager
    def start(
        *flags: str,
        env: dict[str, str] | None = None,
        model: Path = chat_model,
        cwd: Path | None = None,
        killed: bool = False,
        cold: bool = False,
    ) -> Iterator[LiveServer]:
        strict = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1", **(env or {})}
        new = LiveServer
        if not (zygote is None or cold or "PYTHONPATH" in strict):
            new = partial(WarmServer, zygote)
        server = new(
            model,
            ["--dtype", "float32", "--sleep-on-idle", *flags],
            env=strict,
            cwd=cwd,
            ready_seconds=600,  # other tests take the cores meanwhile
        )
        try:
            server.start()
            yield server
            if killed:
                assert server.process is None, "the test was to kill it"
                return
            assert server.process is not None
            assert server.process.poll() is None, f"the server died:\n{server.tail(40)}"
            server.stop()
            server.discard_log()
        finally:
            server.stop()

    return start


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the tests of rare damage went through: the sums of each file's figures."""
    sums: dict[tuple[str, tuple[str, ...]], Counter[str]] = {}
    for report in terminalreporter.getreports("passed"):
        file = report.nodeid.partition("::")[0].rpartition("/")[2]
        for name, figures in report.user_properties:
            if name == "counts":
                sums.setdefault((file, tuple(figures)), Counter()).update(figures)
    if sums:
        terminalreporter.section("counts")
    for (file, names), figures in sorted(sums.items()):
        text = ", ".join(f"{name.replace('_', ' ')} {figures[name]}" for name in names)
        terminalreporter.write_line(f"{file}: {text}")
