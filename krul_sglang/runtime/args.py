"""Krul's flags on SGLang's command line, carried on the ServerArgs record.

``ServerArgs`` drops names it does not know, so the parsed configuration rides on
the instance as ``_krul_config``; its ``__dict__`` is pickled to every child.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from krul_sglang.config import KrulConfig, KrulConfigError, settings
from krul_sglang.runtime import BACKEND, compat, disk

ATTRIBUTE = "_krul_config"
FROM_CLI = "_krul_from_cli"


def add_flags(result: None, parser: argparse.ArgumentParser) -> None:
    """AFTER ``ServerArgs.add_cli_args``: add one argument per setting."""
    group = parser.add_argument_group(
        "Krul", "Keep evicted conversations in host memory, compressed (krul-sglang)."
    )
    # So that `--krul-host-memory -4GB` reaches our parser, which names value and flag:
    # argparse takes a value that starts with a dash for an option unless it is a number.
    parser._negative_number_matcher = re.compile(r"-\.?\d")
    for setting in settings():
        text = setting.help.replace("%", "%%")
        common: dict[str, Any] = {"dest": f"krul_{setting.name}", "default": None, "help": text}
        if setting.name == "enabled":
            group.add_argument(setting.flag, action="store_const", const="1", **common)
        else:
            group.add_argument(setting.flag, metavar=setting.metavar, **common)


def read_flags(record: Any, cls: type, namespace: argparse.Namespace) -> Any:
    """AFTER ``ServerArgs.from_cli_args``: parse, validate, select the backend."""
    values: dict[str, Any] = {
        s.name: getattr(namespace, f"krul_{s.name}", None) for s in settings()
    }
    try:
        if record.radix_cache_backend == BACKEND:
            values["enabled"] = "1"
        if not values["enabled"] and not _enabled_by_environment():
            # Plain SGLang: whatever else KRUL_* says is none of its business.
            stray = [s.flag for s in settings() if values[s.name] is not None]
            if stray:
                raise KrulConfigError(f"{stray[0]} has no effect without --enable-krul; add it")
            return record
        config = KrulConfig.from_environment(os.environ, **{**values, "enabled": "1"})
        if record.radix_cache_backend not in (None, BACKEND):
            raise KrulConfigError(
                f"--radix-cache-backend={record.radix_cache_backend} and --enable-krul choose two "
                "different prefix caches; drop one of them"
            )
    except KrulConfigError as error:
        stop(error)
    record.radix_cache_backend = BACKEND
    setattr(record, ATTRIBUTE, config)
    setattr(record, FROM_CLI, True)
    return record


def _enabled_by_environment() -> bool:
    setting = next(s for s in settings() if s.name == "enabled")
    return bool(setting.parse_value(os.environ.get(setting.env, "0"), source=setting.env))


def check_resolved(original: Callable[[Any], None], record: Any) -> None:
    """AROUND ``ServerArgs.resolve_once``: refuse what cannot work, before any process starts.

    From the command line it ends the process with one line; from
    ``sglang.Engine`` it raises :class:`KrulConfigError`.
    """
    if record.radix_cache_backend != BACKEND or getattr(record, "_krul_checked", False):
        return original(record)
    try:
        config = getattr(record, ATTRIBUTE, None)
        if config is None:  # Engine(radix_cache_backend="krul") with KRUL_* names
            config = KrulConfig.from_environment(enabled="1")
            setattr(record, ATTRIBUTE, config)
        compat.check_input(config, record)
        try:
            original(record)
        except Exception as error:
            # SGLang rejects some models for a side effect of what Krul refuses them for.
            _explain(config, record, error)
            raise
        compat.check_settings(config, record)
        disk.check_directory(config)
    except KrulConfigError as error:
        if getattr(record, FROM_CLI, False):
            stop(error)
        raise
    record._krul_checked = True


def _explain(config: KrulConfig, record: Any, error: Exception) -> None:
    """Raise Krul's own reason for ``error``, if it has one."""
    try:
        compat.check_settings(config, record)
    except KrulConfigError as reason:
        raise reason from error
    except Exception:
        # The half-resolved record cannot even be read: SGLang's error stands.
        return


def stop(error: KrulConfigError) -> None:
    """End a command-line start with the error's one line and exit code 2."""
    print(f"krul: error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2)
