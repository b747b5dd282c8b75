"""``krul calibrate``: reads the texts, shows progress, writes a profile a rank."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed
from rich.progress import TimeRemainingColumn as Remaining

from krul_sglang.profile.calibrate import Text, calibrate
from krul_sglang.profile.locate import default_path, rank_path
from krul_sglang.quality.measure import read_conversations


def run(
    model: Path, files: Sequence[Path], conversations: Path | None, out: Path | None, tp_size: int
) -> None:
    """Calibrate every rank. Raises OSError and ValueError, each with a line for the user."""
    texts: list[Text] = [_read(path) for path in files]
    if conversations:
        chats = read_conversations(conversations)
        texts += [[dict(message) for message in chat.messages] for chat in chats]
    target = out or default_path(model)
    _check_writable(target.parent)
    stage = TextColumn("{task.description} {task.percentage:3.0f} %")
    with Progress(stage, BarColumn(), Elapsed(), Remaining(), console=Console(stderr=True)) as bar:
        for rank in range(tp_size):
            file = rank_path(target, rank, tp_size)
            tell = partial(_update, bar, bar.add_task("loading", total=1.0))
            calibrate(model, texts or None, file, tell, tp_rank=rank, tp_size=tp_size)
            bar.console.print(f"wrote {file}")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file ({error.reason})") from None


def _check_writable(folder: Path) -> None:
    """Raise OSError now and not after minutes of measuring."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"--out: no profile can be written to {folder} ({error.strerror})") from None


def _update(bar: Progress, task: TaskID, stage: str, share: float) -> None:
    known = bar.tasks[bar.task_ids.index(task)].description
    if stage != known and not bar.console.is_terminal:
        bar.console.print(f"{stage} from {share:.0%}")  # a log shows no moving bar
    bar.update(task, description=stage, completed=share)
