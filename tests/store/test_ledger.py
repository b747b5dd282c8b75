"""One ledger: bytes by kind, never negative, with the peak it reached."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krul_sglang.store.ledger import KINDS, Ledger


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 1000)), max_size=30))
def test_it_is_a_sum(entries) -> None:
    ledger, peak = Ledger(limit=500), 0
    for kind, nbytes in entries:
        ledger.add(kind, nbytes)
        peak = max(peak, ledger.used)
    counted = {kind: sum(n for k, n in entries if k == kind) for kind in KINDS}
    assert ledger.snapshot() == {**counted, "limit": 500, "peak": peak}
    for kind, nbytes in entries:
        ledger.add(kind, -nbytes)
    assert ledger.used == 0
    assert ledger.snapshot()["peak"] == peak


def test_a_move_is_one_step() -> None:
    """Raw rows and payload are never counted together, nor are both missing."""
    ledger = Ledger(limit=10**6)
    ledger.add("staging", 1000)
    ledger.move("staging", "tier", 1000, 400)
    held = ledger.snapshot()
    assert (held["staging"], held["tier"], held["peak"]) == (0, 400, 1000)


def test_releasing_what_is_not_held_is_a_bug() -> None:
    ledger = Ledger(limit=10)
    ledger.add("tier", 5)
    with pytest.raises(AssertionError, match="tier went below zero"):
        ledger.add("tier", -6)
    with pytest.raises(AssertionError, match="staging went below zero"):
        ledger.move("staging", "tier", 1, 1)
    with pytest.raises(KeyError):
        ledger.add("disk", 1)


def test_threads_do_not_lose_bytes() -> None:
    ledger = Ledger(limit=10**9)

    def work(seed: int) -> None:
        for i in range(400):
            ledger.add("staging", seed + i)
            ledger.move("staging", "tier", seed + i, seed)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(1, 9)))
    assert ledger.snapshot()["staging"] == 0
    assert ledger.used == 400 * sum(range(1, 9))
