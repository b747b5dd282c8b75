"""Small pieces of HTML that the panels are made of. Text that is not ours is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["bar", "bytes_text", "chip", "escape", "figure", "legend", "seconds_text", "waiting"]


def bytes_text(count: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def seconds_text(seconds: float) -> str:
    """``0.34 s``, ``12.1 s``."""
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"


def bar(parts: Iterable[tuple[str, float, str]], total: float, label: str, size: str = "") -> str:
    """A stacked bar: ``(class, amount, title)`` of each part, of ``total`` in all."""
    spans = "".join(
        f'<i class="{kind}" style="width:{100 * amount / total:.2f}%" title="{escape(title)}"></i>'
        for kind, amount, title in parts
        if amount > 0 and total > 0
    )
    return f'<div class="k-bar {size}" role="img" aria-label="{escape(label)}">{spans}</div>'


def chip(kind: str, text: str) -> str:
    """A state in a word or two."""
    return f'<span class="k-chip k-chip-{kind}">{escape(text)}</span>'


def legend(items: Sequence[tuple[str, str]]) -> str:
    """What the colours of a bar mean: ``(class, text)``."""
    shown = "".join(f'<li><i class="{kind}"></i>{escape(text)}</li>' for kind, text in items)
    return f'<ul class="k-legend">{shown}</ul>'


def figure(title: str, body: str, caption: str = "", name: str = "") -> str:
    """A panel: a heading, its picture, one line about what it shows."""
    tail = f'<p class="k-caption">{caption}</p>' if caption else ""
    return (
        f'<section class="k-panel" data-panel="{escape(name)}"><h2>{escape(title)}</h2>'
        f'<div class="k-body">{body}</div>{tail}</section>'
    )


def waiting(text: str) -> str:
    """What stands in a panel that has nothing to show yet."""
    return f'<p class="k-empty">{escape(text)}</p>'
