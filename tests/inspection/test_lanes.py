"""The lanes of a trace as a picture shows them."""

from __future__ import annotations

import pytest

from krul_sglang.inspection.trace import computing, draw

ONE = {
    "tokens": 40, "recomputed_tokens": 3, "new_tokens": 7, "stored_bytes": 300, "failed": False,
    "makespan_seconds": 6.0, "predicted_seconds": 5.5, "wait_seconds": 1.5,
    "bubble_seconds": {"load": 2.0, "compute": 2.0},
    "forward": [0.5, 6.0], "waits": [[1.0, 1.5], [3.0, 4.0]],
    "loads": [
        {"fetch": [[[0.0, 1.0]], [[1.0, 3.0]]], "decode": [[[1.0, 1.5]], [[3.0, 4.0]]]},
        {"fetch": [[], []], "decode": [[[0.1, 0.2]], [[0.3, 0.4], [0.5, 0.6]]]},
    ],
}  # fmt: skip


def test_what_is_not_waiting_is_computing() -> None:
    spans = computing(ONE)
    assert spans == [(0.5, 1.0), (1.5, 3.0), (4.0, 6.0)]
    seconds = sum(end - begin for begin, end in spans)
    assert seconds == ONE["makespan_seconds"] - ONE["bubble_seconds"]["compute"]


def test_a_picture_is_drawn(tmp_path) -> None:
    draw(ONE, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OSError, match="No such file"):
        draw(ONE, tmp_path / "missing" / "a.png")
