"""What the turns of a conversation cost: sources of their tokens, times to first token, bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from web.marks import bar, bytes_text, escape, figure, legend, seconds_text, waiting
from web.sessions import Conversation, Standing
from web.turns import Turn

SOURCES = (
    ("device", "on device"),
    ("restored", "restored"),
    ("recomputed", "recomputed"),
    ("new", "new"),
)


def turn_panel(
    conversation: Conversation, held: Standing, krul: Mapping[str, Any], detail: Mapping[str, Any]
) -> str:
    """The last turn in large figures, the ones before it as bars.

    detail: the conversation as /krul/conversations/ID tells, empty while nothing is stored.
    """
    turns = conversation.turns
    if not turns:
        return figure("This turn", waiting("Ask something: it shows here what the answer cost."))
    last = turns[-1]
    parts = [
        _figures(last),
        _sources(last),
        _times(last),
        _storage(held),
        verdict(held, krul, detail),
        _history(turns),
    ]
    return figure("This turn", "".join(parts), name="turn")


def _figures(turn: Turn) -> str:
    cells = "".join(
        f'<div class="k-figure"><dt><i class="k-{name}"></i>{text}</dt>'
        f'<dd data-count="{name}">{getattr(turn, name):,}</dd></div>'
        for name, text in SOURCES
    )
    return f'<dl class="k-figures">{cells}</dl>'


def _sources(turn: Turn) -> str:
    said = ", ".join(f"{getattr(turn, name)} {text}" for name, text in SOURCES)
    parts = [(f"k-{n}", getattr(turn, n), f"{getattr(turn, n):,} {t}") for n, t in SOURCES]
    return bar(parts, turn.prompt, f"{turn.prompt} prompt tokens: {said}", "k-tall")


def _times(turn: Turn) -> str:
    longest = max(turn.ttft or 0, turn.recompute_ttft or 0)
    shown = "waiting" if turn.ttft is None else seconds_text(turn.ttft)
    rows = [_time_row("this turn", "k-restored", turn.ttft, longest, shown, "ttft")]
    if turn.recompute_ttft is not None:
        text = seconds_text(turn.recompute_ttft)
        rows.append(
            _time_row("recomputed", "k-recomputed", turn.recompute_ttft, longest, text, "recompute")
        )
    elif turn.measuring:
        rows.append(_time_row("recomputed", "k-recomputed", None, 0, "measuring", "recompute"))
    else:
        missing = "not measured" if turn.restored else "not needed"
        rows.append(_time_row("recomputed", "k-recomputed", None, 0, missing, "recompute"))
    gain = (
        f"{turn.speedup:.1f} times sooner than the same prompt computed anew; both measured"
        if turn.speedup
        else "What the same prompt takes computed anew is measured when something was restored"
    )
    head = "<h3>Time to first token</h3>"
    return f'<div class="k-times">{head}{"".join(rows)}<p class="k-note">{gain}</p></div>'


def _time_row(
    name: str, kind: str, seconds: float | None, longest: float, text: str, mark: str
) -> str:
    width = 100 * seconds / longest if seconds and longest else 0
    return (
        f'<div class="k-time"><span>{name}</span><div class="k-track">'
        f'<i class="{kind}" style="width:{width:.1f}%"></i></div>'
        f'<b data-time="{mark}">{text}</b></div>'
    )


def _storage(held: Standing) -> str:
    if not held.stored_bytes:
        text = "encoding" if held.waiting else "nothing yet"
        return f'<p class="k-line"><span>stored</span><b>{text}</b></p>'
    share = bar(
        [("k-restored", held.stored_bytes, f"{bytes_text(held.stored_bytes)} stored")],
        held.raw_bytes,
        f"{bytes_text(held.stored_bytes)} stored of {bytes_text(held.raw_bytes)} raw",
    )
    return (
        f'<p class="k-line"><span>stored</span><b>{bytes_text(held.stored_bytes)} of '
        f"{bytes_text(held.raw_bytes)} raw, {held.ratio or 0:.1f} times smaller</b></p>{share}"
    )


def verdict(held: Standing, krul: Mapping[str, Any], detail: Mapping[str, Any]) -> str:
    """What the quality guard decided for the segments that are stored."""
    if not detail or not any(one["state"] == "sealed" for one in detail["segments"]):
        return '<p class="k-line"><span>guard</span><b>nothing to judge yet</b></p>'
    quality = krul.get("quality") or {}
    budget, step = quality.get("budget"), quality.get("step")
    lossy = [one for one in detail["segments"] if one["step"] is not None]
    tokens = sum(one["tokens"] for one in detail["segments"])
    exact = sum(one["tokens"] for one in detail["segments"] if one["codec"] == "lossless")
    said = []
    if lossy and budget:
        finest = min(one["step"] for one in lossy)
        said.append(
            f"predictive, within {budget:g} nats at the budget's step"
            if step is None or finest > 0.999 * step
            else f"predictive, within {budget:g} nats at {step / finest:.1f} times finer steps"
        )
    elif lossy:
        said.append("lossy")
    if exact:
        said.append(f"{100 * exact / tokens:.0f} % of the tokens exact")
    if not said:
        said.append(", ".join(held_codecs(detail)) + ": not guarded")
    fallbacks = krul.get("fallbacks", 0)
    said.append(f"{fallbacks} lossless fallbacks on this server" if fallbacks else "no fallback")
    return f'<p class="k-line"><span>guard</span><b>{escape("; ".join(said))}</b></p>'


def held_codecs(detail: Mapping[str, Any]) -> list[str]:
    """Names of the codecs that wrote a conversation's segments."""
    return sorted({one["codec"] for one in detail["segments"] if one["codec"]})


def _history(turns: list[Turn]) -> str:
    longest = max(turn.prompt for turn in turns)
    rows = "".join(_history_row(number, turn, longest) for number, turn in enumerate(turns, 1))
    return f'<div class="k-turns" role="list" aria-label="All turns">{rows}</div>' + legend(
        [(f"k-{name}", text) for name, text in SOURCES]
    )


def _history_row(number: int, turn: Turn, longest: int) -> str:
    parts = [(f"k-{n}", getattr(turn, n), f"{getattr(turn, n):,} {t}") for n, t in SOURCES]
    text = "" if turn.ttft is None else seconds_text(turn.ttft)
    said = ", ".join(f"{getattr(turn, name)} {label}" for name, label in SOURCES)
    return (
        f'<div class="k-turn" role="listitem"><span>{number}</span>'
        + bar(parts, longest, f"Turn {number}: {said}; first token after {text}")
        + f"<b>{text}</b></div>"
    )
