"""Plots and the table of docs/restore.md, from the JSON of restore.py.

    python benchmarks/restore_report.py restore.json DIR [--docs docs/restore.md]

Writes DIR/restore_history.png, restore_bandwidth.png and restore_storage.png; the table goes
between the generated markers of the docs page, or to the screen.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import FixedLocator

sys.path.insert(0, str(Path(__file__).parent))

from restore_peers import HICACHE, POLICIES, RECOMPUTE

BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"
STYLES = {
    # One colour a policy; dashes for what keeps KV as it is.
    "recompute": ("black", ":", "x"),
    "hicache_host": ("tab:gray", "--", "s"),
    "hicache_file": ("tab:brown", "--", "D"),
    "lossless": ("tab:blue", "-", "o"),
    "partial": ("tab:cyan", "-", "v"),
    "fixed": ("tab:orange", "-", "^"),
    "paper": ("tab:red", "-", "<"),
    "predictive": ("tab:green", "-", "P"),
    "lossless_disk": ("tab:blue", "-.", "o"),
    "predictive_disk": ("tab:green", "-.", "P"),
}

Row = dict[str, Any]


class Run:
    """A file's measured rows, and in which order to show them."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.rows: list[Row] = [row for row in data["rows"] if "error" not in row]
        self.errors: list[Row] = [row for row in data["rows"] if "error" in row]
        self.histories = sorted({row["history"] for row in self.rows})
        peers = [row for row in self.rows if row["policy"] != RECOMPUTE]
        rates = {row["bandwidth_name"]: row["bandwidth"] or math.inf for row in peers}
        self.bandwidths = sorted(rates, key=lambda name: rates[name])
        named = {row["policy"] for row in self.rows}
        self.policies = [policy for policy in POLICIES if policy in named]

    def row(self, policy: str, history: int, bandwidth: str) -> Row | None:
        """A cell; `recompute` has no bandwidth, its row serves all."""
        for row in self.rows:
            here = policy == RECOMPUTE or row["bandwidth_name"] == bandwidth
            if here and (row["policy"], row["history"]) == (policy, history):
                return row
        return None

    def what(self) -> str:
        """Hardware, versions and settings, in one line."""
        machine, settings = self.data["machine"], self.data["settings"]
        versions = ", ".join(f"{name} {text}" for name, text in self.data["versions"].items())
        device = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
        return f"{settings['model']}, {settings['dtype']}; {device}; {versions}"


def _seconds(row: Row | None) -> str:
    if row is None:
        return "-"
    text = f"{row['ttft_p50']:.2f} ({row['ttft_min']:.2f} - {row['ttft_max']:.2f})"
    return text + (f", p99 {row['ttft_p99']:.2f}" if row["ttft_p99"] is not None else "")


def _tokens(row: Row) -> str:
    return f"{row['restored_tokens']:.0f} + {row['recomputed_tokens']:.0f}"


def table(run: Run) -> str:
    """Markdown: a table a history."""
    lines = [f"{run.what()}. Seconds to the first token: median (least - most).", ""]
    for history in run.histories:
        known = run.row(RECOMPUTE, history, "")
        balanced = known["balanced"] / 1e6 if known else math.nan
        lines += [
            f"**{history:,} tokens**, balanced at {balanced:.2f} MB/s",
            "",
            "| policy | stored MB | raw / stored | restored + recomputed tokens | same tokens | "
            + " | ".join(run.bandwidths)
            + " |",
            "|---" * (5 + len(run.bandwidths)) + "|",
        ]
        for policy in run.policies:
            cells = [run.row(policy, history, name) for name in run.bandwidths]
            measured = [row for row in cells if row is not None] or [known]
            if measured[0] is None:
                continue
            last = measured[-1]
            kept = dict.fromkeys(_tokens(row) for row in measured)
            same = [row["agreement"] for row in measured if row["agreement"] is not None]
            stored = last["stored_bytes"]
            lines.append(
                f"| `{policy}` | {f'{stored / 1e6:.2f}' if stored else '-'} | "
                + (f"{last['raw_bytes'] / stored:.2f}x | " if stored else "- | ")
                + f"{', '.join(kept)} | "
                + (f"{min(same):.1%} | " if same else "- | ")
                + " | ".join(_seconds(row) for row in cells)
                + " |"
            )
        lines.append("")
    for row in run.errors:
        name = f"{row['policy']}, {row['history']:,} tokens, {row['bandwidth_name']}"
        lines.append(f"Not measured: {name}: {row['error'].splitlines()[0]}")
    return "\n".join(lines).rstrip() + "\n"


def fill(page: Path, text: str) -> None:
    """Put ``text`` between the page's markers. Raises ValueError when it has none."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page}: no generated markers")
    page.write_text(f"{before}{BEGIN}\n{text}{END}{after}")


def _grid(count: int) -> tuple[Any, list[Any]]:
    columns = min(count, 2 if count in (1, 2, 4) else 3)
    rows = math.ceil(count / columns)
    size = (max(8.5, 4.6 * columns + 0.4), 3.5 * rows + 1.2)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=size, layout="constrained", sharey=True, squeeze=False
    )
    panels = list(axes.flat)
    for panel in panels[count:]:
        panel.remove()
    return figure, panels[:count]


def _line(panel: Any, policy: str, xs: Sequence[float], rows: Sequence[Row]) -> None:
    colour, dashes, marker = STYLES[policy]
    middle = [row["ttft_p50"] for row in rows]
    low = [row["ttft_p50"] - row["ttft_min"] for row in rows]
    high = [row["ttft_max"] - row["ttft_p50"] for row in rows]
    options = {"color": colour, "linestyle": dashes, "marker": marker, "markersize": 5}
    panel.errorbar(xs, middle, [low, high], label=policy, capsize=2, linewidth=1.4, **options)


def _finish(figure: Any, panels: Sequence[Any], run: Run, path: Path) -> None:
    ticks = [digit * 10.0**power for power in range(-3, 5) for digit in (1, 2, 3, 5)]
    for panel in panels:
        panel.set_yscale("log")
        panel.minorticks_off()
        panel.yaxis.set_major_locator(FixedLocator(ticks))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.tick_params(axis="y", labelsize=8)
        panel.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    title = "Seconds to the first token of a conversation that returns"
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=len(labels),
        fontsize=8,
        title=title,
        title_fontsize=12,
        frameon=False,
    )
    _sign(figure, run, path)


def _sign(figure: Any, run: Run, path: Path) -> None:
    """Say on what it was measured, and save."""
    half = run.what().replace("; ", "\n", 1)
    figure.supxlabel(half, fontsize=7, color="dimgray")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_history(run: Run, path: Path) -> None:
    """Time against history, a panel a bandwidth."""
    figure, panels = _grid(len(run.bandwidths))
    for panel, bandwidth in zip(panels, run.bandwidths, strict=True):
        for policy in run.policies:
            rows = [run.row(policy, history, bandwidth) for history in run.histories]
            found = [(h, r) for h, r in zip(run.histories, rows, strict=True) if r is not None]
            if found:
                _line(panel, policy, [h for h, _ in found], [r for _, r in found])
        panel.set_title(f"link: {bandwidth}", fontsize=10)
        panel.set_xscale("log")
        panel.set_xticks(run.histories, [f"{history:,}" for history in run.histories])
        panel.set_xlabel("tokens of history", fontsize=9)
    _finish(figure, panels, run, path)


def plot_bandwidth(run: Run, path: Path) -> None:
    """Time against bandwidth, a panel a history."""
    figure, panels = _grid(len(run.histories))
    for panel, history in zip(panels, run.histories, strict=True):
        for policy in run.policies:
            rows = [run.row(policy, history, name) for name in run.bandwidths]
            found = [(x, row) for x, row in enumerate(rows) if row is not None]
            if found:
                _line(panel, policy, [x for x, _ in found], [row for _, row in found])
        rates = [_rate(run, history, name) for name in run.bandwidths]
        panel.set_xticks(range(len(rates)), rates, fontsize=8)
        panel.set_title(f"{history:,} tokens", fontsize=10)
        panel.margins(x=0.14)  # the last label is a long word
    _finish(figure, panels, run, path)


def _rate(run: Run, history: int, bandwidth: str) -> str:
    rows = (run.row(policy, history, bandwidth) for policy in run.policies if policy != RECOMPUTE)
    rate = next((row["bandwidth"] for row in rows if row is not None), None)
    return bandwidth if rate is None else f"{bandwidth}\n{rate / 1e6:.3g} MB/s"


def plot_storage(run: Run, path: Path) -> None:
    """Bytes kept of one history: the longest of those that the most policies kept."""
    figure, panel = pyplot.subplots(figsize=(7.5, 4.6), layout="constrained")
    kept = [row for row in run.rows if row["stored_bytes"]]
    of = {h: {row["policy"]: row for row in kept if row["history"] == h} for h in run.histories}
    history = max(run.histories, key=lambda h: (len(of[h]), h))
    bars = [of[history][policy] for policy in run.policies if policy in of[history]]
    sizes = [row["stored_bytes"] / row["raw_bytes"] for row in bars]
    colours = [STYLES[row["policy"]][0] for row in bars]
    drawn = panel.bar([row["policy"] for row in bars], sizes, color=colours)
    labels = [
        f"{row['stored_bytes'] / 1e6:.1f} MB"
        + ("" if row["policy"] in HICACHE else f"\n{row['raw_bytes'] / row['stored_bytes']:.1f}x")
        for row in bars
    ]
    panel.bar_label(drawn, labels, padding=2, fontsize=9)
    panel.set_ylim(0, 1.18)
    panel.set_ylabel(f"of the raw {run.data['settings']['dtype']} KV")
    panel.set_title(f"What is kept of a history of {history:,} tokens", fontsize=12)
    panel.grid(alpha=0.3, axis="y")
    panel.set_axisbelow(True)
    panel.tick_params(axis="x", labelsize=9, rotation=15)
    _sign(figure, run, path)


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--docs", type=Path, help="page whose generated part is replaced")
    options = parser.parse_args()
    try:
        run = Run(json.loads(options.json.read_text()))
        if not run.bandwidths:
            raise ValueError(f"{options.json}: nothing that was restored")
        options.dir.mkdir(parents=True, exist_ok=True)
        plot_history(run, options.dir / "restore_history.png")
        plot_bandwidth(run, options.dir / "restore_bandwidth.png")
        plot_storage(run, options.dir / "restore_storage.png")
        if options.docs:
            fill(options.docs, table(run))
        else:
            print(table(run))
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
