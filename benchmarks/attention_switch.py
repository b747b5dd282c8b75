"""Lets benchmarks/selection_cost.py switch the taps of a running server off and on again.

A plugin that the server under measurement loads (:mod:`server_plugin` brings it into its
processes); it is no part of the package. The file named by ``ATTENTION_SWITCH_FILE`` holds
``{"measured": bool, "evict": tokens}``; the next /server_info obeys it and removes it. Switched
off, no query is recorded and no request measured, as with ``--krul-attention off``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

ORDER_FILE = "ATTENTION_SWITCH_FILE"
"""Name of the environment variable: where orders are put."""


def _record_nothing(*tensors: Any) -> None:
    """Instead of ``Taps.record``."""


def obey(controller: Any, recv_req: Any) -> None:
    """BEFORE ``get_internal_state``."""
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    cache = getattr(controller.scheduler, "tree_cache", None)
    path = Path(os.environ.get(ORDER_FILE, "/nonexistent"))
    if not hasattr(cache, "krul") or not path.exists():
        return
    order = json.loads(path.read_text())
    path.unlink()
    vars(cache.krul.taps).pop("record", None)
    if not order["measured"]:
        cache.krul.taps.record = _record_nothing
    if order["evict"]:
        cache.evict(EvictParams(num_tokens=order["evict"]))


def register() -> None:
    """The entry point SGLang calls in every process."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target = (
        "sglang.srt.managers.scheduler_components.internal_state."
        "SchedulerInternalStateController.get_internal_state"
    )
    HookRegistry.register(target, obey, HookType.BEFORE)
