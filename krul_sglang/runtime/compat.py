"""What Krul works with, what it refuses, and why.

One table feeds the check at start, ``krul doctor`` and docs/compatibility.md.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from krul_sglang.config import KrulConfig, KrulConfigError
from krul_sglang.store.remote.address import without_password

Predicate = Callable[[Any, Any, KrulConfig], bool]


@dataclass(frozen=True)
class Refusal:
    """One configuration that is refused at start.

    flag: what the operator set, as they would recognise it.
    reason: why it cannot work, in a phrase.
    fix: what to do instead.
    applies: ``(server args, model config or None, KrulConfig) -> bool``. Asked twice:
        with the operator's own values and no model before SGLang resolves them, and
        with the resolved values and the model after.
    """

    flag: str
    reason: str
    fix: str
    applies: Predicate


def _arch(model: Any) -> str:
    return getattr(getattr(model, "attention_arch", None), "name", "MHA")


def _is_set(name: str) -> Predicate:
    return lambda cfg, model, krul: bool(getattr(cfg, name, None))


def _more_than_one(name: str) -> Predicate:
    return lambda cfg, model, krul: (getattr(cfg, name, None) or 1) > 1


def _switched_off_by_sglang(cfg: Any, model: Any, krul: KrulConfig) -> bool:
    # `_raw_input` is what the operator asked for, kept while SGLang resolves.
    raw = getattr(cfg, "_raw_input", None)
    return bool(raw and cfg.disable_radix_cache and not raw["disable_radix_cache"])


REFUSALS = (
    Refusal(
        "--disable-radix-cache",
        "without a prefix cache nothing is evicted or matched",
        "drop one of the two flags",
        lambda cfg, model, krul: (
            bool(getattr(cfg, "disable_radix_cache", False))
            and not _switched_off_by_sglang(cfg, model, krul)
        ),
    ),
    Refusal(
        "--enable-krul",
        "SGLang itself switches the prefix cache off for this model and these flags",
        "see its warning above, or serve without --enable-krul",
        _switched_off_by_sglang,
    ),
    Refusal(
        "--enable-hierarchical-cache",
        "HiCache and Krul both own the host side of the prefix cache",
        "drop one of the two flags",
        _is_set("enable_hierarchical_cache"),
    ),
    Refusal(
        "--enable-lmcache",
        "LMCache brings its own prefix cache",
        "drop one of the two flags",
        _is_set("enable_lmcache"),
    ),
    Refusal(
        "--enable-flexkv",
        "FlexKV brings its own prefix cache",
        "drop one of the two flags",
        _is_set("enable_flexkv"),
    ),
    Refusal(
        "--enable-unified-cache-external-linker",
        "the external linker and Krul both own the host side of the prefix cache",
        "drop one of the two flags",
        _is_set("enable_unified_cache_external_linker"),
    ),
    Refusal(
        "--disaggregation-mode",
        "prefill/decode disaggregation moves KV past the prefix cache",
        "serve without disaggregation",
        lambda cfg, model, krul: getattr(cfg, "disaggregation_mode", "null") != "null",
    ),
    Refusal(
        "--speculative-algorithm",
        "the draft model's KV is not stored, so a restored prefix would miss it",
        "drop the speculative flags",
        _is_set("speculative_algorithm"),
    ),
    Refusal(
        "--pp-size",
        "pipeline stages do not yet agree on what is stored",
        "use tensor parallelism",
        _more_than_one("pp_size"),
    ),
    Refusal(
        "--attn-dp-size",
        "attention data parallelism (also --enable-dp-attention) is not tested",
        "use --tp-size or --dp-size alone",
        _more_than_one("attn_dp_size"),
    ),
    Refusal(
        "--ep-size",
        "expert parallelism is not tested",
        "serve without expert parallelism",
        _more_than_one("ep_size"),
    ),
    Refusal(
        "--dcp-size",
        "decode context parallelism shards a token's KV over ranks",
        "serve without it",
        _more_than_one("dcp_size"),
    ),
    Refusal(
        "--attn-cp-size",
        "context parallelism shards a token's KV over ranks",
        "serve without it",
        _more_than_one("attn_cp_size"),
    ),
    Refusal(
        "--enable-kv-cache-sharding",
        "each rank then holds only a stripe of every page",
        "serve without it",
        _is_set("enable_kv_cache_sharding"),
    ),
    Refusal(
        "--enable-hisparse",
        "hierarchical sparse attention moves KV to the host on its own",
        "drop one of the two flags",
        _is_set("enable_hisparse"),
    ),
    Refusal(
        "--enable-pdmux",
        "multiplexed prefill and decode run a scheduler loop that is not tested",
        "drop the flag",
        _is_set("enable_pdmux"),
    ),
    Refusal(
        "--dllm-algorithm",
        "a diffusion model rewrites the KV of a block until it is final",
        "serve it without --enable-krul",
        _is_set("dllm_algorithm"),
    ),
    Refusal(
        "--kv-cache-dtype",
        "a quantized KV cache is not supported",
        "use --kv-cache-dtype auto",
        lambda cfg, model, krul: (
            str(getattr(cfg, "kv_cache_dtype", "auto"))
            not in ("auto", "bfloat16", "bf16", "float16", "fp16", "float32", "fp32")
        ),
    ),
    Refusal(
        "--enable-lora",
        "an adapter changes the KV, and lossy profiles are learnt without it",
        "add --krul-policy lossless",
        lambda cfg, model, krul: (
            bool(getattr(cfg, "enable_lora", None) or getattr(cfg, "lora_paths", None))
            and not krul.lossless
        ),
    ),
    Refusal(
        "--enable-lora",
        "an adapter is known by name only, so what it computed must not outlive the server",
        "drop --krul-dir and --krul-remote",
        lambda cfg, model, krul: (
            bool(getattr(cfg, "enable_lora", None) or getattr(cfg, "lora_paths", None))
            and krul.outlives_server
        ),
    ),
    Refusal(
        "--load-format",
        "weights that are made up at start are not told apart by their files",
        "drop --krul-dir and --krul-remote",
        lambda cfg, model, krul: (
            str(getattr(cfg, "load_format", "auto")) == "dummy" and krul.outlives_server
        ),
    ),
    Refusal(
        "--enable-deterministic-inference",
        "a lossy restore is not deterministic across evictions",
        "add --krul-policy lossless",
        lambda cfg, model, krul: (
            bool(getattr(cfg, "enable_deterministic_inference", False)) and not krul.lossless
        ),
    ),
    Refusal(
        "--enable-memory-saver",
        "releasing the KV pool under stored conversations is not tested",
        "drop the flag",
        _is_set("enable_memory_saver"),
    ),
    Refusal(
        "--enable-streaming-session",
        "a streaming session keeps its KV outside the prefix cache between turns",
        "use ordinary requests: Krul restores them by prefix",
        _is_set("enable_streaming_session"),
    ),
    Refusal(
        "--is-embedding",
        "an embedding model has no conversation to restore",
        "serve it without --enable-krul",
        lambda cfg, model, krul: (
            bool(getattr(cfg, "is_embedding", False)) or not getattr(model, "is_generation", True)
        ),
    ),
    Refusal(
        "--model-path",
        "multimodal models are not tested",
        "serve it without --enable-krul",
        lambda cfg, model, krul: bool(getattr(model, "is_multimodal", False)),
    ),
    Refusal(
        "--model-path",
        "multi-head latent attention (MLA) keeps no per-head K and V",
        "serve it without --enable-krul",
        lambda cfg, model, krul: _arch(model) == "MLA",
    ),
    Refusal(
        "--model-path",
        "a model with recurrent state (Mamba, linear attention) needs more than KV",
        "serve it without --enable-krul",
        lambda cfg, model, krul: _arch(model) == "SSM" or _has_recurrent_state(model),
    ),
    Refusal(
        "--model-path",
        "a sliding attention window keeps only part of a conversation's KV",
        "serve it without --enable-krul",
        lambda cfg, model, krul: _has_sliding_window(model),
    ),
)


def _has_recurrent_state(model: Any) -> bool:
    if getattr(model, "hf_config", None) is None:
        return False
    from sglang.srt.mem_cache.kv_cache_builder import uses_ssm_state

    return uses_ssm_state(model)


def _has_sliding_window(model: Any) -> bool:
    if getattr(model, "is_hybrid_swa", False):
        return True
    config = getattr(model, "hf_text_config", None)
    window = getattr(config, "sliding_window", None)
    # Qwen configs carry a window that use_sliding_window=False switches off.
    return bool(window) and bool(getattr(config, "use_sliding_window", True))


def refusals(cfg: Any, model: Any, krul: KrulConfig) -> list[Refusal]:
    """All rows that apply."""
    return [row for row in REFUSALS if row.applies(cfg, model, krul)]


def check_input(krul: KrulConfig, record: Any) -> None:
    """Raise :class:`KrulConfigError` for what the operator's own flags rule out.

    Runs before SGLang resolves them: it would refuse some combinations first, with a
    traceback that does not mention Krul, or rewrite the flags it derives others from.
    """
    check_version()
    check_model_path(str(record.model_path))
    check_client(krul)
    _raise_first(record, None, krul)


def check_client(krul: KrulConfig) -> None:
    """Raise :class:`KrulConfigError` where the remote tier's client package is missing."""
    if krul.remote is not None and importlib.util.find_spec("redis") is None:
        raise KrulConfigError(
            f"--krul-remote={without_password(krul.remote)}: the client package is not "
            'installed; run `pip install "krul-sglang[remote]"`'
        )


def check_model_path(path: str) -> None:
    """Raise :class:`KrulConfigError` for a local path that is not there.

    SGLang would take it for the name of a model hub's repository and fail on that.
    """
    if path.startswith(("/", "./", "../", "~")) and not Path(path).expanduser().exists():
        raise KrulConfigError(f"--model-path={path}: no such file or folder")


def check_settings(krul: KrulConfig, record: Any) -> None:
    """Raise :class:`KrulConfigError` for the first row that applies to a resolved record."""
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.arg_groups.overrides import resolving_view

    check_version()
    cfg = resolving_view(record)
    model = None
    if str(cfg.model_path).lower() not in ("none", "dummy"):
        model = model_config_of(record)
    _raise_first(cfg, model, krul)


def _raise_first(cfg: Any, model: Any, krul: KrulConfig) -> None:
    for row in refusals(cfg, model, krul):
        value = cfg.model_path if row.flag == "--model-path" else _value_of(cfg, row.flag)
        raise KrulConfigError(f"{row.flag}{value_text(value)}: {row.reason}; {row.fix}")


def _value_of(cfg: Any, flag: str) -> Any:
    return getattr(cfg, flag.removeprefix("--").replace("-", "_"), None)


def value_text(value: Any) -> str:
    """``=value``, or nothing for a bare switch."""
    return "" if value in (None, True, False) else f"={value}"


def check_version() -> None:
    """Raise :class:`KrulConfigError` unless SGLang is the supported release."""
    import sglang

    from krul_sglang.runtime import SUPPORTED_SGLANG

    if sglang.__version__ != SUPPORTED_SGLANG:
        raise KrulConfigError(
            f"sglang=={sglang.__version__} is installed; this release of Krul extends "
            f"{SUPPORTED_SGLANG}: pip install sglang=={SUPPORTED_SGLANG}"
        )


def refusals_table() -> str:
    """The Markdown table of refused configurations that docs/compatibility.md carries."""
    rows = ["| refused at start | reason | instead |", "|---|---|---|"]
    rows += [f"| `{row.flag}` | {row.reason} | {row.fix} |" for row in REFUSALS]
    return "\n".join(rows) + "\n"
