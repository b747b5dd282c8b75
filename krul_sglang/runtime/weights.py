"""Where the served model's files lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from krul_sglang.config import KrulConfigError

EXACTLY = "--krul-policy lossless needs none"
WEIGHTS = ("*.safetensors", "*.bin", "*.json")


def model_folder(cfg: Any) -> Path:
    """The folder of the model's weights; a hub's repository is looked up as SGLang does,
    and downloaded if it is not there. Raises :class:`KrulConfigError`."""
    given = Path(str(cfg.model_path)).expanduser()
    if given.is_dir():
        return given
    try:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                str(cfg.model_path),
                revision=cfg.revision,
                cache_dir=cfg.download_dir,
                allow_patterns=list(WEIGHTS),
            )
        )
    except Exception as error:
        # Of many types, and a refused download is for the operator to solve.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise KrulConfigError(
            f"--model-path={cfg.model_path}: no folder of weights to calibrate on ({reason}); give "
            f"the model's folder, or {EXACTLY}"
        ) from error
