"""``krul gc``: removes what was not used, what does not fit, and what dead writers left."""

from __future__ import annotations

import json as json_format
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from krul_sglang.config import parse_size
from krul_sglang.inspection.show import bytes_text, console
from krul_sglang.store.disk.upkeep import gc
from krul_sglang.upkeep.place import named, tier_directory, working

_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_T = TypeVar("_T")


def parse_duration(text: str) -> float:
    """Seconds from ``30d``, ``1.5h``, ``90min``, ``45s``. Raises ValueError."""
    match = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]+)?)\s*([a-z]+)\s*", text)
    if match is None or match[2] not in _UNITS:
        raise ValueError("a duration such as 30d, 12h, 90min or 45s")
    return float(match[1]) * _UNITS[match[2]]


def run(directory: Path, limit: str | None, unused_for: str | None, json: bool) -> int:
    """The exit code. Raises OSError and ValueError, each with a line for the user."""
    nbytes = None if limit is None else _parsed("--limit", limit, parse_size)
    seconds = None if unused_for is None else _parsed("--unused-for", unused_for, parse_duration)
    root = tier_directory(directory)
    with named(root), working("collecting"):
        found = gc(root, nbytes, seconds)
    if json:
        print(json_format.dumps({"directory": str(root), **asdict(found)}))
        return 0
    console().print(
        f"Removed {found.evicted} entries ({bytes_text(found.evicted_bytes)}) and "
        f"{found.abandoned} files of dead writers; set {found.damaged} damaged ones aside."
    )
    console().print(f"{found.entries} entries are left, {bytes_text(found.used)} of disk.")
    return 0


def _parsed(flag: str, text: str, parse: Callable[[str], _T]) -> _T:
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"{flag}={text}: not accepted; expected {error}") from None
