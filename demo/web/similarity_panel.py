"""How alike the layers of a conversation attend, as measured while it was generated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from web.marks import figure, waiting

TITLE = "How alike layers attend"


def similarity_panel(detail: Mapping[str, Any]) -> str:
    """The matrix of /krul/conversations/ID, light for different and dark for alike."""
    found = detail.get("similarity") if detail else None
    if not found:
        why = (
            "Attention was not measured for what is stored of it."
            if detail and detail["stored_tokens"]
            else "Shown once something of this conversation is stored."
        )
        return figure(TITLE, waiting(why), name="similarity")
    names, shades = found["layers"], _shades(found)
    word = "correlation" if found["measure"] == "correlation" else "distance"
    every = max(1, len(names) // 8)
    cells = []
    for i, row in enumerate(found["matrix"]):
        label = names[i] if i % every == 0 else ""
        cells.append(f"<span>{label}</span>")
        for j, value in enumerate(row):
            shade = shades[i][j]
            if shade is None:
                cells.append('<i class="k-none"></i>')
            else:
                title = f"Layers {names[i]} and {names[j]}: {word} {value:.2f}"
                cells.append(f'<i style="--v:{shade:.2f}" title="{title}"></i>')
    cells.append("<span></span>")
    cells += [f"<span>{name if i % every == 0 else ''}</span>" for i, name in enumerate(names)]
    body = (
        f'<div class="k-matrix" role="img" aria-label="{word} of the attention of '
        f'{len(names)} layers" style="--n:{len(names)}">{"".join(cells)}</div>'
    )
    low, high = ("0", "1") if word == "correlation" else ("far", "alike")
    caption = (
        f"{word.capitalize()} over {found['tokens']:,} tokens of this conversation: "
        f'{low} <i class="k-scale"></i> {high}'
    )
    return figure(TITLE, body, caption, name="similarity")


def _shades(found: Mapping[str, Any]) -> list[list[float | None]]:
    """0 (different) to 1 (alike)."""
    matrix = found["matrix"]
    if found["measure"] == "correlation":
        return [[None if v is None else max(0.0, v) for v in row] for row in matrix]
    most = max((v for row in matrix for v in row if v is not None), default=0) or 1
    return [[None if v is None else 1 - v / most for v in row] for row in matrix]
