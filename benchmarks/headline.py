"""The README's table and picture, from the committed results.

    python benchmarks/headline.py --restore docs/restore.json --readme README.md \
        --png docs/headline.png

Nothing is measured: the times and bytes are those of benchmarks/restore.py, at the history of which
the other pages tell.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"
HISTORY = 4096
"""Tokens."""
WAYS = {
    "recompute": "computed anew",
    "hicache_host": "HiCache, SGLang's host memory cache",
    "partial": "Krul, `--krul-policy lossless`",
    "predictive": "**Krul, by default**",
}
LINKS = {
    "balanced": "over a link as slow as computing",
    "unthrottled": "over memory",
}

Row = Mapping[str, Any]


class Headline:
    """What the file says of one history."""

    def __init__(self, restore: Mapping[str, Any], history: int) -> None:
        """history: tokens. Raises ValueError where a row is missing."""
        self._restore, self.history = restore, history
        rows = (row for row in restore["rows"] if "error" not in row)
        self._rows = [row for row in rows if row["history"] == history]
        wanted = {(way, link) for way in WAYS for link in LINKS if way != "recompute"}
        found = {(row["policy"], row["bandwidth_name"]) for row in self._rows}
        if not (wanted <= found and any(row["policy"] == "recompute" for row in self._rows)):
            raise ValueError(f"{history} tokens were not measured for all of {', '.join(WAYS)}")

    def row(self, way: str, link: str) -> Row:
        """A cell; computing anew needs no link."""
        return next(
            row
            for row in self._rows
            if row["policy"] == way and (way == "recompute" or row["bandwidth_name"] == link)
        )

    @property
    def machine(self) -> str:
        """Model, number format and hardware, in one line."""
        machine, settings = self._restore["machine"], self._restore["settings"]
        cpu = machine["cpu"].replace("(R)", "")
        device = machine["gpu"] or f"{machine['cores']} cores of an {cpu}, no GPU"
        return f"{settings['model']}, {settings['dtype']}, {device}"

    @property
    def repeats(self) -> int:
        """Samples of a cell, the fewest."""
        return min(self.row(way, link)["repeats"] for way in WAYS for link in LINKS)


def markdown(found: Headline) -> str:
    """The table, and what it was measured on."""
    rate = found.row("predictive", "balanced")["bandwidth"] / 1e6
    lines = [
        f"| {found.history:,} tokens of history | kept | " + " | ".join(LINKS.values()) + " |",
        "|---|---|---|---|",
    ]
    for way, name in WAYS.items():
        stored = found.row(way, "unthrottled")["stored_bytes"]
        kept = f"{stored / 1e6:.1f} MB" if stored else "-"
        times = [_seconds(found.row(way, link)) for link in LINKS]
        if way == "predictive":
            kept, times = f"**{kept}**", [f"**{text}**" for text in times]
        lines.append(f"| {name} | {kept} | " + " | ".join(times) + " |")
    return "\n".join([*lines, "", _fill(_measured(found, rate))]) + "\n"


def _measured(found: Headline, rate: float) -> str:
    return (
        f"Seconds to the first token of the next turn, median (least - most) of {found.repeats}, "
        f"on live servers; the slow link carries {rate:.1f} MB/s, raw KV just as fast as it is "
        f"computed. {found.machine} ([how it was measured](docs/restore.md))."
    )


def _fill(paragraph: str) -> str:
    return textwrap.fill(paragraph, 116, break_long_words=False, break_on_hyphens=False)


def _seconds(row: Row) -> str:
    return f"{row['ttft_p50']:.1f} s ({row['ttft_min']:.1f} - {row['ttft_max']:.1f})"


def draw(found: Headline, path: Path) -> None:
    """Bars of what is kept and of the seconds over both links."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = {**WAYS, "hicache_host": "HiCache", "partial": "Krul, lossless", "predictive": "Krul"}
    shades = {"predictive": "#14785a", "partial": "#7dbfa8"}
    colours = [shades.get(way, "#a3abb5") for way in WAYS]
    figure = Figure(figsize=(10, 2.5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3, sharey=True)
    stored = [found.row(way, "unthrottled")["stored_bytes"] / 1e6 for way in WAYS]
    shown = [("MB kept", stored, "{:.0f}")]
    for link, text in (("balanced", "slow link"), ("unthrottled", "memory")):
        seconds = [found.row(way, link)["ttft_p50"] for way in WAYS]
        shown.append((f"seconds to the first token, {text}", seconds, "{:.1f}"))
    for panel, (title, values, form) in zip(panels, shown, strict=True):
        places = range(len(values))
        panel.barh(places, values, 0.62, color=colours)
        for place, value in zip(places, values, strict=True):
            label = form.format(value) if value else "nothing"
            panel.annotate(label, (value, place), (4, 0), textcoords="offset points", va="center")
        panel.set_title(title, fontsize=10, loc="left")
        panel.set_xlim(0, max(values) * 1.18)
        panel.set_xticks([])
        panel.spines[["top", "right", "bottom"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(WAYS)), [names[way] for way in WAYS])
    panels[0].invert_yaxis()
    figure.suptitle(
        f"A conversation of {found.history:,} tokens returns ({found.machine})", fontsize=11
    )
    figure.savefig(path, format="png", dpi=160, metadata={"Software": None})


def fill(page: Path, text: str) -> None:
    """Put ``text`` between the page's markers. Raises ValueError when it has none."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page}: no generated markers")
    page.write_text(f"{before}{BEGIN}\n{text}{END}{after}")


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--restore", type=Path, default=ROOT / "docs/restore.json")
    parser.add_argument("--history", type=int, default=HISTORY, help="tokens")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--png", type=Path, help="draw the picture here")
    options = parser.parse_args()
    try:
        found = Headline(json.loads(options.restore.read_text()), options.history)
        fill(options.readme, markdown(found))
        if options.png is not None:
            draw(found, options.png)
    except (OSError, ValueError, KeyError) as error:
        line = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
        print(f"error: {line}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
