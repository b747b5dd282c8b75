"""The directory a command is given: whether it is a disk tier's, and who uses it now."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from krul_sglang.inspection.show import age_text, console
from krul_sglang.store.disk.directory import LAYOUT
from krul_sglang.store.disk.lease import Holder
from krul_sglang.store.disk.upkeep import in_use

DAMAGE_FOUND = 1
"""Exit code where a command did its work and found damage."""


def tier_directory(path: Path) -> Path:
    """``path``, if a disk tier lies there. Raises ValueError or OSError with one line."""
    path = path.expanduser()
    try:
        kept = {one.name for one in path.iterdir()}
    except FileNotFoundError:
        raise ValueError(f"{path}: no such directory; give the server's --krul-dir") from None
    except NotADirectoryError:
        raise ValueError(f"{path}: not a directory; give the server's --krul-dir") from None
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{path}: cannot be listed ({reason}); run as the server's user") from None
    if LAYOUT not in kept:
        raise ValueError(f"{path}: holds no {LAYOUT}/ of a disk tier; give the server's --krul-dir")
    return path


@contextmanager
def named(root: Path) -> Iterator[None]:
    """An OSError from inside is raised as one line that names the directory and the fix."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{root}: {reason}; run as the server's user, on a writable disk") from None


def progress(what: str) -> Progress:
    """A bar on the terminal, on standard error, so that what is printed can be piped."""
    err = Console(stderr=True)
    return Progress(
        TextColumn(what),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )


@contextmanager
def working(what: str) -> Iterator[None]:
    """The same for something of unknown length."""
    with progress(what) as bar:
        bar.add_task("", total=None)
        yield


def users(root: Path) -> list[Holder]:
    """Servers that use the directory now; none where that cannot be told."""
    try:
        return in_use(root)
    except OSError:
        return []


def user_lines(found: list[Holder]) -> list[dict[str, Any]]:
    """The same for JSON."""
    return [{"pid": one.pid, "host": one.host, "started": one.started} for one in found]


def show_users(found: list[Holder]) -> None:
    """One line a server."""
    for one in found:
        since = f" for {age_text(max(0.0, time.time() - one.started))}" if one.started else ""
        console().print(f"In use by process {one.pid or '?'} on {one.host or '?'}{since}.")
