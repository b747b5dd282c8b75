"""Give freed heap memory back to the operating system.

Encoding frees large buffers between long-lived payloads. glibc keeps such memory
in its arenas, and a scheduler's RSS grew by twice what the store held.
"""

from __future__ import annotations

import ctypes
import functools


@functools.cache
def _malloc_trim():
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # not glibc
        return None


def return_freed_memory() -> None:
    """Trim the C heap; does nothing where the C library cannot. Takes milliseconds."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
