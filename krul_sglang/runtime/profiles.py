"""Which profile a server works with: checked, or made, before any rank starts."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from krul_sglang.config import KrulConfig, KrulConfigError
from krul_sglang.runtime import BACKEND, args
from krul_sglang.runtime.weights import EXACTLY, model_folder

logger = logging.getLogger(__name__)


def settle(result: None, record: Any) -> None:
    """AFTER ``ServerArgs.check_server_args``, which only launchers call: put the profile's
    path into the configuration that the ranks inherit."""
    config: KrulConfig | None = getattr(record, args.ATTRIBUTE, None)
    if record.radix_cache_backend != BACKEND or config is None or not config.needs_profile:
        return
    try:
        path = _path(config, record)
    except KrulConfigError as error:
        if getattr(record, args.FROM_CLI, False):
            args.stop(error)
        raise
    setattr(record, args.ATTRIBUTE, dataclasses.replace(config, profile=path))


def _path(config: KrulConfig, record: Any) -> Path | None:
    from sglang.srt.arg_groups.overrides import resolving_view

    from krul_sglang.profile.base import ProfileError
    from krul_sglang.profile.locate import ensure, load_ranks
    from krul_sglang.profile.rope import RopeError, rope_of

    cfg = resolving_view(record)
    model, ranks = model_folder(cfg), max(1, cfg.tp_size)
    try:
        rope_of(json.loads((model / "config.json").read_text()), "sglang")
    except (RopeError, KeyError) as error:
        logger.warning(
            "Krul: the position embedding of %s cannot be undone (%s); everything is stored "
            "losslessly",
            cfg.model_path,
            error,
        )
        return None
    except (OSError, ValueError) as error:
        raise KrulConfigError(f"--model-path={cfg.model_path}: no readable config.json") from error
    if config.profile is None:
        blame = f"--krul-policy={config.policy}: no profile could be made"
        fix = f"try `krul calibrate --model {model}`"
    else:
        blame, fix = f"--krul-profile={config.profile}", "without the flag one is made"
    try:
        if config.profile is None:
            path = ensure(model, ranks, lambda line: logger.warning("Krul: %s", line))
        else:
            path = config.profile.absolute()
        profiles = load_ranks(model, path, ranks)
    except ProfileError as error:
        raise KrulConfigError(f"{blame}: {error}; {fix}, and {EXACTLY}") from error
    _check_memory(config, max(profile.nbytes for profile in profiles), ranks * max(1, cfg.dp_size))
    return path


def _check_memory(config: KrulConfig, nbytes: int, ranks: int) -> None:
    needed = 2 * nbytes * ranks
    if config.host_memory < needed:
        raise KrulConfigError(
            f"--krul-host-memory={config.host_memory}: the profile takes {nbytes / 1e6:.0f} "
            f"MB of it on each of {ranks} ranks; give at least {needed / 1e6:.0f}MB (4GB is the "
            f"default), or {EXACTLY}"
        )
