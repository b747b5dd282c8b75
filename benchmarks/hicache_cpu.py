"""What SGLang's HiCache needs to run without an accelerator, and a link of a given bandwidth.

A plugin that servers under measurement load (:mod:`server_plugin` brings it into their processes);
it is no part of the package. The copies between the device pool and the host pool are CUDA
kernels; here they are indexing. The file that ``HICACHE_LINK_FILE`` names holds bytes a second, or
null for memory itself, and may change at any time. It throttles

- the load from host to device, layer by layer: a layer's bytes arrive when the link has carried
  them, and a forward pass waits for a layer when it reads it, so that loading overlaps with
  computing as it does on a GPU;
- the reading of files, page by page. What was read is then loaded at the speed of memory.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LINK_FILE = "HICACHE_LINK_FILE"
"""Name of the environment variable: where the rate is."""
STORAGE = "SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"
"""SGLang's own: where the file tier keeps its pages."""
FLAGS = (
    "--enable-hierarchical-cache",
    "--hicache-io-backend",
    "direct",
    "--hicache-mem-layout",
    "layer_first",
)


class Link:
    """Carries one thing after the other at the rate that the file ``path`` holds."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._free = 0.0
        self._lock = threading.Lock()

    def carry(self, *nbytes: float) -> list[float]:
        """When each of these many bytes, asked for now, has arrived (``time.perf_counter``)."""
        rate = json.loads(self._path.read_text())
        arrived = []
        with self._lock:
            self._free = max(self._free, time.perf_counter())
            for size in nbytes:
                self._free += size / rate if rate else 0.0
                arrived.append(self._free)
        return arrived


def _wait_until(when: float) -> None:
    time.sleep(max(0.0, when - time.perf_counter()))


def _unpinned(*args: Any, **options: Any) -> tuple[tuple, dict[str, Any]]:
    """BEFORE the host pool is made: page-locked memory needs a CUDA driver."""
    return args, {**options, "pin_memory": False}


def _copy_rows(
    src_layers: Sequence[Any],
    dst_layers: Sequence[Any],
    src_indices: Any,
    dst_indices: Any,
    page_size: int,
) -> None:
    """``transfer_kv_direct``, by indexing."""
    for src, dst in zip(src_layers, dst_layers, strict=True):
        dst[dst_indices] = src[src_indices]


def _through(link: Link) -> tuple[Callable, Callable, Callable]:
    """Hooks that make a host load, a forward pass and a file read wait for the link."""

    def load(original: Callable, engine: Any, transfers: Sequence[Any], **options: Any) -> Any:
        """AROUND ``submit_host_to_device``: note when each layer will have arrived."""
        if os.environ.get(STORAGE):  # the file tier: its bytes have come through the link
            return original(engine, transfers, **options)
        nbytes = sum(t.host_indices.numel() * t.host_pool.size_per_token for t in transfers)
        layers, done = options["transfer_layer_id_max"], options["on_layer_done"]
        done.__self__.due = link.carry(*[nbytes / layers] * layers)
        return original(engine, transfers, **options)

    def wait(event: Any, layer: int) -> None:
        """BEFORE ``LayerLoadingEvent.wait``."""
        _wait_until(getattr(event, "due", {layer: 0.0})[layer])

    def read(original: Callable, store: Any, key: str, target: Any, *rest: Any) -> Any:
        """AROUND ``HiCacheFile.get``: one page."""
        page = original(store, key, target, *rest)
        if page is not None:
            _wait_until(link.carry(page.nbytes)[0])
        return page

    return load, wait, read


def register() -> None:
    """The entry point SGLang calls in every process."""
    from sglang.srt.mem_cache.pool_host import mha
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    mha.transfer_kv_direct = _copy_rows
    pool = "sglang.srt.mem_cache.pool_host.mha.MHATokenToKVPoolHost.__init__"
    HookRegistry.register(pool, _unpinned, HookType.BEFORE)
    if LINK_FILE in os.environ:
        load, wait, read = _through(Link(Path(os.environ[LINK_FILE])))
        cache = "sglang.srt.mem_cache"
        engine = f"{cache}.l2_transfer.L2TransferEngine.submit_host_to_device"
        event = "sglang.srt.managers.cache_controller.LayerLoadingEvent.wait"
        HookRegistry.register(engine, load, HookType.AROUND)
        HookRegistry.register(event, wait, HookType.BEFORE)
        HookRegistry.register(f"{cache}.hicache_storage.HiCacheFile.get", read, HookType.AROUND)
