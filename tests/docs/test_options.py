"""Flags of scripts and of SGLang's server on the pages are flags that they take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT
from rules import Options, WrongError, commands, judged

from krul_sglang.live_server import server_environment

pytestmark = pytest.mark.process


def wanted() -> list[Options]:
    """All flags to be looked up; commands that are wrong anyway are another test's."""
    found = []
    for command in commands():
        try:
            found += [later for later in judged(command) if isinstance(later, Options)]
        except WrongError:
            continue
    return found


def test_flags_exist(record_property) -> None:
    asked = wanted()
    programs = sorted({one.of for one in asked})
    child = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("options_child.py"))],
        input=json.dumps(programs),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=server_environment(),
        check=False,
    )
    line = next((x for x in child.stdout.splitlines() if x.startswith("OPTIONS")), None)
    assert line is not None, child.stderr[-2000:]
    known = json.loads(line.removeprefix("OPTIONS"))
    assert {"--enable-krul", "--krul-policy", "--model-path"} <= set(known["sglang"])
    for program, options in known.items():
        assert len(options) > 1, f"{program}: {options}"
    wrong = [
        f"{one.command}\n    {one.of} has no {flag}"
        for one in asked
        for flag in one.flags
        if flag not in known[one.of]
    ]
    assert not wrong, "\n".join(wrong)
    flags = sum(len(one.flags) for one in asked)
    record_property("counts", {"flags_looked_up": flags, "programs_asked": len(programs)})
