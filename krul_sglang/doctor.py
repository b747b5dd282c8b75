"""``krul doctor``: would serving work here, and if not, what to do.

Each check is one line. The checks that need sglang run in a child process, because
a broken installation must be reported, not crash the report.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from krul_sglang.config import KrulConfig, KrulConfigError


@dataclass(frozen=True)
class Check:
    """One line of the report; ``fix`` is shown when it failed."""

    name: str
    ok: bool
    found: str
    fix: str = ""


def run(model: Path | None) -> int:
    """Print the report; 0 when serving would work, else 1."""
    from rich.console import Console

    console = Console(highlight=False)
    failed = 0
    for check in checks(model):
        mark = "[green]ok[/]  " if check.ok else "[red]FAIL[/]"
        line = f"{mark} {check.name}: {check.found}"
        if not check.ok:
            failed += 1
            line += f" -> {check.fix}"
        console.print(line, soft_wrap=True)
    if failed:
        console.print(f"{failed} problem{'s' * (failed > 1)}; serving would fail", style="red")
    return 1 if failed else 0


def checks(model: Path | None) -> Iterator[Check]:
    """All checks, cheapest first; later ones are left out when sglang is missing."""
    from krul_sglang.runtime import SUPPORTED_SGLANG

    version = sys.version.split()[0]
    yield Check("Python", sys.version_info >= (3, 11), version, "use Python 3.11 or newer")
    yield _distribution("torch", None)
    sglang = _distribution("sglang", SUPPORTED_SGLANG)
    yield sglang
    yield _stand_ins()
    try:
        config = KrulConfig.from_environment(enabled="1")
        yield Check("settings", True, f"policy {config.policy}")
    except KrulConfigError as error:
        yield Check("settings", False, str(error), "correct or unset that variable")
        return
    yield _memory(config)
    if model is not None and not model.is_dir() and model.is_absolute():
        yield Check("model folder", False, f"{model}: no such folder", "give --model the model's")
        return
    if model is not None and config.needs_profile:
        yield _profile(model, config)
    if sglang.ok:
        yield from _inside_sglang(model)


def _distribution(name: str, wanted: str | None) -> Check:
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pin = f"=={wanted}" if wanted else ""
        return Check(name, False, "not installed", f"pip install {name}{pin} (or `make setup`)")
    ok = wanted is None or found == wanted
    return Check(name, ok, found, f"pip install {name}=={wanted}")


def _stand_ins() -> Check:
    from krul_sglang.cpu_host.install import is_installed, is_needed

    if not is_needed():
        return Check("sgl_kernel", True, "installed")
    if is_installed():
        return Check("sgl_kernel", True, "not installed; CPU stand-ins active")
    return Check(
        "sgl_kernel",
        False,
        "not installed",
        "on a CPU-only host run `krul cpu-host`; with a GPU install sglang in full",
    )


def _memory(config: KrulConfig) -> Check:
    import psutil

    free = psutil.virtual_memory().available
    found = f"{config.host_memory / 1e9:.1f} GB budget, {free / 1e9:.1f} GB available"
    return Check(
        "host memory",
        config.host_memory <= free,
        found,
        "lower --krul-host-memory (KRUL_HOST_MEMORY)",
    )


def _profile(model: Path, config: KrulConfig) -> Check:
    from krul_sglang.profile.base import ProfileError
    from krul_sglang.profile.locate import default_path, load_ranks

    fix = "`krul calibrate`, or --krul-policy lossless, which needs none"
    try:
        path = config.profile or default_path(model)
        if config.profile is None and not path.is_file():
            return Check("profile", True, "none yet; the first start calibrates, in minutes")
        if any(path.parent.glob(f"{path.stem}.rank*of*{path.suffix}")):
            return Check("profile", True, f"{path}, one file a rank")
        load_ranks(model, path, 1)
    except ProfileError as error:
        # Without the flag a stale one is simply made anew.
        return Check("profile", config.profile is None and model.is_dir(), str(error), fix)
    return Check("profile", True, str(path))


def _inside_sglang(model: Path | None) -> Iterator[Check]:
    from krul_sglang.live_server import has_gpu, server_environment

    device = "" if has_gpu() else "cpu"
    done = subprocess.run(
        [sys.executable, "-m", "krul_sglang.runtime.probe", str(model or ""), device],
        capture_output=True,
        text=True,
        env=server_environment(),
        check=False,
    )
    line = next((x for x in done.stdout.splitlines() if x.startswith("PROBE")), None)
    if line is None:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        yield Check("sglang starts", False, last, "reinstall sglang (`make setup`)")
        return
    probe = json.loads(line.removeprefix("PROBE"))
    yield Check(
        "plugin loaded",
        probe["loaded"],
        "yes" if probe["loaded"] else "no",
        "reinstall krul-sglang in this environment; SGLANG_PLUGINS must be unset or name krul",
    )
    absent = ", ".join(probe["missing"])
    yield Check("hooks applied", not absent, absent or "all", "install the supported sglang")
    if model is not None:
        refused = probe["refused"]
        yield Check(
            "model supported", refused is None, refused or str(model), "see docs/compatibility.md"
        )
