"""Bubbles and totals of a trace, counted by hand."""

from __future__ import annotations

import json

import pytest

from krul_sglang.restore.trace import LoadTrace, RestoreTrace, covered


def trace() -> RestoreTrace:
    """Two layers: fetched 0-1 and 1-3, decoded 1-1.5 and 3-4; the pass computes 0.5-1, waits
    until 1.5, computes to 3, waits until 4 and ends at 6."""
    load = LoadTrace(2)
    load.began = 10.0
    load.fetched(0, 10.0, 11.0, 100, "disk")
    load.fetched(1, 11.0, 13.0, 200, "disk")
    load.decoded(0, 11.0, 11.5, "a")
    load.decoded(1, 13.0, 14.0, "b")
    waits = [(11.0, 11.5), (13.0, 14.0)]
    return RestoreTrace(10.0, (10.5, 16.0), waits, [load], 40, 3, 7, 300, predicted=5.5)


def test_bubbles() -> None:
    own = trace()
    assert own.makespan == 6.0
    assert own.wait_seconds == 1.5
    assert own.bubbles == pytest.approx({"load": 2.0, "compute": 2.0})
    load = own.loads[0]
    assert (load.bytes, load.fetch_seconds, load.decode_seconds) == (300, 3, 1.5)
    assert load.ended - load.began == 4
    assert load.codec_seconds == {"a": 0.5, "b": 1.0}


def test_loading_after_the_pass_has_ended_fills_no_bubble() -> None:
    own = trace()
    own.loads[0].decoded(1, 15.0, 19.0, "b")
    assert own.bubbles["load"] == pytest.approx(1.0)


def test_json_is_in_seconds_since_the_beginning() -> None:
    own = json.loads(json.dumps(trace().to_json()))
    assert own["forward"] == [0.5, 6.0]
    assert own["waits"] == [[1.0, 1.5], [3.0, 4.0]]
    assert own["loads"][0]["fetch"] == [[[0.0, 1.0]], [[1.0, 3.0]]]
    assert own["bubble_seconds"] == {"load": 2.0, "compute": 2.0}
    assert own["predicted_seconds"] == 5.5


def test_covered_counts_overlaps_once() -> None:
    assert covered([]) == 0
    assert covered([(3, 4), (0, 2), (1, 2.5), (1, 1.5)]) == 3.5
