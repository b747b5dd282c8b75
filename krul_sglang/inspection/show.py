"""Tables of what a server says of its conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 132
"""Columns where the output is no terminal: tables are not cut to fit one then."""
SHADES = " .:-=+*#%@"
"""Correlations from 0 (and below) to 1."""

Row = Mapping[str, Any]


def console() -> Console:
    """Where tables go: as wide as the terminal, or :data:`WIDTH` in a file or pipe."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=WIDTH)


def conversations(out: Console, body: Row) -> None:
    """The list, newest first."""
    shown = body["conversations"]
    table = table_of(*_COLUMNS)
    for one in shown:
        table.add_row(*_cells(one))
    out.print(table)
    out.print(f"{len(shown)} of {body['total']} conversations, the newest first.")


def conversation(out: Console, body: Row) -> None:
    """One conversation and its segments."""
    table = table_of(*_COLUMNS)
    table.add_row(*_cells(body))
    out.print(table)
    if body["lost_tokens"]:
        out.print(f"{body['lost_tokens']} tokens are lost; they are computed when they are needed.")
    if not body["segments"]:
        out.print("Nothing of it is stored.")
        return
    names = ("start", "tokens", "state", "codec", "step", "bytes", "raw", "ratio")
    table = table_of(*names, title="Segments", left=("state", "codec"))
    for one in body["segments"]:
        table.add_row(
            str(one["start"]),
            str(one["tokens"]),
            one["state"],
            one["codec"] or "-",
            _number(one["step"]),
            bytes_text(one["stored_bytes"]),
            bytes_text(one["raw_bytes"]),
            ratio_text(one["ratio"]),
        )
    out.print(table)


def layers(out: Console, body: Row) -> None:
    """Layer by layer, and how alike they attend."""
    sealed = [one for one in body["segments"] if one["state"] == "sealed"]
    if not sealed:
        return
    factors = body["class_factors"]
    classes = [f"x{factor:.2g}" for factor in factors]
    names = ("layer", "reference", "step", "dropped", "error", "bytes", "ratio")
    table = table_of(*names, *classes, title="Layers", left=("reference",))
    for one in body["layers"]:
        shares = one["classes"] or [None] * len(factors)
        table.add_row(
            str(one["layer"]),
            ", ".join(map(str, one["references"])) or "-",
            _number(one["step"]),
            _share(one["dropped"]) if 0 < one["dropped"] < 1 else "yes" if one["dropped"] else "no",
            _number(one["error"]),
            ("~" if one["in_shared_frame"] else "") + bytes_text(one["stored_bytes"]),
            ratio_text(one["ratio"]),
            *(_share(share) for share in shares),
        )
    out.print(table)
    out.print(f"Headers: {bytes_text(body['header_bytes'])}.")
    if any(one["in_shared_frame"] for one in body["layers"]):
        out.print("bytes: ~ a share of frames that several layers fill.")
    if factors:
        out.print(
            f"x{factors[0]:.2g} to x{factors[-1]:.2g}: shares of the {body['classed_tokens']} "
            "quantized tokens by their step against the segment's; step: its geometric mean."
        )
        out.print("error: a quantized token's squared error in the importance metric.")
    similarity(out, body["similarity"])


def similarity(out: Console, found: Row | None) -> None:
    """The matrix as shaded characters, or one line where nothing was measured."""
    if found is None:
        out.print("Similarity of layers: attention was not measured for what is stored.")
        return
    values, numbers = found["matrix"], found["layers"]
    if found["measure"] == "correlation":
        what = "correlation of attention levels (0 ' ' to 1 '@')"
        scaled = values
    else:
        most = max((value for row in values for value in row), default=0) or 1
        what = f"distance between attention maps ('@' 0 to ' ' {most:.3g})"
        scaled = [[1 - value / most for value in row] for row in values]
    out.print(f"Similarity of layers over {found['tokens']} tokens: {what}")
    for number, row in zip(numbers, scaled, strict=True):
        out.print(Text(f"{number:>5}  " + "".join(2 * _shade(value) for value in row)))


def _shade(value: float | None) -> str:
    if value is None:
        return "?"
    return SHADES[min(len(SHADES) - 1, int(max(0.0, value) * len(SHADES)))]


_COLUMNS = (
    "id", "tokens", "on device", "stored", "exact", "lossy", "segments", "bytes", "raw", "ratio",
    "codec", "age",
)  # fmt: skip


def _cells(one: Row) -> list[str]:
    segments = one["segments"]
    waiting = f" ({one['waiting_tokens']} waiting)" if one["waiting_tokens"] else ""
    return [
        one["id"],
        str(one["tokens"]),
        str(one["device_tokens"]),
        f"{one['stored_tokens']}{waiting}",
        str(one["exact_tokens"]),
        str(one["lossy_tokens"]),
        str(len(segments) if isinstance(segments, list) else segments),
        bytes_text(one["stored_bytes"]),
        bytes_text(one["raw_bytes"]),
        ratio_text(one["ratio"]),
        ", ".join(one["codecs"]) or "-",
        age_text(one["age_seconds"]),
    ]


def table_of(*names: str, title: str | None = None, left: Sequence[str] = ("id", "codec")) -> Table:
    """An empty table of these columns; those in ``left`` are flush left."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    return table


def bytes_text(count: int) -> str:
    """``2.17 MB``."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def ratio_text(ratio: float | None) -> str:
    """``23.1x``, or a dash where there is none."""
    return "-" if ratio is None else f"{ratio:.1f}x"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def age_text(seconds: float) -> str:
    """``24 s``, ``50 min``, ``3.5 h``, ``12 d``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.0f} d"
