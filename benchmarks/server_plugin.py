"""Bring one module into the processes of a server under measurement, as a plugin of SGLang."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType


@contextmanager
def as_plugin(module: ModuleType) -> Iterator[dict[str, str]]:
    """The environment in which SGLang finds ``module`` and calls its ``register`` in every
    process: a distribution of one module in a temporary folder, away from its neighbours here,
    which could shadow packages. It cannot import them either."""
    assert module.__file__ is not None
    source = Path(module.__file__)
    name = source.stem
    with TemporaryDirectory(prefix=f"{name}-") as folder:
        shutil.copy(source, folder)
        about = Path(folder, f"{name}-0.dist-info")
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
        (about / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {name}:register\n")
        yield {"PYTHONPATH": folder}
