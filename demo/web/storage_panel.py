"""Bytes of every tier over time."""

from __future__ import annotations

from collections.abc import Sequence

from web.marks import bytes_text, figure, legend, waiting
from web.observer import Sample

TITLE = "Storage over time"
WIDTH, HEIGHT = 600, 160
KINDS = ("staging", "memory", "disk", "remote")
POINTS = 120


def storage_panel(history: Sequence[Sample]) -> str:
    """Tiers stacked, and a dashed line for what the sealed part would take raw."""
    samples = thinned(history)
    if len(samples) < 2:
        return figure(TITLE, waiting("Watching the server."), name="storage")
    stacks = [levels(one) for one in samples]
    kinds = [kind for kind in KINDS if any(stack.get(kind) for stack in stacks)] or ["memory"]
    most = max(
        1, *(max(sum(stack.values()), one.raw) for stack, one in zip(stacks, samples, strict=True))
    )
    begin, end = samples[0].at, samples[-1].at
    xs = [WIDTH * (one.at - begin) / max(1e-9, end - begin) for one in samples]
    floor = [0.0] * len(samples)
    areas = []
    for kind in kinds:
        top = [low + stack.get(kind, 0) for low, stack in zip(floor, stacks, strict=True)]
        areas.append(f'<path class="k-area k-{kind}" d="{_area(xs, floor, top, most)}"/>')
        floor = top
    raw = " ".join(
        f"{'M' if n == 0 else 'L'}{x:.1f} {_y(one.raw, most):.1f}"
        for n, (x, one) in enumerate(zip(xs, samples, strict=True))
    )
    now = stacks[-1]
    held = sum(now.values())
    minutes = (end - begin) / 60
    body = (
        f'<div class="k-chart" role="img" aria-label="{bytes_text(held)} held now, '
        f'{bytes_text(samples[-1].raw)} raw"><svg viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'preserveAspectRatio="none" aria-hidden="true">{"".join(areas)}'
        f'<path class="k-rawline" d="{raw}"/></svg>'
        f'<span class="k-top">{bytes_text(most)}</span></div>'
        f'<div class="k-axis k-axis-plain"><span style="left:0">{_ago(minutes)}</span>'
        f'<span style="left:100%">now</span></div>'
    )
    names = [(f"k-{kind}", f"{kind} {bytes_text(now.get(kind, 0))}") for kind in kinds]
    names.append(("k-rawkey", f"raw, if it were not encoded {bytes_text(samples[-1].raw)}"))
    return figure(TITLE, body, legend(names), name="storage")


def levels(sample: Sample) -> dict[str, int]:
    """Bytes by kind: raw rows that wait to be encoded, then the tiers."""
    return {"staging": sample.staging, **sample.tiers}


def thinned(history: Sequence[Sample]) -> list[Sample]:
    """At most about :data:`POINTS` samples, the last one among them."""
    found = list(history)
    every = max(1, len(found) // POINTS)
    return found[::-1][::every][::-1]


def _ago(minutes: float) -> str:
    return f"{minutes:.0f} min ago" if minutes >= 1.5 else f"{60 * minutes:.0f} s ago"


def _y(value: float, most: float) -> float:
    return HEIGHT - (HEIGHT - 8) * value / most


def _area(xs: Sequence[float], low: Sequence[float], top: Sequence[float], most: float) -> str:
    up = [f"{x:.1f} {_y(y, most):.1f}" for x, y in zip(xs, top, strict=True)]
    down = [f"{x:.1f} {_y(y, most):.1f}" for x, y in zip(reversed(xs), reversed(low), strict=True)]
    return "M" + " L".join([*up, *down]) + " Z"
