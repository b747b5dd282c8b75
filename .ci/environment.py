"""Create or refresh the project's virtual environment: `make setup`.

Standard library only, because it runs before anything is installed. What to
install is in pyproject.toml. An NVIDIA GPU gets SGLang in full; a CPU-only host
gets the light route. Running it again does nothing until pyproject.toml changes;
an interrupted run is simply run again.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("demo", "bench", "dev", "remote")


def has_nvidia_gpu() -> bool:
    """Whether the NVIDIA driver lists at least one GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU" in listed.stdout


def run(step: str, command: list[str], advice: str) -> None:
    """Run one step, or end with what to do about its failure."""
    print(f"  {step} ...", end="", flush=True)
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        print(f" failed\n{tail}\n\nerror: {step} failed. {advice}", file=sys.stderr)
        raise SystemExit(1)
    print(f" {time.monotonic() - began:.0f} s")


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    args = parser.parse_args()
    if sys.version_info < (3, 11):
        print(
            "error: Python 3.11 or newer is needed; run `make setup PYTHON=python3.11` "
            f"(this is {sys.version.split()[0]})",
            file=sys.stderr,
        )
        return 1
    text = (ROOT / "pyproject.toml").read_bytes()
    project = tomllib.loads(text.decode())
    gpu = has_nvidia_gpu()
    stamp = args.venv / "krul-setup.stamp"
    wanted = hashlib.sha256(text + Path(__file__).read_bytes() + str(gpu).encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted:
        return 0

    print(f"setting up {args.venv.name} for {'an NVIDIA GPU' if gpu else 'a CPU-only host'}")
    python = args.venv / "bin" / "python"
    network = "Check the network and the package index, then run `make setup` again."
    if not python.is_file() or subprocess.run([python, "-c", ""], check=False).returncode != 0:
        run(
            "creating the environment",
            [sys.executable, "-m", "venv", "--clear", str(args.venv)],
            "Install your Python's venv module (Debian: apt-get install python3-venv).",
        )
    # Python compiles what is imported, once; pip would compile all of every package.
    pip = [str(python), "-m", "pip", "install", "--no-compile", "--quiet"]
    pip += ["--disable-pip-version-check"]
    extras = [*EXTRAS, *(("sglang", "flashinfer") if gpu else ("cpu",))]
    run(
        "installing Krul and what it needs (minutes the first time)",
        [*pip, "--editable", f"{ROOT}[{','.join(extras)}]"],
        network,
    )
    pins = project["tool"]["krul"]["environment"]
    without = [*pins["no-deps"], *([] if gpu else pins["no-deps-cpu"])]
    run("installing SGLang and the chat model", [*pip, "--no-deps", *without], network)
    if not gpu:
        run(
            "activating the CPU stand-ins",
            [str(python), "-m", "krul_sglang.cpu_host.install"],
            "Make the environment's site-packages folder writable.",
        )
    stamp.write_text(wanted)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted; `make setup` goes on from here", file=sys.stderr)
        sys.exit(130)
