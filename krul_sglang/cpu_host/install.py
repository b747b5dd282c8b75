"""Put the ``.pth`` file that activates :mod:`.bootstrap` into this environment."""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path

PTH_NAME = "krul_cpu_host.pth"
# One line, because site.py executes single lines; guarded, so that removing the
# package never breaks the environment's Python.
PTH_LINE = (
    "import importlib.util as _u; "
    "_u.find_spec('krul_sglang') and __import__('krul_sglang.cpu_host.bootstrap')\n"
)


def pth_path() -> Path:
    """Where the file belongs in the running environment."""
    return Path(sysconfig.get_path("purelib")) / PTH_NAME


def is_installed() -> bool:
    """Whether this environment activates the stand-ins at start."""
    path = pth_path()
    return path.is_file() and path.read_text() == PTH_LINE


def is_needed() -> bool:
    """Whether this environment lacks a real ``sgl_kernel``."""
    spec = importlib.util.find_spec("sgl_kernel")
    return spec is None or spec.origin == "krul CPU stand-in"


def install() -> Path:
    """Write the file (idempotent) and return its path."""
    path = pth_path()
    if not is_installed():
        path.write_text(PTH_LINE)
    return path


if __name__ == "__main__":
    print(install())
