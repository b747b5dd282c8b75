"""Packing of small alphabets: nothing is lost, at any size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from krul_sglang.codec.symbols import ALPHABETS, EDGES, bin_bounds, pack, saturated, unpack


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(set(ALPHABETS), key=lambda a: a.largest)),
    st.lists(st.integers(-70000, 70000) | st.integers(-3, 3), max_size=80),
)
def test_symbols_come_back(alphabet, values) -> None:
    symbols = np.array([v for v in values if abs(v) <= 65535], np.int32)
    packed, over = pack(symbols, alphabet)
    assert len(packed) == alphabet.packed(len(symbols))
    back = unpack(packed, len(symbols), alphabet).astype(np.int32)
    edge = saturated(back.astype(np.uint8), alphabet)
    back -= alphabet.largest
    back[edge] += np.sign(back[edge]) * over
    assert np.array_equal(back, symbols)


def test_too_far_is_refused() -> None:
    with pytest.raises(ValueError, match="too far"):
        pack(np.array([70000], np.int32), ALPHABETS[0])


def test_bins_cover_what_is_above_the_first_edge() -> None:
    sigma = np.sort(np.random.default_rng(0).exponential(2.0, 300))[::-1]
    bounds = bin_bounds(sigma, 1.0)
    assert bounds[0] == (sigma >= EDGES[0]).sum()
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] == 0
