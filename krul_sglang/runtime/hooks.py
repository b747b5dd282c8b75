"""Every hook Krul puts on SGLang, in one table.

A hook that SGLang fails to apply is only logged there, so :func:`verify` is
called where the cache is built: serving never starts half-hooked.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

from krul_sglang.config import KrulConfigError
from krul_sglang.runtime import (
    BACKEND,
    args,
    cpu_attention,
    epoch,
    factory,
    profiles,
    questions,
    state,
    stepping,
    taps,
)


@dataclass(frozen=True)
class Hook:
    """``kind`` is a name of SGLang's HookType."""

    target: str
    function: Callable
    kind: str


HOOKS = (
    Hook("sglang.srt.server_args.ServerArgs.add_cli_args", args.add_flags, "AFTER"),
    Hook("sglang.srt.server_args.ServerArgs.from_cli_args", args.read_flags, "AFTER"),
    Hook("sglang.srt.server_args.ServerArgs.resolve_once", args.check_resolved, "AROUND"),
    Hook("sglang.srt.server_args.ServerArgs.check_server_args", profiles.settle, "AFTER"),
    Hook("sglang.srt.server_args.ServerArgs.check_server_args", questions.reach_workers, "AFTER"),
    Hook(
        "sglang.srt.model_executor.model_runner.ModelRunner.init_attention_backends",
        taps.install,
        "AFTER",
    ),
    Hook("sglang.srt.managers.scheduler.Scheduler.run_batch", stepping.run_batch, "AROUND"),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.process_batch_result",
        stepping.after_result,
        "AFTER",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.get_next_batch_to_run",
        stepping.before_next_batch,
        "BEFORE",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.get_next_batch_to_run",
        stepping.after_next_batch,
        "AFTER",
    ),
    *(
        Hook(
            "sglang.srt.managers.scheduler_components.weight_updater."
            f"SchedulerWeightUpdaterManager.update_weights_from_{source}",
            epoch.before_update,
            "BEFORE",
        )
        for source in ("disk", "distributed", "tensor", "ipc")
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.__init__",
        questions.add_routes,
        "AFTER",
    ),
    Hook(
        "sglang.srt.managers.scheduler_components.internal_state."
        "SchedulerInternalStateController.get_internal_state",
        state.add_to_server_info,
        "AFTER",
    ),
    Hook(
        "sglang.srt.managers.scheduler_components.output_streamer."
        "SchedulerOutputStreamer.get_cached_tokens_details",
        state.add_to_cached_tokens,
        "AFTER",
    ),
    Hook(
        "sglang.srt.layers.attention.torch_native_backend."
        "TorchNativeAttnBackend._run_sdpa_forward_extend",
        cpu_attention.extend,
        "AROUND",
    ),
    Hook(
        "sglang.srt.layers.attention.torch_native_backend."
        "TorchNativeAttnBackend._run_sdpa_forward_decode",
        cpu_attention.decode,
        "AROUND",
    ),
)


def register() -> None:
    """Queue all hooks and the cache backend with SGLang's registries."""
    from sglang.srt.mem_cache.registry import register_radix_cache_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for hook in HOOKS:
        HookRegistry.register(hook.target, hook.function, HookType[hook.kind])
    register_radix_cache_backend(BACKEND, factory.create)


def missing() -> list[str]:
    """Targets whose hook is not in place in this process."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    out = []
    for hook in HOOKS:
        try:
            pkgutil.resolve_name(hook.target)
        except (ImportError, AttributeError):
            out.append(hook.target)
            continue
        if hook.target not in HookRegistry._patched:
            out.append(hook.target)
    return out


def verify() -> None:
    """Raise :class:`KrulConfigError` unless every hook is in place."""
    absent = missing()
    if absent:
        raise KrulConfigError(
            "Krul's hooks did not apply to this SGLang: " + ", ".join(absent) + "; "
            "run `krul doctor`"
        )
