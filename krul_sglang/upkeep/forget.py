"""``krul forget``: erases what is stored of one tenant."""

from __future__ import annotations

import json as json_format
from pathlib import Path

from krul_sglang.inspection.show import bytes_text, console
from krul_sglang.store.disk.entry import Namespace
from krul_sglang.store.disk.upkeep import forget
from krul_sglang.upkeep.place import (
    named,
    show_users,
    tier_directory,
    user_lines,
    users,
    working,
)


def run(directory: Path, cache_salt: str | None, extra_key: str | None, json: bool) -> int:
    """The exit code. Raises OSError and ValueError, each with a line for the user."""
    if cache_salt is None and extra_key is None:
        raise ValueError("whose? give --cache-salt, --extra-key or both")
    root = tier_directory(directory)
    with named(root), working("forgetting"):
        count, nbytes = forget(root, Namespace(extra_key, cache_salt))
    found = users(root)
    if json:
        body = {"directory": str(root), "entries": count, "bytes": nbytes}
        print(json_format.dumps({**body, "in_use_by": user_lines(found)}))
        return 0
    console().print(f"Removed {count} entries, {bytes_text(nbytes)}.")
    show_users(found)
    if found:
        console().print(
            "What a server still holds in memory it may store again: flush it (POST /flush_cache), "
            "then run this once more."
        )
    return 0
