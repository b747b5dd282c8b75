"""The page on a live server: what it shows is what the server tells."""

from __future__ import annotations

import re
import statistics
import time

import pytest
from browsing import POOL, SHIFT, ask, card, choose, counts, press, state, wait_for_state

pytestmark = pytest.mark.server


def test_a_conversation_is_evicted_and_comes_back(demo, open_page) -> None:
    page = open_page()
    assert [state(page, n) for n in range(3)] == ["new"] * 3
    ask(page)
    first = counts(page)
    assert first["device"] == first["restored"] == first["recomputed"] == 0
    assert first["new"] > 300, "the first message carries a document"
    wait_for_state(page, 0, "device")
    choose(page, 1)
    assert page.locator("#chat .message").count() == 0
    ask(page, "How long does it keep?")
    wait_for_state(page, 1, "device")
    press(page)
    assert (state(page, 0), state(page, 1)) == ("stored", "stored")
    choose(page, 0)
    before = demo.krul()["restored_tokens"]
    ask(page)
    shown, trace = counts(page), demo.restores()[0]
    assert shown["restored"] > 300
    assert shown["restored"] == trace["tokens"] == demo.krul()["restored_tokens"] - before
    assert shown["recomputed"] + shown["new"] == trace["recomputed_tokens"] + trace["new_tokens"]
    assert first["new"] <= shown["device"] + shown["restored"] + shown["recomputed"]
    wait_for_state(page, 0, "device")
    # What it cost, and what a recompute did, both measured.
    times = {
        one.get_attribute("data-time"): one.inner_text()
        for one in page.locator("#turn [data-time]").all()
    }
    assert all(re.fullmatch(r"[0-9.]+ s", text) for text in times.values()), times
    # Panels.
    text = page.locator("#turn").inner_text()
    assert re.search(r"[0-9.]+ MB of [0-9.]+ MB raw, [0-9.]+ times smaller", text)
    assert re.search(r"within 0\.01 nats at .* step", text)
    rows = page.locator("#strategy .k-heat-row:not(.k-heat-names):not(.k-heat-arcs)")
    assert rows.count() >= 6
    assert all(row.locator("i").count() == 30 for row in rows.all())
    assert page.locator("#strategy path").count() == 29, "every layer but the first is predicted"
    assert page.locator("#similarity i[title]").count() == 15 * 15
    lanes = page.locator("#lanes .k-lane span")
    assert {"decode", "compute"} <= set(lanes.all_inner_texts())
    assert page.locator("#lanes .k-track i").count() >= 60
    assert page.locator("#storage path").count() >= 2
    assert page.evaluate(SHIFT) < 0.1, "the page moved under the reader"


def test_the_automatic_mode_evicts_what_is_idle(open_page) -> None:
    page = open_page()
    ask(page)
    wait_for_state(page, 0, "device")
    page.locator("#auto input").check()
    wait_for_state(page, 0, "stored")


def test_a_conversation_that_outgrows_the_pool_is_told_so(open_page) -> None:
    page = open_page()
    page.click("#new")
    page.wait_for_selector('#cards button[data-key="c3"][aria-current]')
    page.fill("#message textarea", "one two three four five " * POOL)
    page.press("#message textarea", "Enter")
    page.wait_for_selector("#note .k-bad")
    assert f"the pool holds {POOL:,}" in page.locator("#note").inner_text()
    assert page.locator("#chat .message").count() == 0, "the question is taken back"
    ask(page, "Say hello.")
    assert page.locator("#note .k-bad").count() == 0


def test_it_is_used_by_keyboard_and_the_focus_is_seen(open_page) -> None:
    page = open_page()
    card(page, 0).focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_selector('#cards button[data-key="c1"][aria-current]')
    focused = page.evaluate(
        """() => { const seen = getComputedStyle(document.activeElement);
             return [document.activeElement.dataset.key, seen.outlineStyle, seen.outlineWidth]; }"""
    )
    assert focused == ["c1", "solid", "3px"]
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.tagName") == "TEXTAREA":
            break
    page.keyboard.type("Hello?")
    assert page.locator("#message textarea").input_value() == "Hello?"


def test_it_fits_a_phone(open_page) -> None:
    page = open_page(390, 844)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_role("tab", name="Compare policies").click()
    page.wait_for_selector("#compared table")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(open_page, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = open_page(scheme=scheme)
    assert page.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")
    ask(page)
    for tab in ("Chat", "Compare policies"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(500)
        found = [
            (one["id"], one["impact"], [node["html"][:160] for node in one["nodes"][:3]])
            for one in axe.run(page).response["violations"]
            if one["impact"] in ("serious", "critical")
        ]
        assert not found, found
    page.click(".k-theme")
    assert page.evaluate("document.body.classList.contains('dark')") == (scheme != "dark")


@pytest.mark.long
def test_eight_visitors_at_once(demo, open_page) -> None:
    """All are answered, and the page answers to a click meanwhile; how soon is printed (-s)."""

    def click(page) -> float:
        began = time.perf_counter()
        choose(page, 1)
        choose(page, 0)
        return (time.perf_counter() - began) / 2

    pages = [open_page() for _ in range(8)]
    alone = statistics.median(click(pages[0]) for _ in range(3))
    for page in pages:
        page.locator("#suggest button").first.click()
    together = statistics.median(click(page) for page in pages)
    # The same cores run the server's model and all eight tabs.
    print(f"a click took {together:.2f} s, {alone:.2f} s while nobody asked")
    for page in pages:
        page.wait_for_function(
            """() => document.querySelector('#cards [aria-current]').dataset.state !== 'running'
               && document.querySelectorAll('#turn .k-turn').length === 1"""
        )
        assert counts(page)["new"] > 300


def test_the_server_is_killed_and_comes_back(demo, open_page) -> None:
    page = open_page()
    ask(page)
    for process in demo.servers():
        process.kill()
    page.wait_for_selector("#note .k-bad")
    assert "cannot be reached" in page.locator("#note").inner_text()
    assert "down" in page.locator("#status").inner_text()
    page.wait_for_selector(".k-status:not(.k-down)", timeout=300_000)
    wait_for_state(page, 0, "gone")
    ask(page)
    again = counts(page)
    assert again["recomputed"] > 300, "it had been computed before the server died"
    assert again["restored"] == 0
