"""One picture of a conversation: its layers' token classes, bytes and errors, their similarity."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

Row = Mapping[str, Any]
_EMPTY = {"ha": "center", "va": "center", "color": "0.4"}


def require_matplotlib() -> None:
    """Raise ValueError with the fix where pictures cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--png needs matplotlib: pip install matplotlib")


def draw(body: Row, path: Path) -> None:
    """Write the picture of a conversation's detail (see :mod:`.detail`) as PNG.

    Raises OSError where ``path`` cannot be written, ValueError where nothing is stored.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not any(one["state"] == "sealed" for one in body["segments"]):
        raise ValueError(f"nothing of conversation {body['id']} is stored yet: no picture")
    count = len(body["layers"])
    figure = Figure(figsize=(15, 2.6 + 0.16 * max(count, 24)), layout="constrained")
    FigureCanvasAgg(figure)
    classes, amounts, alike = figure.subplots(1, 3, width_ratios=(1, 1.25, 1.5))
    ratio = f", {body['ratio']:.1f} times smaller than raw" if body["ratio"] else ""
    figure.suptitle(
        f"Conversation {body['id']}: {body['tokens']} tokens, {body['stored_tokens']} stored in "
        f"{body['stored_bytes'] / 1e6:.3g} MB{ratio}"
    )
    _draw_classes(figure, classes, body)
    _draw_amounts(amounts, body)
    _draw_similarity(figure, alike, body["similarity"])
    figure.savefig(path, format="png", dpi=100)


def _draw_classes(figure: Any, axes: Any, body: Row) -> None:
    factors, rows = body["class_factors"], [one["classes"] for one in body["layers"]]
    axes.set_title("Tokens by quantization step")
    if not factors or None in rows:
        axes.text(0.5, 0.5, "no token is quantized", transform=axes.transAxes, **_EMPTY)
        axes.set_axis_off()
        return
    shown = axes.imshow(100 * np.array(rows), aspect="auto", vmin=0, cmap="viridis")
    axes.set_xticks(range(len(factors)), [f"{factor:.2g}" for factor in factors])
    axes.set_xlabel("token's step / segment's step")
    axes.set_ylabel("layer")
    figure.colorbar(shown, ax=axes, label="share of quantized tokens (%)")


def _draw_amounts(axes: Any, body: Row) -> None:
    layers = body["layers"]
    numbers = [one["layer"] for one in layers]
    kilobytes = [one["stored_bytes"] / 1e3 for one in layers]
    axes.barh(numbers, kilobytes, color="tab:blue", alpha=0.55, height=0.8)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_title("Bytes")
    axes.set_ylabel("layer")
    shared = any(one["in_shared_frame"] for one in layers)
    axes.set_xlabel(f"stored (kB{', shares of common frames' if shared else ''})", color="tab:blue")
    for one in layers:
        if one["dropped"]:
            axes.text(0, one["layer"], f" {100 * one['dropped']:.0f} % dropped", va="center")
    errors = np.array([one["error"] for one in layers], dtype=float)
    if np.isfinite(errors).all():
        power = int(np.floor(np.log10(max(errors.max(), 1e-30))))
        axes.set_title("Bytes, and error left by quantization")
        above = axes.twiny()
        above.plot(errors / 10.0**power, numbers, "o-", color="tab:red", markersize=3, linewidth=1)
        above.set_xlim(left=0)
        above.set_xlabel(f"squared error a token (1e{power}, importance metric)", color="tab:red")


def _draw_similarity(figure: Any, axes: Any, found: Row | None) -> None:
    axes.set_title("Similarity of layers")
    if found is None:
        text = "attention was not measured\nfor what is stored"
        axes.text(0.5, 0.5, text, transform=axes.transAxes, **_EMPTY)
        axes.set_axis_off()
        return
    values = np.array(found["matrix"], dtype=float)
    if found["measure"] == "correlation":
        scale: dict[str, Any] = {"vmax": 1, "cmap": "magma"}
        label = "correlation of attention levels"
    else:
        scale, label = {"vmin": 0, "cmap": "magma_r"}, "distance between attention maps"
    shown = axes.imshow(values, **scale)
    every = max(1, len(values) // 10)
    ticks = range(0, len(values), every)
    names = [str(found["layers"][place]) for place in ticks]
    axes.set_xticks(ticks, names)
    axes.set_yticks(ticks, names)
    axes.set_xlabel(f"layer (measured over {found['tokens']} tokens)")
    axes.set_ylabel("layer")
    figure.colorbar(shown, ax=axes, label=label, shrink=0.75)
