"""``krul forget``: erases what is stored of one tenant."""

from __future__ import annotations

import importlib.util
import json as json_format
from pathlib import Path

from krul_sglang.inspection.show import bytes_text, console
from krul_sglang.store.disk.entry import Namespace
from krul_sglang.store.disk.upkeep import forget
from krul_sglang.store.remote.address import parse_address, without_password
from krul_sglang.upkeep.place import (
    named,
    show_users,
    tier_directory,
    user_lines,
    users,
    working,
)


def run(where: str, cache_salt: str | None, extra_key: str | None, json: bool) -> int:
    """where: a directory, or the URL of a remote tier. Returns the exit code. Raises OSError and
    ValueError, each with a line for the user."""
    if cache_salt is None and extra_key is None:
        raise ValueError("whose? give --cache-salt, --extra-key or both")
    if "://" in where:
        return _run_remote(where, Namespace(extra_key, cache_salt), json)
    root = tier_directory(Path(where))
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


def _run_remote(url: str, namespace: Namespace, json: bool) -> int:
    if importlib.util.find_spec("redis") is None:
        raise ValueError('the client package is missing; run `pip install "krul-sglang[remote]"`')
    from krul_sglang.store.remote.erase import erase

    try:
        shown = parse_address(url).shown
    except ValueError as error:
        raise ValueError(f"{without_password(url)}: expected {error}") from None
    with working("forgetting"):
        count, nbytes = erase(url, namespace)
    if json:
        print(json_format.dumps({"remote": shown, "entries": count, "bytes": nbytes}))
    else:
        console().print(
            f"Removed {count} entries, {bytes_text(nbytes)}. What servers still hold they may send "
            "again: flush them (POST /flush_cache) before."
        )
    return 0
