"""``krul top``: what a running server stores and restores, live.

Everything comes from three routes of the server: /server_info (its ``krul`` block), /v1/loads and
/krul/restores. Rates are differences between two looks at it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from krul_sglang.inspection.command import Server
from krul_sglang.inspection.show import age_text, bytes_text, console, table_of

Row = Mapping[str, Any]
RESTORES = 8
"""Restores that are listed."""
RATES = ("restores", "restored_tokens", "recomputed_tokens", "evicted_tokens", "dropped_tokens")
BAR = 30


@dataclass(frozen=True)
class Look:
    """What a server said at one moment. ranks: its ``krul`` blocks, one a replica; loads: its
    running and waiting requests, one a replica; restores: the newest first."""

    ranks: Sequence[Row]
    loads: Sequence[Row]
    restores: Sequence[Row]
    model: str
    at: float = field(default_factory=time.monotonic)

    def total(self, *names: str) -> float:
        """A figure of the ``krul`` blocks, ranks together."""
        return sum(_inside(rank, *names) for rank in self.ranks)

    def load(self, name: str) -> float:
        """A figure of the loads, ranks together."""
        return sum(one[name] for one in self.loads)


def look(server: Server) -> Look:
    """Ask a server. Raises OSError and ValueError, each with a line for the user."""
    info = server.get("/server_info", "internal_states")
    ranks = [state["krul"] for state in info["internal_states"] if "krul" in state]
    if not ranks:
        raise ValueError(f"{server.url} runs without Krul; start it with --enable-krul")
    loads = server.get("/v1/loads", "loads")["loads"]
    restores = server.get(f"/krul/restores?limit={RESTORES}", "restores")["restores"]
    return Look(ranks, loads, restores, str(info.get("served_model_name") or ""))


def rates(before: Look | None, now: Look) -> dict[str, float]:
    """Per second since the look before; empty where there was none or the server began anew."""
    if before is None or now.at <= before.at:
        return {}
    grown = {name: now.total(name) - before.total(name) for name in RATES}
    if min(grown.values()) < 0:
        return {}
    return {name: count / (now.at - before.at) for name, count in grown.items()}


def run(url: str, *, once: bool, interval: float, api_key: str | None) -> None:
    """Show a server until Ctrl-C, or once where that is asked for or the output is no terminal.

    Raises OSError and ValueError, each with a line for the user; later, while it is shown live, a
    server that is gone is waited for.
    """
    server, out = Server(url, api_key), console()
    if once or not out.is_terminal:
        out.print(frame(server.url, look(server), {}))
        return
    _watch(server, out, interval)


def _watch(server: Server, out: Console, interval: float) -> None:
    before: Look | None = None
    # The other screen: what stood in the terminal is back afterwards.
    with Live(console=out, screen=True, auto_refresh=False, transient=True) as live:
        try:
            while True:
                try:
                    now = look(server)
                    live.update(frame(server.url, now, rates(before, now)), refresh=True)
                    before = now
                except (OSError, ValueError) as error:
                    line = Text(f"{error}; asking again every {interval:g} s", style="bold red")
                    live.update(_gone(server.url, before, line), refresh=True)
                time.sleep(interval)
        except KeyboardInterrupt:
            return


def _gone(url: str, before: Look | None, line: RenderableType) -> RenderableType:
    """The line, above what was seen last."""
    return line if before is None else Group(line, frame(url, before, {}))


# ---- what is shown -----------------------------------------------------------------


def frame(url: str, now: Look, speed: Mapping[str, float]) -> RenderableType:
    """All of it. speed: what :func:`rates` gives."""
    return Group(
        _head(url, now), "", _tiers(now), "", _figures(now, speed), "", _restores(now.restores)
    )


def _head(url: str, now: Look) -> RenderableType:
    replicas = f", {len(now.ranks)} replicas" if len(now.ranks) > 1 else ""
    text = Text(f"krul top  {url}  ", style="bold")
    return text.append(f"{now.model}  {now.ranks[0]['policy']}{replicas}", style="not bold")


def _tiers(now: Look) -> RenderableType:
    """Device, memory and what other tiers there are, each against its budget."""
    table = _table("tier", "", "held", "of", "")
    used, pool = now.load("num_used_tokens"), now.load("max_total_num_tokens")
    _bar(table, "device", used, pool, lambda count: f"{count:.0f} tokens")
    kinds = now.ranks[0]["memory"].keys() - {"limit", "peak"}
    held = sum(now.total("memory", kind) for kind in kinds)
    _bar(table, "memory", held, now.total("memory", "limit"), _size)
    tiers = {name for rank in now.ranks for name in rank["tiers"]} - {"memory"}
    for tier in sorted(tiers):
        limit = now.total("tiers", tier, "limit")
        _bar(table, tier, now.total("tiers", tier, "bytes"), limit, _size)
    return table


def _bar(table: Table, name: str, held: float, limit: float, shown: Callable[[float], str]) -> None:
    share = held / limit if limit else 0.0
    style = "red" if share > 0.95 else "yellow" if share > 0.8 else "green"
    bar = ProgressBar(max(limit, 1), min(held, limit), BAR, complete_style=style)
    table.add_row(name, bar, shown(held), shown(limit) if limit else "no limit", f"{share:.0%}")


def _figures(now: Look, speed: Mapping[str, float]) -> RenderableType:
    """Counts on the left, what happens on the right."""
    raw, kept = now.total("raw_bytes"), now.total("stored_bytes")
    waiting = now.total("segments") - now.total("sealed_segments")
    hits = [one["cache_hit_rate"] for one in now.loads]
    table = _table("", "", "", "per second", "total")
    left = (
        ("requests running, waiting", f"{now.load('num_running_reqs'):.0f}, "
         f"{now.load('num_waiting_reqs'):.0f}"),
        ("hit rate of the last prefills", f"{sum(hits) / max(1, len(hits)):.0%}"),
        ("stored tokens", f"{now.total('stored_tokens'):.0f}"),
        ("segments (to be encoded)", f"{now.total('segments'):.0f} ({waiting:.0f})"),
        ("stored, against raw", f"{bytes_text(round(kept))}, {raw / kept:.1f}x" if kept else "-"),
        ("failed, late restores", f"{now.total('restore', 'failed'):.0f}, "
         f"{now.total('restore', 'late'):.0f}"),
        ("damaged segments", f"{now.total('lost_segments'):.0f}"),
    )  # fmt: skip
    right = [
        (name.replace("_", " "), f"{speed[name]:.1f}" if name in speed else "-",
         f"{now.total(name):.0f}")
        for name in RATES
    ]  # fmt: skip
    right += [("", "", "")] * (len(left) - len(right))
    for (name, value), (what, rate, total) in zip(left, right, strict=True):
        table.add_row(name, value, what, rate, total)
    table.columns[2].justify = "left"
    return table


def _restores(found: Sequence[Row]) -> RenderableType:
    if not found:
        return Text("Nothing was restored yet.")
    names = ("last restores", "tokens", "computed anew", "new", "bytes", "s", "expected s")
    table = _table(*names, "load idle", "compute idle", "")
    for one in found:
        seconds, expected = one["makespan_seconds"], one["predicted_seconds"]
        idle = {
            name: own / seconds if seconds else 0 for name, own in one["bubble_seconds"].items()
        }
        table.add_row(
            f"{age_text(one['age_seconds'])} ago",
            f"{one['tokens']}",
            f"{one['recomputed_tokens']}",
            f"{one['new_tokens']}",
            bytes_text(one["stored_bytes"]),
            f"{seconds:.3f}",
            "-" if expected is None else f"{expected:.3f}",
            f"{idle['load']:.0%}",
            f"{idle['compute']:.0%}",
            "failed" if one["failed"] else "",
        )
    return table


def _inside(row: Any, *names: str) -> float:
    """0 where a rank has no such tier."""
    for name in names:
        row = row.get(name) or 0 if isinstance(row, Mapping) else 0
    return row


def _size(count: float) -> str:
    return bytes_text(round(count))


def _table(*names: str) -> Table:
    table = table_of(*names, left=(names[0], ""))
    table.header_style = "bold"
    return table
