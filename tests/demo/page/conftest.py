"""The web demo in a real browser: `demo/app.py` as a user starts it, with its own server."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from browsing import ANSWER, POOL, Demo

from krul_sglang.live_server import free_port, server_environment

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "demo"))

BROWSER = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run"),
)


@pytest.fixture(scope="session")
def demo(chat_model: Path, chat_profile: Path, tmp_path_factory) -> Iterator[Demo]:
    """The demo with a small pool; at the end Ctrl-C must stop it and its server."""
    log = tmp_path_factory.mktemp("demo") / "log"
    port = free_port()
    command = [sys.executable, str(ROOT / "demo" / "app.py"), "--port", str(port)]
    command += ["--model", str(chat_model), "--profile", str(chat_profile)]
    command += ["--pool", str(POOL), "--answer", str(ANSWER)]
    with log.open("w") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, env=server_environment(), text=True
        )
    try:
        until = time.monotonic() + 400
        while "The demo is at" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.3)
        server = re.search(r"server: (http\S+)", log.read_text())
        assert server is not None
        found = Demo(process, f"http://127.0.0.1:{port}", server[1])
        yield found
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, log.read_text()
        assert not psutil.wait_procs(children, timeout=10)[1], "its server outlived it"
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(60)


@pytest.fixture(scope="session")
def chromium() -> Iterator:
    """Debian's Chromium, driven by Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSER)), None)
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=list(QUIET))
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, demo: Demo) -> Iterator[Callable]:
    """``open_page(width, height, scheme)``: the demo in a tab of its own. No tab may have said
    anything on its console by the end."""
    said: list[str] = []
    contexts = []

    def start(width: int = 1280, height: int = 900, scheme: str = "light"):
        context = chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(150_000)
        page.on("console", lambda line: said.append(f"{line.type}: {line.text}"))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(demo.url)
        page.wait_for_selector("html.k-ready")
        page.wait_for_selector(".k-status:not(.k-down)")
        return page

    yield start
    for context in contexts:
        context.close()
    bad = [line for line in said if not line.startswith(("info", "log", "debug"))]
    assert not bad, bad


@pytest.fixture(autouse=True)
def offline(monkeypatch) -> None:
    """Nothing here may want the network."""
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
