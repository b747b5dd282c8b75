"""Slot ids: whatever a tree does to a node's ids, they still say which stored tokens they are."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from krul_sglang.store.slots import MAX_SEGMENT_TOKENS, SlotRun, slot_ids, slot_runs

SEGMENT = st.integers(1, 2**38)
RUNS = st.lists(
    st.tuples(SEGMENT, st.integers(1, 60), st.integers(0, 59), st.integers(0, 60)), max_size=8
)


def expand(runs: list[SlotRun]) -> list[tuple[int, int]]:
    return [(run.segment, offset) for run in runs for offset in range(run.lo, run.hi)]


@given(RUNS)
def test_runs_invert_any_concatenation_of_slices(parts) -> None:
    pieces, tokens = [torch.empty(0, dtype=torch.int64)], []
    for segment, length, lo, hi in parts:
        pieces.append(slot_ids(segment, length)[lo:hi])
        tokens += [(segment, offset) for offset in range(lo, min(hi, length))]
    runs = slot_runs(torch.cat(pieces))
    assert expand(runs) == tokens
    assert all(run.tokens == run.hi - run.lo > 0 for run in runs)
    for a, b in itertools.pairwise(runs):
        assert (a.segment, a.hi) != (b.segment, b.lo), "two runs that are one"


@given(SEGMENT, st.integers(1, 200), st.data())
def test_a_split_loses_and_invents_nothing(segment: int, tokens: int, data) -> None:
    ids = slot_ids(segment, tokens)
    cut = data.draw(st.integers(0, tokens))
    assert expand(slot_runs(ids[:cut])) + expand(slot_runs(ids[cut:])) == expand(slot_runs(ids))
    assert slot_runs(torch.cat([ids[:cut], ids[cut:]])) == [SlotRun(segment, 0, tokens)]


def test_neighbouring_segments_do_not_run_together() -> None:
    """The last id of a full segment is followed, as a number, by the next one's first."""
    last = slot_ids(7, MAX_SEGMENT_TOKENS)[-1:]
    first = slot_ids(8, 1)
    assert int(first) == int(last) + 1
    assert slot_runs(torch.cat([last, first])) == [
        SlotRun(7, MAX_SEGMENT_TOKENS - 1, MAX_SEGMENT_TOKENS),
        SlotRun(8, 0, 1),
    ]


def test_ids_of_different_segments_differ() -> None:
    ids = torch.cat([slot_ids(segment, 50) for segment in range(1, 40)])
    assert ids.dtype is torch.int64
    assert ids.unique().numel() == ids.numel()


def test_no_ids_are_no_runs() -> None:
    assert slot_runs(torch.empty(0, dtype=torch.int64)) == []


@pytest.mark.parametrize("tokens", [0, -1, MAX_SEGMENT_TOKENS + 1])
def test_lengths_a_segment_cannot_have(tokens: int) -> None:
    with pytest.raises(ValueError, match=f"not {tokens}"):
        slot_ids(1, tokens)
