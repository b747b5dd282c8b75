"""A second SGLang plugin, loaded only by the tests: it damages what Krul has stored.

When the file named by ``FAULT_FILE`` exists, the next /server_info flips a byte in
the payload of the middle sealed segment and removes the file.
"""

from __future__ import annotations

import os
from pathlib import Path


def _damage_middle_segment(controller, recv_req):
    order = Path(os.environ.get("FAULT_FILE", "/nonexistent"))
    cache = getattr(controller.scheduler, "tree_cache", None)
    if not order.exists() or not hasattr(cache, "krul"):
        return None
    store = cache.krul.store
    store.wait_sealed(30)
    segments = [s for s in store._segments.values() if s.payload]
    # Segments are numbered as they are evicted, leaf first: sort by position.
    segments.sort(key=lambda segment: segment.start)
    victim = segments[len(segments) // 2]
    payload = bytearray(victim.payload)
    payload[len(payload) // 2] ^= 0x10
    victim.payload = bytes(payload)
    order.unlink()
    return None


def register():
    """Entry point of the ``sglang.srt.plugins`` group."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.managers.scheduler_components.internal_state."
        "SchedulerInternalStateController.get_internal_state",
        _damage_middle_segment,
        HookType.BEFORE,
    )
