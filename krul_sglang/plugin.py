"""The entry point SGLang calls in every process (``sglang.srt.plugins``).

SGLang logs and swallows what a plugin raises, so this does nearly nothing: it
registers the hooks and the cache backend. The cache factory later verifies that
every hook really took effect and refuses to start otherwise.
"""

from __future__ import annotations

_registered = False


def register() -> None:
    """Register Krul with SGLang. Idempotent, cheap, starts nothing."""
    global _registered
    if _registered:
        return
    from krul_sglang.runtime import hooks

    hooks.register()
    _registered = True
