"""``krul quality``: full cache against restored cache, as a table and as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from krul_sglang.codec.base import KVSpec
from krul_sglang.config import POLICIES
from krul_sglang.profile.base import Profile
from krul_sglang.profile.locate import ensure, load_ranks
from krul_sglang.quality.forward import load_model
from krul_sglang.quality.measure import (
    Policy,
    check_names,
    measure,
    package_policies,
    read_conversations,
    spec_of,
    takes_budget,
)

Build = Callable[[Sequence[str], KVSpec, Profile | None, float], Mapping[str, Policy]]


def run(
    model_dir: Path,
    conversations: Path,
    names: Sequence[str],
    *,
    history: int,
    continuation: int,
    budget: float,
    profile: Path | None,
    out: Path | None,
    build: Build = package_policies,
    known: Sequence[str] = POLICIES,
) -> None:
    """Measure, print a table, write ``out``. Raises OSError and ValueError, each with a line
    for the user.

    build: makes the policies called ``names``, of which there are ``known``.
    profile: where the model's lies; None takes the cache folder's, calibrating first if
        there is none.
    """
    console = Console(stderr=True, highlight=False)
    check_names(names, budget, known)
    texts = read_conversations(conversations)
    if out is not None:
        with TemporaryFile(dir=out.parent):  # fails now and not after minutes of measuring
            pass
    maps = None
    if any(map(takes_budget, names)):
        path = profile or ensure(model_dir, 1, console.print)
        (maps,) = load_ranks(model_dir, path, 1)
    model, tokenizer = load_model(model_dir)
    policies = build(names, spec_of(model), maps, budget)
    columns = (TextColumn("measuring {task.percentage:3.0f} %"), BarColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("", total=1.0)
        result = measure(
            model,
            tokenizer,
            texts,
            policies,
            history,
            continuation,
            lambda done: bar.update(task, completed=done),
        )
    if result["skipped"]:
        console.print(
            f"{len(result['skipped'])} of {len(texts)} conversations have fewer than "
            f"{history + continuation} tokens and were left out"
        )
    if len(result["skipped"]) == len(texts):
        raise ValueError(f"{conversations}: no conversation is long enough")
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")
    # A log or a pipe has no width of its own, and the table needs this much.
    Console(highlight=False, width=None if sys.stdout.isatty() else 110).print(_table(result))


def _table(result: Mapping[str, Any]) -> Table:
    table = Table(title="Restored cache against full cache (KL in nats)")
    table.add_column("policy", no_wrap=True)
    for column in ("ratio", "mean KL", "95 % interval", "worst", "top-1", "NLL delta"):
        table.add_column(column, justify="right")
    for name, row in result["policies"].items():
        low, high = row["kl_ci95"]
        table.add_row(
            name,
            f"{row['ratio']:.2f}x" if row["ratio"] else "-",
            f"{row['kl_mean']:.5f}",
            f"{low:.5f} - {high:.5f}",
            f"{row['kl_worst_conversation']:.4f}",
            f"{row['top1']:.1%}",
            f"{row['nll_delta']:+.4f}",
        )
    return table
