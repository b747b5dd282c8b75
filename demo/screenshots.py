"""Pictures of the web demo for the docs: `python demo/screenshots.py URL docs/`.

Holds two conversations on a demo that is running, evicts both, comes back to one, and takes what a
visitor sees then: on a desktop in light and dark, on a phone, and the comparison of policies.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import ViewportSize

BROWSER = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--force-color-profile=srgb", "--hide-scrollbars"]
SCREEN: ViewportSize = {"width": 1440, "height": 900}
PHONE: ViewportSize = {"width": 390, "height": 1500}
CALM = """() => !document.querySelector('#note .k-busy')
  && document.querySelector('#cards [aria-current]').dataset.state !== 'running'"""
EVICTED = """() => [...document.querySelectorAll('#cards button')].every(
  card => ['stored', 'new'].includes(card.dataset.state))"""
MINUTES = 60_000


def ask(page: Any, key: str, questions: int) -> None:
    """Ask suggested questions in a conversation."""
    page.click(f'#cards button[data-key="{key}"]')
    page.wait_for_selector(f'#cards button[data-key="{key}"][aria-current]')
    for _ in range(questions):
        before = page.locator("#turn .k-turn").count()
        page.locator("#suggest button").first.click()
        page.wait_for_function(
            "before => document.querySelectorAll('#turn .k-turn').length > before"
            " && [...document.querySelectorAll('#turn .k-turn b')].every(time => time.innerText)",
            arg=before,
        )
        page.wait_for_timeout(500)
        page.wait_for_function(CALM)


def dark(page: Any, wanted: bool) -> None:
    """Switch to a scheme."""
    if page.evaluate("document.body.classList.contains('dark')") != wanted:
        page.click(".k-theme")
    page.mouse.move(0, 0)
    page.wait_for_timeout(600)


def take(url: str, out: Path, compared: bool) -> list[Path]:
    """Take all pictures; returns where they are."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, BROWSER)), None)
    if path is None:
        raise SystemExit("screenshots: error: no Chromium: apt-get install chromium")
    taken = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        page = browser.new_page(viewport=SCREEN, color_scheme="light", device_scale_factor=1.5)
        page.set_default_timeout(5 * MINUTES)

        def shoot(name: str, whole: bool = True) -> None:
            taken.append(out / f"demo_{name}.png")
            page.screenshot(path=taken[-1], full_page=whole)
            image = Image.open(taken[-1])
            image.quantize(256, dither=Image.Dither.NONE).save(taken[-1], optimize=True)
            print(f"  {taken[-1]}: {taken[-1].stat().st_size / 1e3:.0f} kB")

        page.goto(url)
        page.wait_for_selector("html.k-ready")
        page.wait_for_selector(".k-status:not(.k-down)")
        ask(page, "c1", 2)
        ask(page, "c0", 2)
        page.wait_for_selector('#cards button[data-key="c0"][data-state="device"]')
        page.click("#press")
        page.wait_for_function(EVICTED)
        page.wait_for_timeout(2500)
        ask(page, "c0", 1)
        page.wait_for_timeout(2500)
        for name, scheme in (("light", False), ("dark", True)):
            dark(page, scheme)
            shoot(name)
        if compared:
            page.get_by_role("tab", name="Compare policies").click()
            page.click("#run")
            page.wait_for_selector("#compared .k-working")
            page.wait_for_function(
                "() => !document.querySelector('#compared .k-working')"
                " && !document.querySelector('#compared [data-state=waiting]')",
                timeout=30 * MINUTES,
            )
            dark(page, False)
            shoot("compare")
            page.get_by_role("tab", name="Chat").click()
        dark(page, False)
        page.set_viewport_size(PHONE)
        page.wait_for_timeout(800)
        shoot("phone", whole=False)
        browser.close()
    return taken


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="where the demo runs")
    parser.add_argument("out", type=Path, help="folder of the pictures")
    parser.add_argument("--compare", action="store_true", help="also compare all policies: minutes")
    chosen = parser.parse_args()
    take(chosen.url, chosen.out, chosen.compare)
    return 0


if __name__ == "__main__":
    sys.exit(main())
