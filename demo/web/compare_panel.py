"""The policies side by side: bars where a number is longer or shorter than another."""

from __future__ import annotations

from collections.abc import Sequence

from web.compare import POLICIES, Outcome
from web.marks import bytes_text, escape, seconds_text

ABOUT = {
    "recompute": "plain SGLang: what was evicted is computed again",
    "lossless": "bit-exact, compressed",
    "fixed": "fixed pairs of layers merged, as in MiniCache",
    "paper": "pairs chosen by attention, as in the Krul paper",
    "predictive": "each layer predicted from the one below; the default",
}
AT_REST = ("", "done", "waiting", "failed", "stopped", "not run")
COLUMNS = ("policy", "first token", "restored", "computed", "stored", "same answer")


def compare_panel(outcomes: Sequence[Outcome], problem: str = "") -> str:
    """A table with a row a policy; policies that were not asked for are shown empty."""
    found = {one.policy: one for one in outcomes}
    shown = [found.get(name, Outcome(name, state="")) for name in POLICIES]
    slowest = max((one.ttft for one in shown if one.ttft), default=0.0)
    largest = max((one.stored_bytes for one in shown), default=0)
    head = "".join(f'<th scope="col">{name}</th>' for name in COLUMNS)
    rows = "".join(_row(one, slowest, largest) for one in shown)
    note = f'<p class="k-notice k-bad" role="alert"><span>{escape(problem)}</span></p>'
    return (
        f'<div class="k-compare">{note if problem else ""}<table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _row(one: Outcome, slowest: float, largest: int) -> str:
    kind = "k-recomputed" if one.policy == POLICIES[0] else "k-restored"
    known = one.ttft is not None
    ttft = None if one.ttft is None else seconds_text(one.ttft)
    first = _cell("first token", ttft, one.ttft, slowest, kind)
    ratio = f" ({one.raw_bytes / one.stored_bytes:.1f}x)" if one.stored_bytes else ""
    stored = _cell(
        "stored",
        bytes_text(one.stored_bytes) + ratio if one.stored_bytes else ("none" if known else None),
        one.stored_bytes,
        largest,
        "k-memory",
    )
    same = _cell(
        "same answer",
        None if one.same is None else f"{100 * one.same:.0f} %",
        one.same,
        1.0,
        "k-same",
    )
    state = one.error or (ABOUT[one.policy] if one.state in ("", "done") else one.state)
    bad = " k-failed" if one.state == "failed" else ""
    busy = "" if one.state in AT_REST else " k-working"
    return (
        f'<tr data-policy="{one.policy}" data-state="{escape(one.state.split(",")[0])}">'
        f'<th scope="row"><b>{one.policy}</b><span class="k-state{bad}{busy}">{escape(state)}'
        f"</span></th>{first}"
        f'<td data-name="restored">{f"{one.restored:,}" if known else "-"}</td>'
        f'<td data-name="computed">{f"{one.computed:,}" if known else "-"}</td>{stored}{same}</tr>'
    )


def _cell(name: str, text: str | None, value: float | None, most: float, kind: str) -> str:
    width = 100 * value / most if value and most else 0
    return (
        f'<td data-name="{name}"><b>{text or "-"}</b><div class="k-track">'
        f'<i class="{kind}" style="width:{width:.1f}%"></i></div></td>'
    )
