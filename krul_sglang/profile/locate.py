"""Where a model's profile lies when the operator names no place."""

from __future__ import annotations

import os
from pathlib import Path

from krul_sglang.profile.file import fingerprint


def default_path(model_dir: str | Path) -> Path:
    """A file in ``$XDG_CACHE_HOME/krul`` (``~/.cache/krul``) named after the fingerprint."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    marks = fingerprint(model_dir)
    return Path(root) / "krul" / f"{marks['weights']}-{marks['config']}.safetensors"


def rank_path(path: str | Path, tp_rank: int, tp_size: int) -> Path:
    """The file of one tensor parallel rank; ``path`` itself when there is one rank."""
    path = Path(path)
    return path if tp_size == 1 else path.with_suffix(f".rank{tp_rank}of{tp_size}{path.suffix}")
