"""The last restore as lanes: what was loaded and decoded while the forward pass computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from krul_sglang.inspection.trace import computing
from web.marks import bytes_text, figure, seconds_text, waiting

TITLE = "The last restore"
Span = Sequence[float]


def lanes_panel(trace: Mapping[str, Any] | None) -> str:
    """Lanes of one trace of /krul/restores, coloured by layer, with the bubbles in seconds."""
    if trace is None:
        empty = waiting("Shown when a stored conversation has come back.")
        return figure(TITLE, empty, name="lanes")
    end, layers = trace["makespan_seconds"], len(trace["waits"])
    loads = trace["loads"]
    lanes = []
    for name, label in (("fetch", "link"), ("decode", "decode")):
        spans = [
            (layer, span)
            for load in loads
            for layer, own in enumerate(load[name])
            for span in own
            if span[1] > 0
        ]
        if spans:
            busy = sum(b - a for _, (a, b) in spans)
            lanes.append(_lane(label, _blocks(spans, end, layers), busy))
    steps = [(max(0, n - 1), span) for n, span in enumerate(computing(trace))]
    waits = [(n, span) for n, span in enumerate(trace["waits"]) if span[1] > span[0]]
    lanes.append(
        _lane(
            "compute",
            _blocks(steps, end, layers) + _blocks(waits, end, layers, "k-wait", "waits for layer"),
            sum(b - a for _, (a, b) in steps),
        )
    )
    axis = "".join(
        f'<span style="left:{25 * k}%">{seconds_text(end * k / 4)}</span>' for k in range(5)
    )
    bubbles = trace["bubble_seconds"]
    said = (
        f"{trace['tokens']:,} tokens restored from {bytes_text(trace['stored_bytes'])}, "
        f"{trace['recomputed_tokens'] + trace['new_tokens']:,} computed, in {seconds_text(end)}"
    )
    body = (
        f'<div class="k-lanes" role="img" aria-label="{said}">{"".join(lanes)}'
        f'<div class="k-axis">{axis}</div></div>'
    )
    caption = (
        f"{said}. Bubbles: loading idle {100 * bubbles['load'] / end:.0f} %, computing idle "
        f"{100 * bubbles['compute'] / end:.0f} % "
        '<i class="k-swatch k-wait"></i> waiting for a layer.'
    )
    return figure(TITLE, body, caption, name="lanes")


def _lane(name: str, blocks: str, busy: float) -> str:
    return (
        f'<div class="k-lane"><span>{name}</span><div class="k-track" '
        f'title="{name}: busy {seconds_text(busy)}">{blocks}</div></div>'
    )


def _blocks(
    spans: Iterable[tuple[int, Span]],
    end: float,
    layers: int,
    kind: str = "",
    what: str = "layer",
) -> str:
    """A block a span, cut to the restore's own time; its hue is that of its layer."""
    out = []
    for layer, (a, b) in spans:
        a, b = max(0.0, a), min(b, end)
        if b <= a:
            continue
        hue = round(190 + 130 * layer / max(1, layers - 1))
        out.append(
            f'<i class="{kind}" style="left:{100 * a / end:.2f}%;width:{100 * (b - a) / end:.2f}%;'
            f'--hue:{hue}" title="{what} {layer}: {1000 * (b - a):.1f} ms"></i>'
        )
    return "".join(out)
