"""The ``krul`` command and what the set-up leaves behind."""

from __future__ import annotations

import importlib.metadata
import json
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
    for command in ("serve", "doctor", "calibrate", "quality", "inspect", "cpu-host", "docs"):
        assert command in text


WRONG = {
    "inspekt": "krul: error: No such command 'inspekt'. Did you mean 'inspect'? "
    "(see `krul --help`)",
    "inspect --frob": "krul inspect: error: No such option: --frob (see `krul inspect --help`)",
    "trace --limit 0": "krul trace: error: Invalid value for '--limit': Input should be greater "
    "than or equal to 1 (see `krul trace --help`)",
    "quality --model x": "krul quality: error: Missing option '--conversations' (see `krul quality "
    "--help`)",
    "quality --model x --conversations nowhere": "krul quality: error: nowhere: no such file or "
    "directory",
    "docs --folder nowhere": "krul docs: error: --folder=nowhere: no docs of Krul's there",
    "serve": "krul serve: error: which model? give --model-path DIR",
    "inspect --url ftp://x": "krul inspect: error: --url ftp://x: not an address such as "
    "http://127.0.0.1:30000",
}


@pytest.mark.process
@pytest.mark.parametrize("line", WRONG)
def test_what_is_wrong_is_one_line_and_exit_code_2(line: str):
    done = krul(*line.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == WRONG[line] + "\n"


def test_nothing_asked_is_help():
    done = krul()
    assert done.returncode == 2
    assert "A running server" in done.stdout + done.stderr
    assert krul("trace", "-h").returncode == 0


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
    names = ("Python", "torch", "sglang", "profile", "plugin loaded", "hooks applied")
    for name in (*names, "model supported"):
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


@pytest.mark.process
def test_doctor_looks_at_the_profile(chat_model: Path, tmp_path: Path):
    env = {"SGLANG_PLUGINS": "none", "XDG_CACHE_HOME": str(tmp_path)}
    assert "none yet; the first start" in krul("doctor", "--model", str(chat_model), **env).stdout
    done = krul("doctor", "--model", str(chat_model), **env, KRUL_PROFILE="/nowhere")
    assert done.returncode == 1
    assert "FAIL profile: /nowhere: no such file -> `krul calibrate`" in done.stdout


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
        (("--model", "/nowhere"), "/nowhere: no such folder"),
        (("--model", "{model}", "--text", "/nowhere.txt"), "/nowhere.txt"),
        (("--model", "{model}", "--text", "{model}/model.safetensors"), "not a text file"),
        (("--model", "{model}", "--out", "/proc/nowhere/profile"), "--out: no profile can be"),
        (("--model", "{model}", "--out", "/proc/profile"), "written to /proc ("),
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


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--policies", "predictive,predictve"), "did you mean 'predictive'?"),
        (("--policies", "predictive@no"), "nats above 0"),
        (("--policies", "lossless@1"), "takes no budget"),
        (("--policies", "predictive", "--profile", "/nowhere"), "/nowhere: no such file"),
        (("--history", "3000"), "no conversation is long enough"),
        (("--json", "/proc/nowhere/out.json"), "/proc/nowhere"),
        (("--model", "/nowhere"), "/nowhere: no model there"),
        (("--policies", "predictive", "--budget", "-1"), "nats above 0"),
    ],
)
def test_quality_says_what_is_wrong_in_one_line(chat_model: Path, tmp_path, arguments, named):
    file = tmp_path / "c.jsonl"
    file.write_text('{"id": 1, "messages": [{"role": "user", "content": "Hello."}]}')
    options = ("--policies", "lossless", *arguments)
    done = krul("quality", "--model", str(chat_model), "--conversations", str(file), *options)
    assert done.returncode == 2
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("krul quality: error")]
    assert named in line
    assert "Traceback" not in done.stderr


@pytest.mark.process
def test_quality_measures_policies(chat_model: Path, chat_profile: Path, tmp_path):
    """A short history of the real model; JSON of the documented form."""
    file, out = tmp_path / "c.jsonl", tmp_path / "out.json"
    text = " ".join(f"The number after {n} is {n + 1}." for n in range(40))
    file.write_text(
        json.dumps({"id": "count", "messages": [{"role": "user", "content": text}]}) + "\n"
    )
    policies = "predictive,predictive@0.001,paper,fixed,lossless"
    sizes = ("--history", "200", "--continuation", "60")
    done = krul(
        *("quality", "--model", str(chat_model), "--conversations", str(file), *sizes),
        *("--policies", policies, "--profile", str(chat_profile), "--json", str(out)),
    )
    assert done.returncode == 0, done.stderr
    table = json.loads(out.read_text())["policies"]
    assert list(table) == policies.split(",")
    keys = {"ratio", "kl_mean", "kl_p99", "top1", "nll_delta", "raw_bytes", "stored_bytes"}
    for row in table.values():
        assert keys | {"encode_s", "decode_s", "conversations"} <= row.keys()
        assert row["ratio"] == pytest.approx(row["raw_bytes"] / row["stored_bytes"])
        assert row["raw_bytes"] == 200 * 30 * 3 * 128 * 2
    assert table["lossless"]["kl_mean"] == pytest.approx(0, abs=1e-6)
    assert table["predictive"]["kl_mean"] < 0.05 < table["fixed"]["kl_mean"]
    assert table["predictive"]["ratio"] > table["predictive@0.001"]["ratio"] > 2
    for name in policies.split(","):
        assert name in done.stdout
