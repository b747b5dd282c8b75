"""docs/compatibility.md says what the code does, and names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

from krul_sglang.cli import BEGIN, END
from krul_sglang.runtime.compat import refusals_table

TESTS = Path(__file__).resolve().parent.parent
PAGE = TESTS.parent / "docs" / "compatibility.md"


def test_refusals_table_is_current():
    """The generated part is what `make docs` would write now."""
    generated = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    assert generated.strip() == refusals_table().strip(), "run `make docs`"


def test_named_tests_exist():
    """Each `file.py::test[case]`, and each `[case]` after it, is really there."""
    source, named = "", 0
    for quoted in re.findall(r"`([^`]+)`", PAGE.read_text().partition(BEGIN)[0]):
        match = re.fullmatch(
            r"([a-z_]+/test_[a-z_]+\.py)?(?:::(test_\w+))?(?:\[([\w-]+)\])?", quoted
        )
        if match is None:
            continue
        file, test, case = match.groups()
        if file:
            source = (TESTS / file).read_text()
        if test:
            assert f"def {test}(" in source, quoted
        if case:
            assert f'"{case}":' in source, quoted
        named += 1
    assert named > 40
