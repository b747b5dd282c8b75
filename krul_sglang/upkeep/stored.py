"""``krul inspect --dir``: what lies on the disk, without a server."""

from __future__ import annotations

import json as json_format
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from krul_sglang.inspection.identity import namespace_hash
from krul_sglang.inspection.show import (
    age_text,
    bytes_text,
    console,
    ratio_text,
    table_of,
)
from krul_sglang.store.disk.entry import Namespace
from krul_sglang.upkeep.place import (
    named,
    progress,
    show_users,
    tier_directory,
    user_lines,
    users,
)
from krul_sglang.upkeep.survey import Conversation, Kept, survey

TIER = "disk"


def run(directory: Path, name: str | None, limit: int, json: bool) -> int:
    """The exit code. Raises OSError and ValueError, each with a line for the user."""
    root = tier_directory(directory)
    with named(root), progress("reading headers") as bar:
        task = bar.add_task("", total=None)
        found = survey(root, lambda done, total: bar.update(task, completed=done, total=total))
    if name is not None:
        matching = [one for one in found.conversations if one.id.startswith(name)]
        if len({one.id for one in matching}) != 1:
            several = "several" if matching else "no"
            raise ValueError(f"{name}: {several} conversations' ids begin so; list them without it")
        body: dict[str, Any] = {"conversations": [detailed(one) for one in matching]}
        return _print(body) if json else _show_one(matching)
    holders = users(root)
    body = {
        "directory": str(root),
        "total": len(found.conversations),
        "entries": len(found.entries),
        "unreadable": found.unread,
        **sizes(found.entries),
        "in_use_by": user_lines(holders),
        "conversations": [line(one) for one in found.conversations[:limit]],
    }
    if json:
        return _print(body)
    out = console()
    if found.entries:
        _show_lines(out, body["conversations"])
        out.print(f"{len(body['conversations'])} of {body['total']} conversations, newest first.")
        total = f"{body['entries']} entries, {bytes_text(body['file_bytes'])} of files"
        out.print(f"{total}, {ratio_text(body['ratio'])} smaller than the KV they hold.")
    else:
        out.print("Nothing is stored.")
    if found.unread:
        out.print(f"{found.unread} headers cannot be read: see `krul verify`.")
    show_users(holders)
    return 0


def sizes(entries: Iterable[Kept]) -> dict[str, Any]:
    """Bytes of the files and of the KV they hold, and their quotient."""
    kept = list(entries)
    files, raw = sum(one.name.size for one in kept), sum(one.raw_bytes for one in kept)
    ratio = round(raw / files, 3) if files else None
    return {"file_bytes": files, "raw_bytes": raw, "ratio": ratio}


def line(one: Conversation) -> dict[str, Any]:
    """What the list says of a conversation."""
    names = [kept.name for kept in one.entries]
    return {
        "id": one.id,
        "tier": TIER,
        "model": names[0].fingerprint.hex()[:8],
        "namespace": namespace_id(one.entries[0].namespace),
        "age_seconds": round(max(0.0, time.time() - one.used), 1),
        "tokens": one.tokens,
        "stored_tokens": sum(name.tokens for name in names),
        "missing_tokens": one.missing,
        "exact_tokens": sum(name.exact_tokens for name in names),
        "segments": len(names),
        "codecs": sorted({kept.codec for kept in one.entries}),
        **sizes(one.entries),
    }


def detailed(one: Conversation) -> dict[str, Any]:
    """The same with its segments."""
    segments = [
        {
            "start": kept.name.start,
            "tokens": kept.name.tokens,
            "exact_tokens": kept.name.exact_tokens,
            "codec": kept.codec,
            "file": f"{kept.name.fingerprint.hex()}/{kept.name.shard}/{kept.name.file}",
            **sizes([kept]),
        }
        for kept in one.entries
    ]
    return {**line(one), "segments": segments}


def namespace_id(namespace: Namespace) -> str | None:
    """Tells tenants apart without telling their salts and keys; None where there are none."""
    return None if namespace == Namespace() else namespace_hash(*namespace).hexdigest()


def _print(body: dict[str, Any]) -> int:
    print(json_format.dumps(body))
    return 0


def _show_one(matching: list[Conversation]) -> int:
    out = console()
    for one in map(detailed, matching):
        _show_lines(out, [{**one, "segments": len(one["segments"])}])
        if one["missing_tokens"]:
            out.print(f"The {one['missing_tokens']} tokens before them are not stored any more.")
        names = ("start", "tokens", "exact", "codec", "bytes", "raw", "ratio")
        table = table_of(*names, title="Segments", left=("codec",))
        for own in one["segments"]:
            table.add_row(
                str(own["start"]),
                str(own["tokens"]),
                str(own["exact_tokens"]),
                own["codec"],
                bytes_text(own["file_bytes"]),
                bytes_text(own["raw_bytes"]),
                ratio_text(own["ratio"]),
            )
        out.print(table)
    return 0


def _show_lines(out: Console, lines: list[dict[str, Any]]) -> None:
    table = table_of("id", "tier", "model", "namespace", "tokens", "stored", "exact", "segments",
                     "bytes", "raw", "ratio", "codec", "age",
                     left=("id", "tier", "model", "namespace", "codec"))  # fmt: skip
    for one in lines:
        table.add_row(
            one["id"],
            one["tier"],
            one["model"],
            one["namespace"] or "-",
            str(one["tokens"]),
            str(one["stored_tokens"]),
            str(one["exact_tokens"]),
            str(one["segments"]),
            bytes_text(one["file_bytes"]),
            bytes_text(one["raw_bytes"]),
            ratio_text(one["ratio"]),
            ", ".join(one["codecs"]),
            age_text(one["age_seconds"]),
        )
    out.print(table)
