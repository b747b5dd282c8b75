"""The tiers of one rank that outlive it: where they are and what their entries are bound to."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from krul_sglang.config import KrulConfig, KrulConfigError
from krul_sglang.runtime.weights import model_folder

if TYPE_CHECKING:
    from krul_sglang.codec.base import KVSpec
    from krul_sglang.profile.base import Profile
    from krul_sglang.store.durable import Durable
    from krul_sglang.store.remote.tier import RemoteTier


logger = logging.getLogger(__name__)


def check_directory(config: KrulConfig) -> None:
    """Raise :class:`KrulConfigError` for a ``--krul-dir`` that could never serve, before any
    process starts; creates one that is missing. A link to a directory will do. One that can be
    read but not written to is served with a warning: what lies there is restored."""
    if config.dir is None:
        return
    root = config.dir.absolute()
    try:
        os.makedirs(root, 0o700, exist_ok=True)
        kept = os.listdir(root)
    except OSError as error:
        raise _refusal(config.dir, error) from error
    if not os.access(root, os.W_OK | os.X_OK):
        if not kept:
            raise KrulConfigError(
                f"--krul-dir={config.dir}: empty, and this user may not write to it; give another "
                "directory or its permissions"
            )
        logger.warning(
            "krul: --krul-dir=%s cannot be written to: what lies there is restored, nothing is "
            "stored",
            config.dir,
        )
    capacity = shutil.disk_usage(root).total
    if capacity < config.disk_limit:
        logger.warning(
            "krul: --krul-disk allows %.1f GB, but the file system of %s holds %.1f GB in all",
            config.disk_limit / 1e9,
            config.dir,
            capacity / 1e9,
        )


def _refusal(path: Path, error: OSError) -> KrulConfigError:
    if path.is_symlink() and error.errno == errno.EEXIST:
        why = "a link that leads nowhere"
    elif error.errno == errno.EEXIST:
        why = "a file, not a directory"
    else:
        why = f"cannot be used ({error.strerror or error})"
    return KrulConfigError(
        f"--krul-dir={path}: {why}; give a directory this server may write to, or a path where it "
        "may create one"
    )


def open_disk(
    config: KrulConfig, ctx: Any, spec: KVSpec, profile: Profile | None
) -> Durable | None:
    """The disk tier, None where no directory is configured. Raises :class:`KrulConfigError`."""
    if config.dir is None:
        return None
    from krul_sglang.store.disk.digest import fingerprint_of
    from krul_sglang.store.disk.tier import DiskTier
    from krul_sglang.store.durable import Durable

    marks = fingerprint_of(identity(config, ctx, spec, profile))
    try:
        return Durable(DiskTier(config.dir.absolute(), marks, config.disk_limit))
    except OSError as error:
        raise _refusal(config.dir, error) from error


def open_remote(
    config: KrulConfig, ctx: Any, spec: KVSpec, profile: Profile | None
) -> RemoteTier | None:
    """The remote tier, None where no server is configured; one that is not there is warned of.
    Raises :class:`KrulConfigError`."""
    if config.remote is None:
        return None
    from krul_sglang.store.disk.digest import fingerprint_of
    from krul_sglang.store.remote.tier import RemoteTier

    return RemoteTier(config.remote, fingerprint_of(identity(config, ctx, spec, profile)))


def identity(
    config: KrulConfig, ctx: Any, spec: KVSpec, profile: Profile | None
) -> Mapping[str, str]:
    """Everything that decides what stored bytes mean. A difference in any field is a miss."""
    from sglang.srt.runtime_context import get_parallel

    from krul_sglang.codec.frames import VERSION
    from krul_sglang.profile.base import ProfileError
    from krul_sglang.profile.file import fingerprint

    args, parallel = ctx.server_args, get_parallel()
    try:
        model = fingerprint(model_folder(args), ctx.tp_rank, max(1, parallel.tp_size))
    except ProfileError as error:
        raise KrulConfigError(
            f"--krul-dir or --krul-remote: entries must be bound to the model, and {error}"
        ) from error
    settings = ("quantization", "json_model_override_args", "revision", "load_format")
    return {
        **{f"model.{name}": text for name, text in model.items()},
        **{f"server.{name}": str(getattr(args, name, None)) for name in settings},
        "server.dtype": str(ctx.model_config.dtype),
        "kv.dtype": spec.dtype,
        "kv.shape": f"{spec.layers}x{spec.kv_heads}x{spec.head_dim}+{spec.v_head_dim}",
        "kv.page": str(ctx.params.page_size),
        "payload": str(VERSION),
        "policy": config.policy,
        "profile": "none" if profile is None else profile.id,
    }
