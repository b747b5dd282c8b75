"""The conversations side by side, and who holds the pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from web.marks import bar, bytes_text, chip, escape
from web.observer import Sight
from web.sessions import STATES, Conversation, Session, Standing

CHIPS = {"running": "answering", "waiting": "encoding"}


def list_panel(session: Session, held: Mapping[str, Standing]) -> str:
    """A button a conversation, with its state."""
    cards = "".join(
        _card(one, held[key], key == session.active) for key, one in session.conversations.items()
    )
    return f'<nav class="k-list" aria-label="Conversations">{cards}</nav>'


def _card(one: Conversation, held: Standing, active: bool) -> str:
    state = "running" if one.running else "waiting" if held.waiting else held.state
    text = CHIPS.get(state) or STATES[held.state]
    parts = [
        ("k-device", held.device, f"{held.device:,} tokens on the device"),
        ("k-restored", max(0, held.tokens - held.device), "the rest is stored only"),
    ]
    where = (
        bar(parts, held.tokens, f"{held.device} of {held.tokens} tokens on the device", "k-thin")
        if held.tokens
        else bar([], 1, "no tokens yet", "k-thin")
    )
    tokens = f"{held.tokens:,} tokens" if held.tokens else "no tokens yet"
    stored = f", {bytes_text(held.stored_bytes)} stored" if held.stored_bytes else ""
    current = ' aria-current="true"' if active else ""
    return (
        f'<button type="button" class="k-card" data-key="{one.key}" data-state="{state}"{current} '
        f'style="--own:var(--hue-{one.hue})"><span class="k-card-head"><i class="k-dot"></i>'
        f"<strong>{escape(one.title)}</strong>{chip(state, text)}</span>{where}"
        f'<span class="k-card-foot">{tokens}{stored}</span></button>'
    )


def pool_panel(session: Session, held: Mapping[str, Standing], sight: Sight) -> str:
    """The device's KV pool and the store, both as bars: whose tokens are where."""
    pool = sight.facts.pool if sight.facts else 0
    own = [(session.conversations[key], one) for key, one in held.items()]
    total = sum(line["device_tokens"] for line in sight.lines)
    mine = sum(one.device for _, one in own)
    others = max(0, min(total, pool) - mine)
    parts = [(f"k-hue-{c.hue}", one.device, f"{c.title}: {one.device:,} tokens") for c, one in own]
    parts.append(("k-others", others, f"other visitors: {others:,} tokens"))
    used = mine + others
    device = _shelf(
        "KV pool on the device",
        f"{used:,} of {pool:,} tokens",
        bar(parts, max(pool, used), f"{used} of {pool} tokens of the pool are used", "k-tall"),
    )
    krul = sight.krul
    stored = int(krul.get("stored_bytes", 0))
    raw = int(krul.get("raw_bytes", 0))
    shares = [(f"k-hue-{c.hue}", one.stored_bytes, f"{c.title}: {bytes_text(one.stored_bytes)}")
              for c, one in own]  # fmt: skip
    kept = sum(one.stored_bytes for _, one in own)
    shares.append(("k-others", max(0, stored - kept), "other visitors"))
    ratio = f", {raw / stored:.1f} times smaller than raw" if stored else ""
    store = _shelf(
        "Krul's store",
        f"{bytes_text(stored)}{ratio}",
        bar(shares, max(raw, 1), f"{bytes_text(stored)} stored of {bytes_text(raw)} raw", "k-tall"),
    )
    return f'<div class="k-shelves">{device}{store}</div>'


def _shelf(name: str, text: str, drawn: str) -> str:
    return f'<div class="k-shelf"><p><span>{name}</span><b>{text}</b></p>{drawn}</div>'


def suggestions(texts: Sequence[str]) -> str:
    """Questions to click."""
    shown = "".join(f'<button type="button">{escape(text)}</button>' for text in texts)
    return f'<div class="k-suggest" role="group" aria-label="Suggested questions">{shown}</div>'


def document_note(one: Conversation) -> str:
    """The document that the conversation's first message carries."""
    if not one.document:
        return ""
    words = len(one.document.split())
    return (
        f"<details class='k-document'><summary>With its first message it carries a document of "
        f"{words} words</summary><pre>{escape(one.document)}</pre></details>"
    )
