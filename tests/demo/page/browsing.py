"""The demo from outside: its process and server, and what a visitor does on the page."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field

import psutil
import requests

POOL, ANSWER = 1536, 24
SHIFT = """
() => new Promise((done) => {
  let sum = 0;
  new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) if (!entry.hadRecentInput) sum += entry.value;
  }).observe({type: 'layout-shift', buffered: true});
  setTimeout(() => done(sum), 200);
})
"""


def card(page, number: int):
    return page.locator("#cards button").nth(number)


def state(page, number: int) -> str:
    return card(page, number).get_attribute("data-state")


def wait_for_state(page, number: int, wanted: str) -> None:
    page.wait_for_selector(f'#cards button[data-key="c{number}"][data-state="{wanted}"]')


def ask(page, question: str = "", number: int | None = None) -> None:
    """Ask in the conversation on the screen and wait for the whole answer."""
    before = page.locator("#turn .k-turn").count()
    if question:
        page.fill("#message textarea", question)
        page.press("#message textarea", "Enter")
    else:
        page.locator("#suggest button").first.click()
    page.wait_for_function(
        """before => document.querySelectorAll('#turn .k-turn').length > before
           && [...document.querySelectorAll('#turn .k-turn b')].every(time => time.innerText)
           && document.querySelector('#cards [aria-current]').dataset.state !== 'running'
           && !/Answering|Measuring|Waiting/.test(document.querySelector('#note').innerText)""",
        arg=before,
    )


def counts(page) -> dict[str, int]:
    found = page.locator("#turn [data-count]")
    return {
        one.get_attribute("data-count"): int(one.inner_text().replace(",", ""))
        for one in found.all()
    }


def press(page) -> None:
    """Create pressure and wait until everything idle is stored and encoded."""
    page.click("#press")
    page.wait_for_function(
        """() => [...document.querySelectorAll('#cards button')].every(
             card => ['stored', 'new', 'gone'].includes(card.dataset.state))"""
    )


def choose(page, number: int) -> None:
    card(page, number).click()
    page.wait_for_selector(f'#cards button[data-key="c{number}"][aria-current]')


@dataclass
class Demo:
    """A running `demo/app.py`. url: of the page; server: of the SGLang server it started."""

    process: subprocess.Popen[str]
    url: str
    server: str
    said: list[str] = field(default_factory=list)

    def krul(self) -> dict:
        """The server's ``krul`` block."""
        found = requests.get(f"{self.server}/server_info", timeout=60).json()
        return found["internal_states"][0]["krul"]

    def restores(self) -> list[dict]:
        """Its last restores, newest first."""
        return requests.get(f"{self.server}/krul/restores?limit=8", timeout=60).json()["restores"]

    def servers(self) -> list[psutil.Process]:
        """The processes of the server it started."""
        port = self.server.rsplit(":", 1)[1]
        return [
            child
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if port in child.cmdline()
        ]
