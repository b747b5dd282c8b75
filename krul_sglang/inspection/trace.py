"""``krul trace``: what a server's last restores did and when, as a table or as two lanes."""

from __future__ import annotations

import json as json_format
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Trace = Mapping[str, Any]
Span = Sequence[float]
"""Begin and end, seconds since the restore began."""


def run(url: str, *, limit: int, json: bool, png: Path | None, api_key: str | None) -> None:
    """Raises OSError and ValueError, each with a line for the user."""
    from krul_sglang.inspection.command import Server

    if png is not None:
        from krul_sglang.inspection.picture import require_matplotlib

        require_matplotlib()
    body = Server(url, api_key).get(f"/krul/restores?limit={limit}", "restores")
    if not body["restores"]:
        raise ValueError("the server has restored nothing yet")
    if png is not None:
        draw(body["restores"][0], png)
    if json:
        print(json_format.dumps(body))
    else:
        _show(body["restores"])


def _show(traces: Sequence[Trace]) -> None:
    from rich.table import Table

    from krul_sglang.inspection.show import console

    names = ("age s", "restored", "computed anew", "new", "MB", "s", "expected s")
    table = Table(*names, "load", "idle", "compute", "idle", box=None, header_style="bold")
    for column in table.columns:
        column.justify = "right"
    for one in traces:
        bubbles, expected = one["bubble_seconds"], one["predicted_seconds"]
        seconds = one["makespan_seconds"]
        row = (
            f"{one['age_seconds']:.0f}",
            f"{one['tokens']}",
            f"{one['recomputed_tokens']}",
            f"{one['new_tokens']}",
            f"{one['stored_bytes'] / 1e6:.2f}",
            f"{seconds:.3f}" + (" failed" if one["failed"] else ""),
            "" if expected is None else f"{expected:.3f}",
            f"{seconds - bubbles['load']:.3f}",
            f"{100 * bubbles['load'] / seconds:.0f} %",
            f"{seconds - bubbles['compute']:.3f}",
            f"{100 * bubbles['compute'] / seconds:.0f} %",
        )
        table.add_row(*row)
    console().print(table)


def computing(one: Trace) -> list[Span]:
    """When the forward pass computed, layer by layer: from where it could go on to where it
    came to the next layer. What precedes the first layer counts as one."""
    begin, end = one["forward"]
    arrivals = [span[0] for span in one["waits"]] + [end]
    return [
        (at, until)
        for at, until in zip([begin, *(span[1] for span in one["waits"])], arrivals, strict=True)
        if until > at
    ]


def draw(one: Trace, path: Path) -> None:
    """Write a trace's lanes as PNG. Raises OSError where ``path`` cannot be written."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    layers = len(one["loads"][0]["decode"])
    shades = colormaps["viridis"]
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    fetch = [span for layer in _layers_of(one, "fetch") for span in layer]
    lanes = ["compute", "decode", *(["link"] if fetch else [])]
    height = 0.8

    def bar(lane: str, span: Span, color: Any) -> None:
        axes.barh(lanes.index(lane), span[1] - span[0], height, span[0], color=color, linewidth=0)

    for name, lane in (("fetch", "link"), ("decode", "decode")):
        for layer, spans in enumerate(_layers_of(one, name)):
            for span in spans:
                bar(lane, span, shades(layer / max(1, layers - 1)))
    for step, span in enumerate(computing(one)):
        bar("compute", span, shades(max(0, step - 1) / max(1, layers - 1)))
    for span in one["waits"]:
        if span[1] - span[0] > 0:
            bar("compute", span, "tab:red")
    end, bubbles = one["makespan_seconds"], one["bubble_seconds"]
    axes.set_yticks(range(len(lanes)), lanes)
    axes.set_ylim(-0.6, len(lanes) - 0.4)
    axes.set_xlim(0, end)
    axes.set_xlabel("seconds since the restore began (red: the forward pass waits for a layer)")
    idle = {name: f"{100 * bubbles[name] / end:.0f} %" for name in ("load", "compute")}
    axes.set_title(
        f"{one['tokens']} tokens restored from {one['stored_bytes'] / 1e6:.2f} MB, "
        f"{one['recomputed_tokens']} computed anew, {one['new_tokens']} new: {end:.3f} s; "
        f"idle: loading {idle['load']}, computing {idle['compute']}"
    )
    scale = ScalarMappable(Normalize(0, layers - 1), shades)
    figure.colorbar(scale, ax=axes, label="layer", pad=0.01)
    figure.savefig(path, format="png", dpi=100)


def _layers_of(one: Trace, lane: str) -> list[list[Span]]:
    """Spans of all loads by layer."""
    lanes = [load[lane] for load in one["loads"]]
    return [[span for spans in layer for span in spans] for layer in zip(*lanes, strict=True)]
