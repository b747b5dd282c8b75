"""What of a history is not stored: the boundary follows what restores have loaded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krul_sglang.restore.boundary import LEAST, MARGIN, RECENT, Boundary
from krul_sglang.restore.planner import block


def seen(shares, history: int = 10_000) -> Boundary:
    boundary = Boundary()
    for share in shares:
        boundary.observe(round(share * history), history, history)
    return boundary


def test_too_few_restores_move_nothing() -> None:
    assert seen([0.1] * (LEAST - 1)).of(4096) == 4096
    assert seen([0.1] * LEAST).of(4096) < 4096


def test_alike_restores_put_it_a_block_behind_what_they_load() -> None:
    assert seen([0.25] * LEAST).of(4096) == 1024 + block(4096)


def test_the_more_restores_differ_the_further_back_it_lies() -> None:
    spread = [seen([0.3 - d, 0.3 + d] * LEAST).share for d in (0.0, 0.05, 0.1, 0.2)]
    assert spread == sorted(spread)
    assert spread[0] == pytest.approx(0.3)
    assert spread[-1] > 0.5


@given(st.lists(st.floats(0, 1), min_size=LEAST, max_size=RECENT), st.integers(0, 1 << 17))
def test_it_lies_at_or_behind_the_mean_and_within_the_history(shares, history) -> None:
    boundary = seen(shares)
    mean = sum(round(s * 10_000) for s in shares) / len(shares) / 10_000
    assert min(history, int(mean * history)) <= boundary.of(history) <= history
    step = max(MARGIN, block(history))
    assert boundary.of(history) == history or boundary.of(history) % step == 0


def test_a_history_cut_short_that_is_loaded_whole_counts_as_all() -> None:
    """Else a boundary, once set, would confirm itself for ever."""
    boundary = seen([0.25] * RECENT)
    end = boundary.of(4096)
    for _ in range(RECENT):
        boundary.observe(1024, end, 4096)
    assert boundary.of(4096) == end, "as long as the last block is left alone it stays"
    for _ in range(3):
        boundary.observe(end, end, 4096)
    assert boundary.of(4096) > 2048
    for _ in range(RECENT):
        boundary.observe(end, end, 4096)
    assert boundary.of(4096) == 4096


def test_a_history_of_nothing_teaches_nothing() -> None:
    boundary = Boundary()
    boundary.observe(0, 0, 0)
    assert boundary.of(64) == 64
