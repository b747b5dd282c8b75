"""The ``krul`` command and what the set-up leaves behind."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from krul_sglang import __version__
from krul_sglang.cli import BEGIN, END
from krul_sglang.config import flags_table

ROOT = Path(__file__).resolve().parents[2]


def krul(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "krul_sglang.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        check=False,
        timeout=120,
    )


def test_version():
    assert krul("--version").stdout.strip() == __version__


def test_help_names_every_command():
    text = krul("--help").stdout
    for command in ("serve", "doctor", "calibrate", "cpu-host", "docs"):
        assert command in text


def test_package_imports_neither_torch_nor_sglang():
    code = (
        "import sys, krul_sglang, krul_sglang.config, krul_sglang.plugin, krul_sglang.cli; "
        "print([m for m in ('torch', 'sglang', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.server
def test_doctor_passes_here(chat_model):
    """Where the tests run, serving works, and doctor says so line by line."""
    done = krul("doctor", "--model", str(chat_model))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert all(line.startswith("ok") for line in lines)
    for name in ("Python", "torch", "sglang", "plugin loaded", "hooks applied", "model supported"):
        assert any(name in line for line in lines)


def test_doctor_names_a_bad_setting_and_the_fix():
    done = krul("doctor", KRUL_HOST_MEMORY="lots")
    assert done.returncode == 1
    assert "KRUL_HOST_MEMORY=lots" in done.stdout
    assert "such as 4GB" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.process
def test_doctor_notices_too_large_a_budget():
    done = krul("doctor", KRUL_HOST_MEMORY="900TB", SGLANG_PLUGINS="none")
    assert done.returncode == 1
    assert "lower --krul-host-memory" in done.stdout
    assert "plugin loaded: no" in done.stdout


def test_documented_flags_are_current():
    page = (ROOT / "docs" / "flags.md").read_text()
    generated = page.partition(BEGIN)[2].partition(END)[0].strip()
    assert generated == flags_table().strip(), "run `make docs`"


def test_version_is_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "krul_sglang.__version__"
    assert importlib.metadata.version("krul-sglang") == __version__


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--model", "/nowhere"), "/nowhere: no readable config.json"),
        (("--model", "{model}", "--text", "/nowhere.txt"), "/nowhere.txt"),
        (("--model", "{model}", "--text", "{model}/model.safetensors"), "not a text file"),
        (("--model", "{model}", "--out", "/proc/nowhere/profile"), "/proc/nowhere"),
        (("--model", "{model}", "--text", "{model}/config.json"), "of 900 tokens"),
        (("--model", "{model}", "--conversations", "{model}/config.json"), "line 1"),
    ],
)
def test_calibrate_says_what_is_wrong_in_one_line(chat_model: Path, arguments, named):
    done = krul("calibrate", *(part.format(model=chat_model) for part in arguments))
    assert done.returncode == 2
    (line,) = [
        text for text in done.stderr.splitlines() if text.startswith("krul calibrate: error")
    ]
    assert named in line
    assert "Traceback" not in done.stderr
