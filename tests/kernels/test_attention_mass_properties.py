"""What holds of attention mass whatever is asked; needs hypothesis, unlike the rest here."""

from __future__ import annotations

import pytest
import torch
from krul_kernels.attention_mass import kv_indptr, window_attention_mass
from mass_cases import make_case

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    lengths=st.lists(st.integers(0, 40), max_size=4),
    page_size=st.sampled_from([1, 4, 16]),
    group=st.sampled_from([1, 3, 4, 8]),
)
def test_no_weight_is_lost(data, lengths, page_size, group):
    """A request's mass is its rows' weights, once for each query head of the group."""
    rows = [data.draw(st.lists(st.integers(-1, 45), max_size=4)) for _ in lengths]
    case = make_case(lengths, rows, heads=(2 * group, 2), dim=16, page_size=page_size)
    mass, lse = window_attention_mass(**case)
    indptr = kv_indptr(case["paged_kv_indptr"], case["paged_kv_last_page_len"], page_size)
    assert indptr.diff().tolist() == lengths
    sees = torch.isfinite(lse).all(1)
    for request, part in enumerate(mass.split(lengths)):
        mine = slice(*case["qo_indptr"][request : request + 2].tolist())
        wanted = group * float(case["weights"][mine][sees[mine]].sum())
        assert part.sum(0).tolist() == pytest.approx([wanted] * 2, abs=1e-4)
