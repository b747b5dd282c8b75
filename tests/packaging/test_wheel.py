"""The wheel, built and installed where the repository is not."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import krul_sglang

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.process


def run(*command: str | Path, cwd: Path) -> str:
    """Its output; the test fails with all of it otherwise."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env=env,
        cwd=cwd,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, as a package index would have it."""
    out = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source")
    # A copy: building writes beside the sources.
    files = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file() and name.split("/")[0] not in ("models", "benchmarks", "docs"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=out)
    assert [path.suffix for path in out.glob("*.gz")] == [".gz"]
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel. What it needs comes from this one, where the
    repository is installed, too, but not in that way: a path file is not read through another."""
    fresh = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", "--without-pip", fresh, cwd=fresh)
    python = fresh / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=fresh)
    site = run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=fresh).strip()
    (Path(site) / "needs.pth").write_text(sysconfig.get_path("purelib"))
    return fresh


def test_what_the_wheel_holds(wheel: Path) -> None:
    assert wheel.name == f"krul_sglang-{krul_sglang.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    wanted = {
        str(path.relative_to(base))
        for base, package in ((ROOT, "krul_sglang"), (ROOT / "kernels", "krul_kernels"))
        for path in (base / package).rglob("*")
        if path.suffix in (".py", ".typed")
    }
    packages = {name for name in names if ".dist-info/" not in name}
    assert packages == wanted
    assert {"krul_sglang/py.typed", "krul_kernels/py.typed"} <= packages
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = next(name for name in archive.namelist() if name.endswith("/entry_points.txt"))
    points = configparser.ConfigParser()
    points.read_string(archive.read(info).decode())
    assert dict(points["console_scripts"]) == {"krul": "krul_sglang.cli:main"}
    assert dict(points["sglang.srt.plugins"]) == {"krul": "krul_sglang.plugin:register"}
    metadata = archive.read(info.replace("entry_points.txt", "METADATA")).decode()
    assert "License-Expression: Apache-2.0" in metadata
    extras = {line.split()[1] for line in metadata.splitlines() if line.startswith("Provides-Ex")}
    assert {"sglang", "flashinfer", "cpu", "demo"} <= extras
    assert "sglang==0.5.23; extra == 'sglang'" in metadata.replace('"', "'")


def test_the_changelog_names_the_version() -> None:
    assert f"\n## {krul_sglang.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_it_works_without_the_repository(installed: Path, tmp_path: Path) -> None:
    krul = installed / "bin" / "krul"
    assert run(krul, "--version", cwd=tmp_path).strip() == krul_sglang.__version__
    assert "krul top" in run(krul, "top", "--help", cwd=tmp_path)
    where = run(
        installed / "bin" / "python",
        "-c",
        "import krul_sglang, krul_kernels.packed, importlib.metadata as m;"
        "print(krul_sglang.__file__, krul_kernels.__file__);"
        "(p,) = m.entry_points(group='sglang.srt.plugins', name='krul');"
        "print(p.load().__module__)",
        cwd=tmp_path,
    )
    package, kernels, plugin = where.split()
    assert Path(package).is_relative_to(installed)
    assert Path(kernels).is_relative_to(installed)
    assert plugin == "krul_sglang.plugin"


def test_every_module_can_be_imported_from_it(installed: Path, tmp_path: Path) -> None:
    """Nothing in it needs a file that only the repository has."""
    code = (
        "import pkgutil, importlib, krul_sglang, krul_kernels\n"
        "for package in (krul_sglang, krul_kernels):\n"
        "    prefix = package.__name__ + '.'\n"
        "    for one in pkgutil.walk_packages(package.__path__, prefix):\n"
        "        if not one.name.startswith(('krul_sglang.runtime', 'krul_sglang.cpu_host'))"
        " and not one.name.endswith(('_triton', 'flashinfer_hooks')):\n"
        "            importlib.import_module(one.name)\n"
        "            print(one.name)\n"
    )
    listed = run(installed / "bin" / "python", "-c", code, cwd=tmp_path).split()
    assert len(listed) > 80
    assert "krul_sglang.store.disk.tier" in listed
