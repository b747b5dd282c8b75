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
from xml.etree import ElementTree

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
INTERPRETED = not HAS_GPU and (
    "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1"
)

CANNOT = ("Triton's interpreter", "needs an NVIDIA GPU")
"""How reasons begin for which an interpreting process, too, skips a test."""

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
def interpreted(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Path], None]:
    """``interpreted(file)`` runs a file's Triton tests in an interpreting process.

    They are those with ``triton`` in their name, and none of them may be missing there or
    skipped but for what the interpreter cannot do. Skipped where they run in this process.
    """
    if HAS_GPU or INTERPRETED:
        pytest.skip("this process runs the Triton tests itself")

    def run(file: Path) -> None:
        report = tmp_path / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, "-k", "triton", f"--junitxml={report}", str(file)],
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        cases = list(ElementTree.parse(report).iter("testcase"))
        mine = [i for i in request.session.items if i.path == file and "triton" in i.name]
        assert {i.name for i in mine} <= {case.get("name") for case in cases}
        reasons = [skip.get("message", "") for case in cases for skip in case.iter("skipped")]
        unforeseen = [reason for reason in reasons if not reason.startswith(CANNOT)]
        assert not unforeseen
        assert len(cases) > len(reasons)

    return run
