"""The packed kernels compile for NVIDIA GPUs, on hosts that have none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = Path(__file__).with_name("packed_compile.py")


@pytest.mark.process
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile(capability):
    nvidia = pytest.importorskip("triton.backends.nvidia")
    if not (Path(nvidia.__file__).parent / "bin" / "ptxas").is_file():
        pytest.skip("this Triton has no ptxas")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, CHILD, str(capability)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
