"""``krul calibrate``: reads the texts, shows progress, writes a profile a rank."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

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
    texts: list[Text] = [path.read_text() for path in files]
    if conversations:
        chats = read_conversations(conversations)
        texts += [[dict(message) for message in chat.messages] for chat in chats]
    target = out or default_path(model)
    stage = TextColumn("{task.description} {task.percentage:3.0f} %")
    with Progress(stage, BarColumn(), Elapsed(), Remaining(), console=Console(stderr=True)) as bar:
        for rank in range(tp_size):
            file = rank_path(target, rank, tp_size)
            tell = partial(_update, bar, bar.add_task("loading", total=1.0))
            calibrate(model, texts or None, file, tell, tp_rank=rank, tp_size=tp_size)
            bar.console.print(f"wrote {file}")


def _update(bar: Progress, task: TaskID, stage: str, share: float) -> None:
    bar.update(task, description=stage, completed=share)
