"""``krul verify``: reads everything that is stored, and sets aside what is damaged."""

from __future__ import annotations

import json as json_format
from collections import Counter
from pathlib import Path

from krul_sglang.inspection.show import bytes_text, console
from krul_sglang.store.disk.upkeep import Checked, Verdict, verify
from krul_sglang.upkeep.place import DAMAGE_FOUND, named, progress, tier_directory


def run(directory: Path, json: bool) -> int:
    """The exit code: 1 where anything was damaged or could not be read. Raises OSError and
    ValueError, each with a line for the user."""
    root = tier_directory(directory)
    counts: Counter[Verdict] = Counter()
    bad: list[Checked] = []
    nbytes = 0
    with named(root), progress("verifying") as bar:
        task = bar.add_task("", total=None)
        for checked in verify(root):
            counts[checked.verdict] += 1
            nbytes += checked.name.size
            bar.update(task, completed=checked.done, total=checked.total)
            if checked.verdict is not Verdict.SOUND:
                bad.append(checked)
    if json:
        figures = {verdict.name.lower(): counts[verdict] for verdict in Verdict}
        body = {"directory": str(root), "bytes": nbytes, **figures}
        print(json_format.dumps({**body, "bad": list(map(_fields, bad))}))
    else:
        for one in bad:
            console().print(f"{one.name.file}: {one.verdict.value}: {one.reason}")
        told = ", ".join(f"{counts[v]} {v.value}" for v in Verdict if counts[v])
        console().print(f"{counts.total()} entries, {bytes_text(nbytes)}: {told or 'none'}.")
    return DAMAGE_FOUND if counts[Verdict.DAMAGED] or counts[Verdict.UNREADABLE] else 0


def _fields(one: Checked) -> dict[str, str]:
    return {"file": one.name.file, "verdict": one.verdict.name.lower(), "reason": one.reason}
