"""Import hooks that stand in for ``sgl_kernel`` and mend ``torchvision``.

Imported by ``krul_cpu_host.pth`` at interpreter start, so it must stay cheap:
no torch, no sglang, only the import system.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

# The names SGLang 0.5.23 imports from sgl_kernel on a CPU-only host. None of
# them is called in plain serving; one that is called says so.
SGL_KERNEL_NAMES = (
    "copy_all_layer_kv_cache_cpu",
    "assign_req_to_token_pool_cpu",
    "rotate_input_ids_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "build_tree_kernel_efficient_cpu",
    "verify_tree_greedy_cpu",
)


class _KernelStandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Provides an ``sgl_kernel`` module where no real one is installed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "sgl_kernel":
            return None
        return importlib.machinery.ModuleSpec(name, self, origin="krul CPU stand-in")

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        def refuse(name: str):
            def call(*args: object, **kwargs: object) -> None:
                raise NotImplementedError(
                    f"sgl_kernel.{name} has no CPU build on PyPI; this feature needs a GPU "
                    "installation of SGLang"
                )

            call.__name__ = name
            return call

        for name in SGL_KERNEL_NAMES:
            setattr(module, name, refuse(name))


class _TorchvisionMender(importlib.abc.MetaPathFinder):
    """Declares torchvision's operators when its compiled part cannot load.

    PyPI's torchvision is built against CUDA torch; beside a CPU torch its
    compiled part fails to load and the import dies on the undeclared operators.
    The real import is tried first and only that failure is mended.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        spec.loader = _RetryLoader(spec.loader)
        return spec


class _RetryLoader(importlib.abc.Loader):
    def __init__(self, inner: importlib.abc.Loader) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> object:
        # Resource and source look-ups belong to the real loader.
        return getattr(self.inner, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        try:
            self.inner.exec_module(module)
        except RuntimeError as error:
            if "torchvision::nms" not in str(error):
                raise
            for name in [n for n in sys.modules if n.startswith("torchvision.")]:
                del sys.modules[name]
            _declare_torchvision_operators()
            self.inner.exec_module(module)


_libraries: list[object] = []  # torch drops an operator when its Library object dies


def _declare_torchvision_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)


def activate() -> None:
    """Install both hooks once. The stand-in goes last: any real sgl_kernel wins."""
    if any(isinstance(finder, _KernelStandIn) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _TorchvisionMender())
    sys.meta_path.append(_KernelStandIn())


activate()
