"""A second SGLang plugin, loaded only by the tests: it gets in the way of what Krul stores.

When the file named by ``FAULT_FILE`` exists, the next /server_info obeys it and removes it:

- nothing, or ``damage SHARE``: flip a byte of the middle sealed segment, that share of its
  payload in (0.5 where there is none);
- ``stall``: the link carries a byte a second, and nobody is patient; ``recover`` mends it.
"""

from __future__ import annotations

import os
from pathlib import Path


def _obey(controller, recv_req):
    order = Path(os.environ.get("FAULT_FILE", "/nonexistent"))
    cache = getattr(controller.scheduler, "tree_cache", None)
    if not order.exists() or not hasattr(cache, "krul"):
        return
    what, *rest = order.read_text().split() or ["damage"]
    if what == "damage":
        _damage_middle_segment(cache.krul.store, float(rest[0]) if rest else 0.5)
    else:
        from krul_sglang.runtime import restoring

        stall = what == "stall"
        cache.krul.loader._pipeline.links["memory"].bandwidth = 1.0 if stall else 1e9
        restoring.PATIENCE = 0.2 if stall else 10.0
    order.unlink()


def _damage_middle_segment(store, share: float) -> None:
    store.wait_sealed(30)
    segments = [s for s in store._segments.values() if s.payload]
    # Segments are numbered as they are evicted, leaf first: sort by position.
    segments.sort(key=lambda segment: segment.start)
    victim = segments[len(segments) // 2]
    payload = bytearray(victim.payload)
    payload[int(len(payload) * share)] ^= 0x10
    victim.payload = bytes(payload)


def register():
    """Entry point of the ``sglang.srt.plugins`` group."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.managers.scheduler_components.internal_state."
        "SchedulerInternalStateController.get_internal_state",
        _obey,
        HookType.BEFORE,
    )
