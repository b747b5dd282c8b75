"""`make test-gpu` is for machines with torch, triton, numpy and pytest, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
OTHERS = (
    *("hypothesis", "krul_sglang", "sglang", "transformers", "safetensors", "msgpack", "zstandard"),
    *("rich", "psutil", "requests", "filelock", "pytest_timeout", "xdist", "flashinfer"),
)
CHILD = f"""
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OTHERS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
import pytest
sys.exit(pytest.main([*sys.argv[1:], "-q", "--collect-only", "-p", "no:cacheprovider"]))
"""


@pytest.mark.process
def test_other_packages_are_not_needed_to_collect_these_tests() -> None:
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    env["PYTHONPATH"] = str(HERE.parents[1] / "kernels")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, f"--confcutdir={HERE}", str(HERE)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {line.split("::")[0].rsplit("/", 1)[-1] for line in done.stdout.splitlines()}
    files = {path.name for path in HERE.glob("test_*.py")}
    # One holds the ops against the package's codec, one draws its cases with hypothesis.
    assert files - found == {"test_packed_codec.py", "test_attention_mass_properties.py"}
