"""Lets benchmarks/restore.py set the rate of a running Krul server's links, and evict tokens.

A plugin that the server under measurement loads (:mod:`server_plugin` brings it into its
processes); it is no part of the package. The file named by ``RESTORE_LINK_FILE`` holds a JSON
object; the next /server_info obeys it and removes it. ``rate``: bytes a second, or null for memory
itself; the planner then begins with that rate, as in a server that was started with it
(``--krul-link-bandwidth``). ``keep``: no more than that many tokens stay on the device; the least
recently used leave it, as when another request needs their room.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

LINK_FILE = "RESTORE_LINK_FILE"
"""Name of the environment variable: where orders are put."""
MEMORY = "memory"


def obey(controller: Any, recv_req: Any) -> None:
    """BEFORE ``get_internal_state``."""
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    cache = getattr(controller.scheduler, "tree_cache", None)
    path = Path(os.environ.get(LINK_FILE, "/nonexistent"))
    if not hasattr(cache, "krul") or not path.exists():
        return
    order = json.loads(path.read_text())
    if "rate" in order:
        hold(cache.krul, order["rate"])
    if "keep" in order and (more := cache.evictable_size() - order["keep"]) > 0:
        cache.evict(EvictParams(num_tokens=more))
    path.unlink()


def hold(krul: Any, rate: float | None) -> None:
    """Hold the links of every tier to ``rate`` bytes a second, and have the planner know it. Memory
    has no link without a rate, as without the flag: its own (the server was started with one) is
    laid aside."""
    from krul_sglang.restore.cost import Rate

    links, believed = krul.loader._pipeline.links, krul.planner.load.links
    aside = vars(krul).setdefault("link_laid_aside", {})
    if rate is None:
        aside.update({MEMORY: links.pop(MEMORY)} if MEMORY in links else {})
        believed.pop(MEMORY, None)
    else:
        links.update(aside)
        believed.update({tier: Rate(1 / rate) for tier in links})
    for link in links.values():
        link.bandwidth = rate


def register() -> None:
    """The entry point SGLang calls in every process."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target = (
        "sglang.srt.managers.scheduler_components.internal_state."
        "SchedulerInternalStateController.get_internal_state"
    )
    HookRegistry.register(target, obey, HookType.BEFORE)
