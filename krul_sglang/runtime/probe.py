"""What ``krul doctor`` asks about SGLang, answered from a process of its own.

``python -m krul_sglang.runtime.probe MODEL DEVICE`` loads SGLang's plugins as a server
would and prints one JSON line behind ``PROBE``. MODEL and DEVICE may be empty.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def probe(model: str, device: str) -> dict[str, Any]:
    """Whether the plugin loaded, hooks applied, and ``model`` would be served."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.mem_cache.registry import registered_radix_cache_backends

    from krul_sglang import plugin
    from krul_sglang.runtime import BACKEND, hooks

    return {
        "loaded": plugin._registered and BACKEND in registered_radix_cache_backends(),
        "missing": hooks.missing(),
        "refused": refusal(model, device) if model else None,
    }


def refusal(model: str, device: str) -> str | None:
    """Why a server with Krul would not start with ``model``; None when it would."""
    from sglang.srt.server_args import ServerArgs

    from krul_sglang.config import KrulConfigError
    from krul_sglang.runtime import BACKEND

    record = ServerArgs(model_path=model, device=device or None, radix_cache_backend=BACKEND)
    try:
        record.resolve_once()
    except KrulConfigError as error:
        return str(error)
    except Exception as error:
        # SGLang's own reason, of whatever type: the first line says it.
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None


if __name__ == "__main__":
    print("PROBE" + json.dumps(probe(sys.argv[1], sys.argv[2])))
