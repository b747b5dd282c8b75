"""Damaged files, set aside for a look at them: a few, the oldest of them removed."""

from __future__ import annotations

import contextlib
import os
import stat
import time

from krul_sglang.store.disk.directory import QUARANTINE, Directory
from krul_sglang.store.disk.entry import EntryName

MAX_FILES = 32
MAX_BYTES = 256 << 20
"""What may lie in quarantine, beside the tier's own budget."""


def quarantine(directory: Directory, name: EntryName) -> bool:
    """Move a damaged file out of the way; False where it is gone. Raises OSError."""
    moved = False
    kept = f"{time.time_ns():020d}.{name.fingerprint.hex()[:16]}.{name.file}"
    with (
        contextlib.suppress(FileNotFoundError),
        directory.at(QUARANTINE, create=True) as target,
        directory.at(name.fingerprint.hex(), name.shard) as source,
    ):
        directory.calls.replace(name.file, kept, source, target)
        moved = True
    trim(directory)
    return moved


def quarantined(directory: Directory) -> list[tuple[str, int]]:
    """Files in quarantine and their bytes, the oldest first."""
    found = []
    with contextlib.suppress(FileNotFoundError), directory.at(QUARANTINE) as fd:
        for file in sorted(directory.calls.list_directory(fd)):
            with contextlib.suppress(FileNotFoundError):
                status: os.stat_result = directory.calls.stat(file, fd)
                if not stat.S_ISDIR(status.st_mode):
                    found.append((file, status.st_size))
    return found


def trim(directory: Directory, files: int = MAX_FILES, nbytes: int = MAX_BYTES) -> None:
    """Remove the oldest until at most ``files`` files and ``nbytes`` bytes are left."""
    found = quarantined(directory)
    total = sum(size for _, size in found)
    with contextlib.suppress(FileNotFoundError), directory.at(QUARANTINE) as fd:
        while found and (len(found) > files or total > nbytes):
            file, size = found.pop(0)
            total -= size
            with contextlib.suppress(FileNotFoundError):
                directory.calls.remove(file, fd)
