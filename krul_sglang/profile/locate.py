"""Where a model's profile lies, and making it when it is not there yet.

Without ``--krul-profile`` profiles are kept in the user's cache folder, named after the
fingerprint, so that a model is calibrated once per machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from krul_sglang.profile.base import Profile, ProfileError
from krul_sglang.profile.file import fingerprint, load_profile


def default_path(model_dir: str | Path) -> Path:
    """A file in ``$XDG_CACHE_HOME/krul`` (``~/.cache/krul``) named after the fingerprint."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    marks = fingerprint(model_dir)
    return Path(root) / "krul" / f"{marks['weights']}-{marks['config']}.safetensors"


def rank_path(path: str | Path, tp_rank: int, tp_size: int) -> Path:
    """The file of one tensor parallel rank; ``path`` itself when there is one rank."""
    path = Path(path)
    return path if tp_size == 1 else path.with_suffix(f".rank{tp_rank}of{tp_size}{path.suffix}")


def load_ranks(model_dir: str | Path, path: str | Path, tp_size: int) -> list[Profile]:
    """The profiles of ``model_dir`` at ``path``, one a rank. Raises :class:`ProfileError`
    naming the file and what of it is missing, damaged or another model's."""
    profiles = []
    for rank in range(tp_size):
        file = rank_path(path, rank, tp_size)
        if not file.is_file():
            raise ProfileError(f"{file}: no such file")
        profiles.append(load_profile(file, fingerprint(model_dir, rank, tp_size)))
    return profiles


def ensure(model_dir: str | Path, tp_size: int, tell: Callable[[str], None]) -> Path:
    """The default path, calibrated now if a rank's file is missing, damaged or stale.

    tell: gets one line before the wait. Calibration runs in a process of its own, so
    that its memory goes when it ends; other processes that want the same profile wait
    for it. Raises :class:`ProfileError`.
    """
    path = default_path(model_dir)
    if not _problem(model_dir, path, tp_size):
        return path
    with _alone(path, tell):
        reason = _problem(model_dir, path, tp_size)  # another process may have made it
        if reason:
            tell(
                f"calibrating {Path(model_dir).name} ({reason}): once for a model, minutes for a "
                f"small one; kept in {path.parent}"
            )
            _calibrate(model_dir, path, tp_size)
    return path


def _problem(model_dir: str | Path, path: Path, tp_size: int) -> str:
    """Why the profile at ``path`` cannot be used, empty if it can."""
    if not rank_path(path, 0, tp_size).exists():
        return "it has no profile yet"
    try:
        load_ranks(model_dir, path, tp_size)
    except ProfileError as error:
        return str(error)
    return ""


@contextmanager
def _alone(path: Path, tell: Callable[[str], None]) -> Iterator[None]:
    from filelock import FileLock, Timeout

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            tell("another process calibrates this model; waiting for it")
            lock.acquire()
    except OSError as error:
        raise ProfileError(f"{path.parent}: cannot be written ({error.strerror})") from error
    try:
        yield
    finally:
        lock.release()


def _calibrate(model_dir: str | Path, path: Path, tp_size: int) -> None:
    command = [sys.executable, "-m", "krul_sglang.cli", "calibrate", "--model", str(model_dir)]
    command += ["--out", str(path), "--tp-size", str(tp_size)]
    # A folder in the working directory must never shadow a package.
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise ProfileError(
            f"calibrating {model_dir} ended with exit code {done.returncode}, see above"
        )
