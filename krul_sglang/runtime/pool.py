"""Rows of SGLang's KV pool in and out, in stream order."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from krul_kernels.rows import gather_rows, scatter_rows

from krul_sglang.codec.base import KVRun, KVSpec
from krul_sglang.config import KrulConfigError


class PoolView:
    """Reads and writes token rows of an ``MHATokenToKVPool``, layer by layer."""

    def __init__(self, kvcache: Any, forward_stream: Any = None) -> None:
        """Raises :class:`KrulConfigError` for a pool whose rows are not plain K and V."""
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        if type(kvcache) is not MHATokenToKVPool:
            raise KrulConfigError(
                f"--enable-krul: this model's KV pool is {type(kvcache).__name__}; only plain "
                "multi-head KV (MHATokenToKVPool) is supported"
            )
        self._kvcache = kvcache
        self.k = list(kvcache.k_buffer)
        self.v = list(kvcache.v_buffer)
        dtype = str(self.k[0].dtype).removeprefix("torch.")
        if self.k[0].dim() != 3 or dtype not in ("float32", "bfloat16", "float16"):
            raise KrulConfigError(
                f"--enable-krul: KV rows of dtype {dtype} and shape {tuple(self.k[0].shape)} are "
                "not supported; use --kv-cache-dtype auto and the default KV layout"
            )
        self.device = self.k[0].device
        self._forward_stream = forward_stream if self.device.type == "cuda" else None
        self._streams = threading.local()
        self.spec = KVSpec(
            layers=len(self.k),
            kv_heads=self.k[0].shape[1],
            head_dim=self.k[0].shape[2],
            v_head_dim=self.v[0].shape[2],
            dtype=dtype,
        )

    def in_forward_order(self) -> AbstractContextManager:
        """What is enqueued inside runs on the forward stream."""
        # On the forward stream itself: rows are read after the forward that wrote
        # them and before the one that may reuse them, with no further fence.
        if self._forward_stream is None:
            return nullcontext()
        return torch.cuda.stream(self._forward_stream)

    def gather(self, rows: torch.Tensor, start: int) -> KVRun:
        """Copy rows (int64 ``[n]``) of all layers to host memory of the caller's own."""
        n = rows.numel()
        spec = self.spec
        dtype = self.k[0].dtype
        pin = self.device.type == "cuda"
        k = torch.empty(spec.layers, n, spec.kv_heads, spec.head_dim, dtype=dtype, pin_memory=pin)
        v = torch.empty(spec.layers, n, spec.kv_heads, spec.v_head_dim, dtype=dtype, pin_memory=pin)
        with self.in_forward_order():
            gather_rows(self.k, rows, k)
            gather_rows(self.v, rows, v)
            if pin:
                torch.cuda.current_stream().synchronize()
        return KVRun(k=k, v=v, start=start)

    def register_layer_counter(self, counter: Any) -> None:
        """``counter.wait_until(layer)`` is called before anyone's forward reads a layer."""
        self._kvcache.register_layer_transfer_counter(counter)

    def writer(self, rows: torch.Tensor):
        """A sink (see :mod:`krul_sglang.restore.pipeline`) that writes into pool rows.

        On a GPU each thread writes on a stream of its own, behind whatever the forward
        stream was given so far (the rows' last reader), and returns an event.
        """
        fence = None
        if self._forward_stream is not None:
            fence = self._forward_stream.record_event()

        def write(layer: int, first: int, k: torch.Tensor, v: torch.Tensor) -> Any:
            target = rows[first : first + k.shape[0]]
            if fence is None:
                scatter_rows(self.k[layer], target, k)
                scatter_rows(self.v[layer], target, v)
                return None
            stream = self._load_stream()
            with torch.cuda.stream(stream):
                stream.wait_event(fence)
                scatter_rows(self.k[layer], target, k)
                scatter_rows(self.v[layer], target, v)
                return stream.record_event()

        return write

    def _load_stream(self) -> torch.cuda.Stream:
        """The calling thread's own stream."""
        if not hasattr(self._streams, "load"):
            self._streams.load = torch.cuda.Stream(self.device)
        return self._streams.load
