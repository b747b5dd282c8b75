"""What a program cost, as JSON and as a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from session import Session

ASKED = ("text", "sampling")
"""Of a turn, what is not told."""
ROWS = 40
"""More turns than this are shown as one row a turn's number."""


def report(title: str, session: Session) -> dict[str, Any]:
    """Everything measured, as JSON takes it."""
    turns = session.endpoint.turns
    hits = [turn for turn in turns if turn.without is not None]
    state = session.krul()
    return {
        "program": title,
        "policy": state["policy"],
        "pool_tokens": session.pool,
        "chat_template": session.endpoint.chat_template.name,
        "turns": [{k: v for k, v in asdict(turn).items() if k not in ASKED} for turn in turns],
        "restored_tokens": sum(turn.restored for turn in turns),
        "computed_tokens": sum(turn.computed for turn in turns),
        "ratio": state["ratio"],
        "ttft_with": statistics.median(t.ttft for t in hits) if hits else None,
        "ttft_without": statistics.median(t.without or 0 for t in hits) if hits else None,
    }


def show(out: Console, title: str, found: dict[str, Any]) -> None:
    """The table, and one line about it."""
    turns: Sequence[dict[str, Any]] = found["turns"]
    many = len(turns) > ROWS
    out.print(title)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("turn" if many else "conversation")
    table.add_column("requests" if many else "turn", justify="right")
    for name in ("prompt", "on device", "restored", "computed", "TTFT", "without Krul"):
        table.add_column(name, justify="right", no_wrap=True)
    if many:
        for number in sorted({turn["number"] for turn in turns}):
            alike = [turn for turn in turns if turn["number"] == number]
            table.add_row(f"{number}", f"{len(alike)}", *_middle(alike))
    else:
        for turn in turns:
            table.add_row(turn["conversation"], f"{turn['number']}", *_cells(turn))
    out.print(table)
    if many:
        out.print("Tokens are sums, times medians; without Krul: of turns that returned.")
    with_krul, without = found["ttft_with"], found["ttft_without"]
    if with_krul is None or without is None:
        out.print("Nothing was restored." if not found["restored_tokens"] else "Not compared.")
        return
    ratio = f", stored {found['ratio']:.1f} times smaller" if found["ratio"] else ""
    out.print(
        f"{found['restored_tokens']} tokens restored{ratio}. First token of a returning turn after "
        f"[bold]{with_krul:.2f} s[/], computed anew after {without:.2f} s (medians)."
    )


def _cells(turn: dict[str, Any]) -> list[str]:
    without = "" if turn["without"] is None else f"{turn['without']:.2f} s"
    numbers = [str(turn[name]) for name in ("prompt", "device", "restored", "computed")]
    return [*numbers, f"{turn['ttft']:.2f} s", without]


def _middle(turns: Sequence[dict[str, Any]]) -> list[str]:
    sums = [str(sum(t[name] for t in turns)) for name in ("prompt", "device", "restored")]
    computed = str(sum(t["computed"] for t in turns))
    ttft = statistics.median(t["ttft"] for t in turns)
    hits = [t["without"] for t in turns if t["without"] is not None]
    without = f"{statistics.median(hits):.2f} s" if hits else ""
    return [*sums, computed, f"{ttft:.2f} s", without]
