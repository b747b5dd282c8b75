"""How every layer of a conversation is stored: reference, step, dropped, token classes, bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from web.marks import bytes_text, figure, waiting

Layer = Mapping[str, Any]
TITLE = "Strategy, layer by layer"


def strategy_panel(detail: Mapping[str, Any]) -> str:
    """A heat map: a column a layer, a row a figure. detail as /krul/conversations/ID."""
    if not detail or not any(one["state"] == "sealed" for one in detail["segments"]):
        empty = waiting("Nothing of this conversation is encoded yet. Create memory pressure.")
        return figure(TITLE, empty, name="strategy")
    layers, factors = detail["layers"], detail["class_factors"]
    rows = [_arcs(layers), _numbers(layers)]
    steps = [one["step"] for one in layers]
    if any(step is not None for step in steps):
        rows.append(_row("step", layers, _shade(steps), lambda one: f"step {one['step']:.3g}"))
    if any(one["dropped"] for one in layers):
        shares = [one["dropped"] for one in layers]
        rows.append(
            _row("dropped", layers, shares, lambda one: f"{100 * one['dropped']:.0f} % dropped")
        )
    rows += [_class_row(layers, place, factor) for place, factor in enumerate(factors)]
    sizes = [one["stored_bytes"] for one in layers]
    rows.append(
        _row(
            "bytes",
            layers,
            [size / max(1, *sizes) for size in sizes],
            lambda one: f"{bytes_text(one['stored_bytes'])}, {one['ratio'] or 0:.1f} times smaller",
        )
    )
    codecs = ", ".join(detail["codecs"])
    caption = (
        f"{codecs}: {bytes_text(detail['stored_bytes'])} for {detail['stored_tokens']:,} tokens. "
        + _caption(layers, bool(factors))
    )
    body = (
        f'<div class="k-heat" role="img" aria-label="Strategy of {len(layers)} layers" '
        f'style="--n:{len(layers)}">{"".join(rows)}</div>'
    )
    return figure(TITLE, body, caption, name="strategy")


def _class_row(layers: Sequence[Layer], place: int, factor: float) -> str:
    """Which layers have most tokens of one class."""
    shares = [one["classes"][place] if one["classes"] else None for one in layers]
    most = max((share for share in shares if share), default=1)

    def title(one: Layer) -> str:
        share = 100 * one["classes"][place]
        return f"{share:.0f} % of the tokens at {factor:.2g} times the segment's step"

    shades = [None if share is None else share / most for share in shares]
    return _row(f"step x{factor:.2g}", layers, shades, title)


def _caption(layers: Sequence[Layer], classes: bool) -> str:
    if classes:
        return (
            "Arcs: predicted from which layer. Stronger: more; fine steps go to the tokens "
            "that this conversation looked at."
        )
    if any(one["references"] for one in layers):
        return "Arcs: layers that share one direction of their K and V."
    return "Every layer stands alone."


def _shade(values: Sequence[float | None]) -> list[float | None]:
    """Between the smallest and the largest, never quite empty; one value is all alike."""
    known = [value for value in values if value is not None]
    low, high = min(known), max(known)
    if high - low < 1e-9 * high:
        return [None if value is None else 0.6 for value in values]
    return [None if v is None else 0.15 + 0.85 * (v - low) / (high - low) for v in values]


def _row(
    name: str,
    layers: Sequence[Layer],
    shades: Sequence[float | None],
    title: Callable[[Layer], str],
) -> str:
    cells = "".join(
        f'<i style="--v:{shade:.2f}" title="Layer {one["layer"]}: {title(one)}"></i>'
        if shade is not None
        else f'<i class="k-none" title="Layer {one["layer"]}: none"></i>'
        for one, shade in zip(layers, shades, strict=True)
    )
    return f'<div class="k-heat-row"><span>{name}</span>{cells}</div>'


def _numbers(layers: Sequence[Layer]) -> str:
    every = 5
    cells = "".join(
        f"<em>{one['layer'] if one['layer'] % every == 0 else ''}</em>" for one in layers
    )
    return f'<div class="k-heat-row k-heat-names"><span>layer</span>{cells}</div>'


def _arcs(layers: Sequence[Layer]) -> str:
    """From each layer to what it is predicted from, or shares with."""
    count, lines = len(layers), []
    for one in layers:
        for reference in one["references"]:
            a, b = sorted((reference + 0.5, one["layer"] + 0.5))
            top = max(0.5, 9 - 2.2 * (b - a))
            lines.append(
                f'<path d="M{a:.1f} 10 C{a:.1f} {top:.1f} {b:.1f} {top:.1f} {b:.1f} 10">'
                f"<title>Layer {one['layer']} from layer {reference}</title></path>"
            )
    return (
        '<div class="k-heat-row k-heat-arcs"><span>reference</span>'
        f'<svg viewBox="0 0 {count} 10" preserveAspectRatio="none" aria-hidden="true">'
        f"{''.join(lines)}</svg></div>"
    )
