"""The switch between policies, in the browser."""

from __future__ import annotations

import re

import pytest

pytestmark = [pytest.mark.server, pytest.mark.long]


def test_policies_are_compared_on_the_same_conversation(open_page) -> None:
    page = open_page()
    page.get_by_role("tab", name="Compare policies").click()
    for name in ("lossless", "fixed", "paper"):
        page.locator("#policies").get_by_label(name).uncheck()
    page.click("#run")
    page.wait_for_selector("#compared .k-working")
    for name in ("recompute", "predictive"):
        page.wait_for_selector(
            f'#compared tr[data-policy="{name}"][data-state="done"]', timeout=240_000
        )

    def cell(policy: str, name: str) -> str:
        return page.locator(f'tr[data-policy="{policy}"] td[data-name="{name}"]').inner_text()

    assert cell("recompute", "restored") == "0"
    assert int(cell("recompute", "computed")) > 300
    assert int(cell("predictive", "restored")) > 300
    assert int(cell("predictive", "computed")) < 100
    assert re.search(r"MB \([0-9.]+x\)", cell("predictive", "stored"))
    assert cell("recompute", "same answer").startswith("100 %")
    for name in ("recompute", "predictive"):
        assert re.fullmatch(r"[0-9.]+ s.*", cell(name, "first token"))
