"""Simulated hardware: costs worked out by hand, and splits by layer against all there are."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations_with_replacement

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from krul_sglang.restore.cost import ComputeCost, LoadCost, Prefill, Rate
from krul_sglang.restore.planner import Planner, StoredRun, Turn
from krul_sglang.restore.simulate import Accelerator, Form, Link, Model, Regime, pyramid

TINY = Model("tiny", layers=2, hidden=8, heads=4, kv_heads=2, head_dim=2, mlp=16)
CHIP = Accelerator("chip", flops=1e6, memory=1e4, linear=0.5, attention=0.25)
LINK = Link("link", 1000.0, shared=False)


def test_a_model_by_hand() -> None:
    # A layer: 8 x 8 for the queries and the output, 8 x 4 for keys and values, 3 x 8 x 16.
    assert TINY.weights == 2 * (2 * 64 + 2 * 32 + 384)
    assert TINY.token_bytes == 2 * 2 * 2 * 2 * 2
    llama = Model("8B", layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, mlp=14336)
    assert llama.token_bytes == 128 * 1024
    assert llama.weights == pytest.approx(8.03e9 - 2 * 128256 * 4096, rel=0.001)


def test_costs_by_hand() -> None:
    cost = Regime(TINY, CHIP, LINK).compute_cost()
    assert cost.fixed == pytest.approx(1152 * 2 / 1e4)
    assert cost.token == pytest.approx(2 * 1152 / 0.5e6)
    # Four heads of two: eight products a layer, each with its sum, for the key and the value.
    assert cost.pair == pytest.approx(2 * 2 * 8 * 2 / 0.25e6)


def test_ranks_share_the_work_and_may_share_the_link() -> None:
    one, two = Regime(TINY, CHIP, LINK), Regime(replace(TINY, ranks=2), CHIP, LINK)
    shared = replace(two, link=replace(LINK, shared=True))
    shape = Prefill(64.0, 1000.0, False)
    assert two.compute_cost().seconds(shape) == pytest.approx(one.compute_cost().seconds(shape) / 2)
    turn = one.turn(Form("raw"), 100, 10)
    everything = np.array([100.0])

    def link_seconds(regime: Regime, form: Form) -> float:
        _, (fetch, *_) = regime.planner(form).ends(turn, everything)
        return float(fetch.sum())

    assert link_seconds(one, Form("raw")) == pytest.approx(100 * 32 / 1000)
    assert link_seconds(two, Form("raw")) == pytest.approx(100 * 32 / 2000)
    assert link_seconds(shared, Form("raw")) == pytest.approx(100 * 32 / 1000)


def test_a_form_is_smaller_and_takes_its_time_to_decode() -> None:
    regime, form = Regime(TINY, CHIP, LINK), Form("small", ratio=8.0, decode=6400.0)
    turn = regime.turn(form, 100, 10)
    _, (fetch, decode, *_) = regime.planner(form).ends(turn, np.array([50, 100]))
    assert fetch.sum(axis=0).tolist() == pytest.approx([0.2, 0.4])
    assert decode.tolist() == pytest.approx([0.25, 0.5])


def costs(link: float, pair: float, decode: float = 0.0, layers: int = 4) -> Planner:
    load = LoadCost(1, {"memory": Rate(link)}, {"c": Rate(decode)})
    return Planner(layers, ComputeCost(0.01, 1e-3, pair), load)


def all_splits(own: Planner, turn: Turn, steps: int) -> float:
    """The earliest end of every split that never shrinks with depth, event by event."""
    choices = np.linspace(turn.device, turn.end, steps + 1)
    _, (by_layer, *rest) = own.ends(turn, choices)
    fetch, (decode, compute) = by_layer[0], (part / own.layers for part in rest[:2])
    best = float("inf")
    for split in combinations_with_replacement(range(steps + 1), own.layers):
        arrived = ready = ended = 0.0
        for p in split:
            arrived += fetch[p]
            ready = max(ready, arrived) + decode[p]
            ended = max(ended, ready) + compute[p]
        best = min(best, ended)
    return best


@settings(max_examples=60, deadline=None)
@given(
    link=st.floats(1e-8, 1e-5),
    pair=st.floats(0, 1e-5),
    decode=st.one_of(st.just(0.0), st.floats(1e-6, 1e-2)),
    new=st.integers(1, 500),
)
def test_the_pyramid_is_the_best_split_there_is(link, pair, decode, new) -> None:
    own, steps = costs(link, pair, decode), 6
    turn = Turn(8, [StoredRun(480, 10**6, "c")], new)
    found, best = pyramid(own, turn, steps), all_splits(own, turn, steps)
    assert (
        found.seconds == pytest.approx(best, rel=1e-9)
        if decode == 0
        else (found.seconds <= best * (1 + 1e-9))
    )
    assert list(found.loads) == sorted(found.loads)
    assert len(found.loads) == own.layers


@settings(max_examples=40, deadline=None)
@given(link=st.floats(1e-8, 1e-5), pair=st.floats(0, 1e-5))
def test_the_loads_of_a_pyramid_take_what_it_says(link, pair) -> None:
    own, turn = costs(link, pair), Turn(0, [StoredRun(480, 10**6, "c")], 16)
    found = pyramid(own, turn, 6)
    _, (fetch, _, compute, _) = own.ends(turn, np.array(found.loads, float))
    arrived = ended = 0.0
    for layer in range(own.layers):
        arrived += fetch[layer, layer]
        ended = max(ended, arrived) + compute[layer] / own.layers
    assert ended == pytest.approx(found.seconds, rel=1e-9)


def test_it_is_never_worse_than_one_p_on_the_same_grid() -> None:
    own, turn = costs(2e-7, 1e-6, layers=8), Turn(0, [StoredRun(640, 10**6, "c")], 16)
    ends, _ = own.ends(turn, np.linspace(0, 640, 11))
    assert pyramid(own, turn, 10).seconds < ends.min()


def test_where_attention_is_all_a_split_by_layer_gains_a_fifth() -> None:
    """Loading takes as long as computing, n^2 / 2 pairs: one p ends at 0.618 of it, half of the
    layers computed and half loaded at 0.5."""
    tokens, layers = 4096, 64
    load = LoadCost(1, {"memory": Rate(1 / tokens)}, {"c": Rate(0.0)})
    own = Planner(layers, ComputeCost(0.0, 0.0, 2 / tokens**2), load)
    turn = Turn(0, [StoredRun(tokens, tokens, "c")], 1)
    assert own.plan(turn).seconds == pytest.approx(0.618, rel=0.03)
    found = pyramid(own, turn)
    assert found.seconds == pytest.approx(0.5, rel=0.03)
    assert set(found.loads[:24]) == {0}
    assert set(found.loads[-24:]) == {tokens}


def test_several_runs_are_refused() -> None:
    turn = Turn(0, [StoredRun(64, 10, "c"), StoredRun(64, 90, "c")], 1)
    with pytest.raises(ValueError, match="one run is expected, not of 2"):
        pyramid(costs(1e-7, 0.0), turn)


def test_uneven_layers_are_refused() -> None:
    by_layer = np.array([1, 2, 3, 4])
    turn = Turn(0, [StoredRun(64, 10, "c", layer_bytes=by_layer)], 1)
    with pytest.raises(ValueError, match="layers need as many bytes each"):
        pyramid(costs(1e-7, 0.0), turn)
