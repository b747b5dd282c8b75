"""Every command of the pages names programs, targets, commands, files and settings that exist."""

from __future__ import annotations

import re

import pytest
from pages import PAGES, calls, name_of
from rules import WrongError, commands, judged

from krul_sglang.config import settings


def test_commands_are_right(record_property) -> None:
    """All at once, so that one run shows everything that is wrong."""
    found, wrong = commands(), []
    for command in found:
        try:
            judged(command)
        except WrongError as error:
            wrong.append(f"{command}\n    {error}")
    assert not wrong, "\n".join(wrong)
    assert len(found) > 60
    record_property("counts", {"pages": len(PAGES), "commands": len(found)})


def test_settings_exist() -> None:
    """`--krul-...` and `KRUL_...` on a page are settings, or a plain prefix of one."""
    known = {setting.flag for setting in settings()} | {setting.env for setting in settings()}
    for page in PAGES:
        for name in re.findall(r"--krul-[a-z-]*[a-z]|\bKRUL_[A-Z_]*[A-Z]", page.read_text()):
            assert name in known, f"{name_of(page)}: {name} is no setting"


WRONG = {
    "make tset": "the Makefile has no target 'tset'",
    "make demo ARG=1": "the Makefile has no variable 'ARG'",
    "krul inspekt": "krul has no command 'inspekt'",
    "krul inspect --details": "No such option: --details",
    "krul trace --limit many": "Invalid value for '--limit'",
    "krul gc --limit 1GB": "Missing argument",
    "python benchmarks/none.py": "there is no benchmarks/none.py",
    "python -m pytest tests/none.py": "there is no tests/none.py",
    "python -m nothing": "no rule in tests/docs/rules.py checks 'python -m nothing'",
    "pip install .[benhc]": "pyproject.toml has no extra 'benhc'",
    "pip install sglang==0.5.22": "pyproject.toml pins sglang==0.5.23, not sglang==0.5.22",
    "pip install left-pad": "pyproject.toml does not name 'left-pad'",
    "curl localhost:8000/health": "the pages' server listens on port 30000, not 8000",
    "curl https://example.com": "it asks no server on this machine",
    "docker run krul": "no rule in tests/docs/rules.py checks 'docker'",
    "KRUL_POLICI=lossless krul doctor": "KRUL_POLICI is no setting",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_is_found(line: str) -> None:
    (command,) = calls("page:1", line)
    with pytest.raises(WrongError, match=re.escape(WRONG[line])):
        judged(command)
