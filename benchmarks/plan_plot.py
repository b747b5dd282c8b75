"""The picture of benchmarks/plan_choice.py: a panel for each setting, time against the share
that was loaded, with the planner's choice; one more where the link was cut in mid-run."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

Row = dict[str, Any]


def plot(data: dict[str, Any], path: Path) -> None:
    """Write a PNG. Raises ValueError when nothing was measured."""
    rows = [row for row in data["rows"] if "error" not in row]
    choices = [row for row in rows if "points" in row]
    cuts = [row for row in rows if "phases" in row]
    if not choices and not cuts:
        raise ValueError("nothing to plot: no setting was measured")
    choices.sort(key=lambda row: (row["policy"], row["history"], row["bandwidth"] or math.inf))
    count = len(choices) + len(cuts)
    across = min(count, 3)
    down = -(-count // across)
    size = (3.9 * across, 2.8 * down + 0.9)
    figure, axes = pyplot.subplots(down, across, figsize=size, squeeze=False, layout="constrained")
    panels = list(axes.flat)
    for panel in panels[count:]:
        panel.remove()
    for row, panel in zip(choices, panels, strict=False):
        _choice(panel, row)
    for row, panel in zip(cuts, panels[len(choices) :], strict=False):
        _cut(panel, row)
    handles = {
        label: handle
        for panel in panels[:count]
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=across, fontsize=9)
    what = textwrap.fill(_what(data), 75 * across)
    figure.supxlabel(what, fontsize=7, color="dimgray")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _what(data: dict[str, Any]) -> str:
    machine, settings = data["machine"], data["settings"]
    device = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    versions = ", ".join(f"{name} {text}" for name, text in data["versions"].items())
    return f"{settings['model']}, {settings['dtype']}; {device}; {versions}"


def _bars(panel: Any, shares: Sequence[float], rows: Sequence[Row], **style: Any) -> None:
    middle = [row["ttft_p50"] for row in rows]
    low = [row["ttft_p50"] - row["ttft_min"] for row in rows]
    high = [row["ttft_max"] - row["ttft_p50"] for row in rows]
    panel.errorbar(shares, middle, [low, high], capsize=2, **style)


def _choice(panel: Any, row: Row) -> None:
    history = row["history"]
    forced = row["points"]
    _bars(
        panel,
        [point["load"] / history for point in forced],
        forced,
        label="forced: median, least and most",
        color="tab:blue",
        marker="o",
        markersize=4,
        linewidth=1.2,
    )
    expected = _expected(row["planner"]["samples"])
    measured = {point["load"] for point in forced}
    xs = [load for load in sorted(expected) if load in measured]
    panel.plot(
        [load / history for load in xs],
        [expected[load] for load in xs],
        label="expected by the cost model",
        color="gray",
        linestyle="--",
        linewidth=1,
    )
    own = {"color": "tab:red", "marker": "*", "markersize": 12, "zorder": 5}
    share = row["planner_load"] / history
    _bars(panel, [share], [row["planner"]], label="the planner's choice", linestyle="", **own)
    if row["skipped"]:
        begin = min(point["load"] for point in row["skipped"]) / history
        panel.axvspan(begin - 0.02, 1.03, color="0.92", label="not measured: the link is too slow")
    rate = "memory" if row["bandwidth"] is None else f"{row['bandwidth'] / 1e6:.3g} MB/s"
    panel.set_title(
        f"{row['policy']}, {history:,} tokens, {row['bandwidth_name']} ({rate})\n"
        f"planner / best = {row['ratio']:.3f}",
        fontsize=8,
    )
    _finish(panel, "share of the history that is loaded", "s to the first token")
    panel.set_xlim(-0.03, 1.03)


def _expected(samples: Sequence[Row]) -> dict[int, float]:
    """Median over the planner's samples of what the cost model said of each point."""
    found: dict[int, list[float]] = {}
    for sample in samples:
        for load, seconds in sample["expected"]:
            found.setdefault(int(load), []).append(seconds)
    return {load: statistics.median(seconds) for load, seconds in found.items()}


def _cut(panel: Any, row: Row) -> None:
    samples = [sample for phase in row["phases"].values() for sample in phase]
    loads = [sample["load"] / row["history"] for sample in samples]
    numbers = range(1, len(loads) + 1)
    panel.plot(numbers, loads, color="tab:red", marker="*", markersize=8, linewidth=1)
    begin = len(row["phases"]["before"]) + 0.5
    panel.axvspan(begin, begin + len(row["phases"]["cut"]), color="mistyrose")
    panel.set_ylim(-0.05, 1.05)
    panel.set_title(
        f"{row['policy']}, {row['history']:,} tokens, {row['bandwidth_name']} (shaded)",
        fontsize=8,
    )
    _finish(panel, "restore", "share that the planner loads")


def _finish(panel: Any, x: str, y: str) -> None:
    panel.set_xlabel(x, fontsize=8)
    panel.set_ylabel(y, fontsize=8)
    panel.tick_params(labelsize=7)
    panel.grid(alpha=0.3)
    if not panel.get_ylim()[0] < 0:
        panel.set_ylim(bottom=0)
