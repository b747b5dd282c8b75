"""What restores would take on hardware that is not here, and what a split by layer would gain.

    python benchmarks/simulate_restore.py --docs docs/simulation.md --png docs/simulation.png

Nothing is run: the planner that the server uses is given costs that follow from the assumptions
below (MODELS, ACCELERATORS, LINKS, FORMS) instead of measured ones. For each regime: seconds to
compute a history anew with its new turn, to load it whole, and to load its first p tokens while
the rest is computed (what Krul does); and the least that any split by layer could take, in which
deep layers load more (the Krul paper's pyramid).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot
from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).parent))

from restore_report import fill

from krul_sglang.restore.planner import Planner, Turn
from krul_sglang.restore.simulate import Accelerator, Form, Link, Model, Regime, pyramid

MODELS = (
    Model("Llama-7B", 32, 4096, heads=32, kv_heads=32, head_dim=128, mlp=11008),
    Model("Llama-3-8B", 32, 4096, heads=32, kv_heads=8, head_dim=128, mlp=14336),
    Model("Llama-3-70B on 4", 80, 8192, heads=64, kv_heads=8, head_dim=128, mlp=28672, ranks=4),
)
ACCELERATORS = (
    Accelerator("A100", flops=312e12, memory=2.0e12),
    Accelerator("H100", flops=989e12, memory=3.35e12),
)
LINKS = (
    Link("25 GbE", 2.9e9, shared=True),
    Link("NVMe", 6.5e9, shared=True),
    Link("100 GbE", 11.5e9, shared=True),
    Link("PCIe 4 x16", 25e9, shared=False),
    Link("PCIe 5 x16", 50e9, shared=False),
)
RAW, PREDICTIVE = Form("raw"), Form("predictive", ratio=11.0)
HISTORIES = "8192,32768,131072"
RATES = np.geomspace(0.5e9, 64e9, 15)
"""Bytes a second of the links that are drawn."""


@dataclass(frozen=True)
class Row:
    """Seconds, and the share of the history that the planner loads."""

    model: str
    accelerator: str
    link: str
    history: int
    form: str
    recompute: float
    load_all: float
    one_p: float
    share: float
    chunked: float
    """As one_p, when passes are chunks of which only the first overlaps with loading."""
    by_layer: float

    @property
    def gain(self) -> float:
        """What a split by layer would save of one p's time."""
        return max(0.0, 1 - self.by_layer / self.one_p)


def simulate(regime: Regime, form: Form, history: int, new: int, chunk: int) -> Row:
    """One regime."""
    planner, turn = regime.planner(form), regime.turn(form, history, new)
    recompute, load_all = planner.ends(turn, np.array([0, history]))[0].tolist()
    plan = planner.plan(turn)
    return Row(
        model=regime.model.name,
        accelerator=regime.accelerator.name,
        link=regime.link.name,
        history=history,
        form=form.name,
        recompute=recompute,
        load_all=load_all,
        one_p=plan.seconds,
        share=plan.load / history,
        chunked=regime.planner(form, chunk).plan(turn).seconds,
        by_layer=least(planner, turn),
    )


def least(planner: Planner, turn: Turn) -> float:
    """Seconds of the best split by layer: never more than of one p, which is such a split too."""
    return min(pyramid(planner, turn).seconds, planner.plan(turn).seconds)


def _time(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds >= 0.995 else f"{1e3 * seconds:.0f} ms"


def table(rows: Sequence[Row], history: int) -> str:
    """Markdown: a line a regime, raw beside predictive."""
    forms = (RAW.name, PREDICTIVE.name)
    lines = [
        f"**{history:,} tokens** (seconds where no unit is given; in brackets the share loaded)",
        "",
        "| model | accelerator | link | computed anew | "
        + " | ".join(f"{f}: all loaded | {f}: one p | {f}: by layer" for f in forms)
        + " |",
        "|---" * (4 + 3 * len(forms)) + "|",
    ]
    found = {(r.model, r.accelerator, r.link, r.form): r for r in rows if r.history == history}
    for key in dict.fromkeys(key[:3] for key in found):
        own = [found[(*key, form)] for form in forms]
        cells = [*key, _time(own[0].recompute)]
        for row in own:
            cells += [
                _time(row.load_all),
                f"{_time(row.one_p)} ({row.share:.0%})",
                f"-{row.gain:.1%}" if row.gain >= 0.0005 else "0",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def summary(rows: Sequence[Row], chunk: int) -> str:
    """What the rows say, in sentences."""
    said = []
    for form in (RAW.name, PREDICTIVE.name):
        own = [row for row in rows if row.form == form]
        most = max(own, key=lambda row: row.gain)
        mixed = [row for row in own if 0 < row.share < 1]
        said.append(
            f"{form.capitalize()}: in {len(mixed)} of {len(own)} regimes a part is computed. A "
            f"split by layer would save {np.median([r.gain for r in own]):.1%} of the time in "
            f"the median, at most {most.gain:.1%} ({most.model}, {most.accelerator}, {most.link}, "
            f"{most.history:,} tokens)."
        )
    token_bytes = {model.name: model.token_bytes for model in MODELS}
    rates = [
        row.history * row.share * token_bytes[row.model] / row.one_p / 1e9
        for row in rows
        if row.form == PREDICTIVE.name
    ]
    said.append(
        f"For that, predictive would have to be decoded at {np.median(rates):.0f} GB of raw KV a "
        f"second in the median, {max(rates):.0f} at most."
    )
    worst = max(rows, key=lambda row: row.chunked / row.one_p)
    slower = sum(row.chunked > 1.01 * row.one_p for row in rows)
    said.append(
        f"Passes of at most {chunk:,} tokens, of which only the first overlaps with loading, "
        f"cost more than 1 % in {slower} of {len(rows)} regimes, at most "
        f"{worst.chunked / worst.one_p - 1:.0%}."
    )
    return "\n".join(said) + "\n\n"


def plot(histories: Sequence[int], new: int, path: Path, progress: Progress) -> None:
    """Above: seconds against the link. Below: what a split by layer would gain."""
    figure, axes = pyplot.subplots(
        2, len(histories), figsize=(4.2 * len(histories) + 1, 7.2), squeeze=False,
        layout="constrained", sharex=True, sharey="row",
    )  # fmt: skip
    task = progress.add_task("drawing", total=len(histories) * len(MODELS) * len(RATES))
    drawn = MODELS[1], ACCELERATORS[1]
    for column, history in enumerate(histories):
        top, bottom = axes[0][column], axes[1][column]
        for index, model in enumerate(MODELS):
            gains: dict[str, list[float]] = {RAW.name: [], PREDICTIVE.name: []}
            times: dict[str, list[float]] = {}
            for rate in RATES:
                for form in (RAW, PREDICTIVE):
                    regime = Regime(model, ACCELERATORS[1], Link("", rate, shared=True))
                    row = simulate(regime, form, history, new, history + new)
                    gains[form.name].append(100 * row.gain)
                    if model is drawn[0]:
                        for name in ("recompute", "load_all", "one_p", "by_layer"):
                            times.setdefault(f"{form.name} {name}", []).append(getattr(row, name))
                progress.advance(task)
            for form, dashes in ((RAW, "-"), (PREDICTIVE, "--")):
                bottom.plot(
                    RATES / 1e9, gains[form.name], dashes, color=f"C{index}",
                    label=f"{model.name}, {form.name}",
                )  # fmt: skip
            if times:
                _draw_times(top, times)
        top.set_title(f"{history:,} tokens", fontsize=10)
        top.set_yscale("log")
        bottom.set_xscale("log")
        bottom.set_xlabel("GB/s of the link, all ranks")
        for panel in (top, bottom):
            panel.grid(alpha=0.3)
    axes[0][0].set_ylabel(f"seconds, {drawn[0].name} on {drawn[1].name}")
    axes[1][0].set_ylabel(f"% that a split by layer would save, {drawn[1].name}")
    axes[1][0].set_ylim(bottom=0)
    axes[0][-1].legend(fontsize=7)
    axes[1][0].legend(fontsize=7)
    figure.suptitle("Simulated; nothing was run on such hardware", fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_times(panel: Any, times: dict[str, list[float]]) -> None:
    lines = (
        ("raw recompute", "computed anew", "black", ":"),
        ("raw load_all", "raw, all loaded", "tab:blue", ":"),
        ("raw one_p", "raw, one p", "tab:blue", "-"),
        ("raw by_layer", "raw, by layer", "tab:cyan", "--"),
        ("predictive one_p", "predictive, one p", "tab:green", "-"),
    )
    for name, label, colour, dashes in lines:
        panel.plot(RATES / 1e9, times[name], dashes, color=colour, label=label)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--histories", default=HISTORIES, help=f"tokens; default {HISTORIES}")
    parser.add_argument("--new", type=int, default=256, help="tokens of the new turn; default 256")
    parser.add_argument(
        "--chunk", type=int, default=8192, help="most tokens of a pass; default 8192"
    )
    parser.add_argument("--docs", type=Path, help="page whose generated part is replaced")
    parser.add_argument("--json", type=Path, help="where all rows are written")
    parser.add_argument("--png", type=Path, help="a plot over the link's rate")
    options = parser.parse_args(arguments)
    try:
        histories = [int(text) for text in options.histories.split(",")]
        if min(histories) < 1:
            raise ValueError
    except ValueError:
        parser.error(f"--histories {options.histories}: expected numbers of tokens")
    for name in ("new", "chunk"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: expected at least 1")
    rows: list[Row] = []
    cases = [(m, a, k, h, f) for h in histories for m in MODELS for a in ACCELERATORS
             for k in LINKS for f in (RAW, PREDICTIVE)]  # fmt: skip
    try:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            for model, chip, link, history, form in progress.track(cases, description="regimes"):
                regime = Regime(model, chip, link)
                rows.append(simulate(regime, form, history, options.new, options.chunk))
            if options.png:
                plot(histories, options.new, options.png, progress)
        text = summary(rows, options.chunk) + "\n".join(table(rows, n) for n in histories)
        if options.json:
            options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        if options.docs:
            fill(options.docs, text)
        else:
            print(text)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
