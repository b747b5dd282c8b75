"""Without a GPU, Triton kernels run in Triton's interpreter.

Triton decides when it is first imported and again when a kernel is decorated, so the
interpreter is only available to a process that asked for it before. Run alone, this folder
does. In a run of all tests SGLang has imported Triton already: tests that use the fixture
``triton_device`` are then skipped, and ``interpreted`` runs them in a process of their own.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
INTERPRETED = not HAS_GPU and (
    "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1"
)

if INTERPRETED:
    # Until the kernels' modules are imported; `pytest_collection_finish` takes it back.
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):  # before any other test's module does
        import triton.language  # noqa: F401


def pytest_collection_finish() -> None:
    """Servers that other folders' tests start inherit the environment."""
    if INTERPRETED:
        os.environ.pop("TRITON_INTERPRET", None)


@pytest.fixture(autouse=True)
def _interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are decorated or launched by this folder's tests."""
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def triton_device() -> str:
    """The device on which this process can run Triton kernels."""
    if HAS_GPU:
        return "cuda"
    if INTERPRETED:
        return "cpu"
    pytest.skip("Triton was imported before its interpreter could be chosen")


@pytest.fixture
def interpreted() -> Callable[[Path], None]:
    """``interpreted(file)`` runs a file's Triton tests in an interpreting process.

    They are those with ``triton`` in their name. Skipped where they run in this process.
    """
    if HAS_GPU or INTERPRETED:
        pytest.skip("this process runs the Triton tests itself")

    def run(file: Path) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, "-k", "triton", str(file)],
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return run
