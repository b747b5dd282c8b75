"""Krul for offline use: keyword arguments for ``sglang.Engine``."""

from __future__ import annotations

import os
from typing import Any

from krul_sglang.config import KrulConfig, settings


def engine_kwargs(**values: Any) -> dict[str, str]:
    """What to pass to ``sglang.Engine`` so that it serves with Krul.

    >>> engine = sglang.Engine(model_path=path, **engine_kwargs(policy="lossless"))

    ``values`` are fields of :class:`~krul_sglang.config.KrulConfig` (``policy``,
    ``host_memory``, ...). ``Engine`` accepts only SGLang's own names, so they travel
    to its processes as ``KRUL_*`` variables of this process's environment, which this
    function sets; names not given are cleared. Raises
    :class:`~krul_sglang.config.KrulConfigError`.
    """
    config = KrulConfig.from_values({**values, "enabled": "1"})
    for setting in settings():
        os.environ.pop(setting.env, None)
    os.environ.update(config.to_environment())
    return {"radix_cache_backend": "krul"}
