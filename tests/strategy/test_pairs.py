"""Layer pairs: disjoint, ascending, deterministic, and what a brute force would choose."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from krul_sglang.similarity.layers import similarity_of_maps
from krul_sglang.strategy.fixed import fixed_pairs
from krul_sglang.strategy.paper import select_pairs as select

Pairs = tuple[tuple[int, int], ...]


def select_pairs(attention: torch.Tensor, count: int, threshold: float = 0.7) -> Pairs:
    return select(similarity_of_maps(attention), count, threshold)


def edge_mass(attention: torch.Tensor, edge: float = 0.1) -> torch.Tensor:
    return similarity_of_maps(attention, edge).edges


@st.composite
def attentions(draw: st.DrawFn) -> torch.Tensor:
    """Probabilities ``[layers, heads, queries, keys]``; some layers repeat, so ties occur."""
    layers = draw(st.integers(1, 9))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 25)))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    distinct = torch.randn(layers, *shape, generator=gen).mul(2).softmax(-1)
    return distinct[draw(st.lists(st.integers(0, layers - 1), min_size=1, max_size=9))]


def brute_force(attention: torch.Tensor, count: int, threshold: float) -> Pairs:
    """The selection one scalar at a time: repeatedly the nearest two layers still free."""
    a = attention.double().tolist()
    heads, queries, keys = attention.shape[1:]
    edges = {
        key for key in range(keys) if key < math.ceil(keys / 10) or key >= keys - -(-keys // 10)
    }

    def mass(layer: int) -> float:
        rows = [row for head in a[layer] for row in head]
        return sum(row[key] for row in rows for key in edges) / len(rows)

    def distance(i: int, j: int) -> float:
        squares = [
            sum((a[i][h][q][k] - a[j][h][q][k]) ** 2 for q in range(queries) for k in range(keys))
            for h in range(heads)
        ]
        return sum(map(math.sqrt, squares)) / heads

    free = [layer for layer in range(len(a)) if mass(layer) >= threshold]
    pairs = []
    while len(pairs) < count and len(free) > 1:
        i, j = min(itertools.combinations(free, 2), key=lambda p: (round(distance(*p), 12), p))
        pairs.append((i, j))
        free.remove(i)
        free.remove(j)
    return tuple(sorted(pairs))


@settings(max_examples=80, deadline=None)
@given(attentions(), st.integers(0, 5), st.sampled_from([0.0, 0.3, 0.5, 0.9]))
def test_it_is_what_a_brute_force_chooses(
    attention: torch.Tensor, count: int, threshold: float
) -> None:
    assert select_pairs(attention, count, threshold) == brute_force(attention, count, threshold)


@settings(max_examples=80, deadline=None)
@given(attentions(), st.integers(0, 5), st.floats(0, 1))
def test_pairs_are_disjoint_ascending_eligible_and_nested(
    attention: torch.Tensor, count: int, threshold: float
) -> None:
    pairs = select_pairs(attention, count, threshold)
    assert pairs == select_pairs(attention.clone(), count, threshold)
    assert pairs == tuple(sorted(pairs))
    assert all(lower < upper for lower, upper in pairs)
    layers = [layer for pair in pairs for layer in pair]
    assert len(set(layers)) == len(layers)
    eligible = {i for i, mass in enumerate(edge_mass(attention).tolist()) if mass >= threshold}
    assert set(layers) <= eligible
    assert len(pairs) == min(count, len(eligible) // 2)
    assert set(pairs) <= set(select_pairs(attention, count + 1, threshold))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 200))
def test_fixed_pairs_are_neighbours_of_the_deep_half(layers: int) -> None:
    pairs = fixed_pairs(layers)
    flat = [layer for pair in pairs for layer in pair]
    assert flat == list(range(layers // 2, layers // 2 + len(flat)))
    assert all(lower + 1 == upper for lower, upper in pairs)
    assert layers - 1 <= layers // 2 + len(flat) <= layers or not flat


def test_fixed_pairs_of_a_known_model() -> None:
    assert fixed_pairs(30) == ((15, 16), (17, 18), (19, 20), (21, 22), (23, 24), (25, 26), (27, 28))
    assert fixed_pairs(4) == ((2, 3),)
    assert fixed_pairs(1) == fixed_pairs(2) == ()


def uniform_but(layers: int, keys: int = 100) -> torch.Tensor:
    """Layers that attend to the first key alone."""
    attention = torch.zeros(layers, 2, 3, keys)
    attention[..., 0] = 1
    return attention


def test_input_dependent_layers_are_left_out_however_alike() -> None:
    attention = uniform_but(6)
    attention[2:4] = 0
    attention[2:4, ..., 50] = 1  # two layers that are equal, in the middle of the text
    attention[5, 0, 0, 0], attention[5, 0, 0, 99] = 0.5, 0.5
    assert edge_mass(attention).tolist() == [1, 1, 0, 0, 1, 1]
    assert select_pairs(attention, 3) == ((0, 1), (4, 5))
    assert select_pairs(attention, 1) == ((0, 1),)
    assert select_pairs(attention, 3, threshold=0.0) == ((0, 1), (2, 3), (4, 5))
    assert select_pairs(attention, 0) == ()


def test_both_edges_count_and_overlapping_edges_count_once() -> None:
    attention = torch.full((1, 1, 1, 50), 1 / 50)
    assert float(edge_mass(attention)) == pytest.approx(0.2)
    assert float(edge_mass(attention, edge=0.5)) == pytest.approx(1)
    assert float(edge_mass(torch.ones(1, 1, 1, 1))) == 1
    assert float(edge_mass(torch.full((1, 1, 1, 3), 1 / 3), edge=0.9)) == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_any_float_dtype(dtype: torch.dtype) -> None:
    attention = uniform_but(4).to(dtype)
    attention[1, ..., 1], attention[1, ..., 0] = 0.25, 0.75
    assert select_pairs(attention, 2) == ((0, 2), (1, 3))


def test_rows_of_another_shape_are_refused() -> None:
    for shape in ((2, 3, 4), (2, 3, 0, 5), (0, 1, 1, 1)):
        with pytest.raises(ValueError, match="attention of shape"):
            select_pairs(torch.zeros(shape), 1)
