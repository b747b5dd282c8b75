"""The guard: what it lets through, what it makes finer, what it gives up on."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from small_profile import PROFILE, make_run, spec_of

from krul_sglang.codec.base import KVRun
from krul_sglang.codec.guard import (
    ERROR_SPREAD,
    FOREIGN,
    TRIES,
    UNLIKE,
    UNLIKE_COST,
    Measured,
    distance,
    guarded,
    penalty,
    quarters,
)
from krul_sglang.codec.predictive import PredictiveCodec
from krul_sglang.strategy.base import Strategy

CURVE = [(0.05, 0.001, 0.01), (0.1, 0.01, 0.04), (0.2, 0.05, 0.15)]
HOME = replace(PROFILE, curve=CURVE, novelty=[1.0, 2.0])
BUDGET = 0.01


def steps_tried(error: float, novelty: tuple[float, ...]) -> tuple[list[float], bytes | None]:
    """The steps the guard asks for when every encoding measures the same, and its choice."""
    tried: list[float] = []

    def encode_at(step: float) -> tuple[bytes, Measured]:
        tried.append(step)
        return str(step).encode(), Measured((error,), novelty)

    try:
        return tried, guarded(HOME, BUDGET, encode_at)
    except ValueError:
        return tried, None


def test_text_like_the_calibration_keeps_the_budgets_step() -> None:
    step = HOME.step_for(BUDGET)
    _, error = HOME.cost_at(step)
    tried, payload = steps_tried(ERROR_SPREAD * error, (0.99 * UNLIKE, 1.98 * UNLIKE))
    assert tried == [step]
    assert payload == str(step).encode()


def test_error_and_distance_multiply() -> None:
    step = HOME.step_for(BUDGET)
    _, error = HOME.cost_at(step)
    home = Measured((error / 4, error * 3 / 4), (1.0, 2.0))
    assert penalty(HOME, home, step) == 1
    larger = replace(home, errors=(3 * ERROR_SPREAD * error,))
    assert penalty(HOME, larger, step) == pytest.approx(3)
    # The second of two layers is far from its own part of the calibration text.
    unlike = replace(larger, novelty=(1.0, 2.0 * UNLIKE * 1.01))
    assert penalty(HOME, unlike, step) == pytest.approx(3 * UNLIKE_COST)


def test_unlike_text_gets_the_step_of_a_smaller_budget() -> None:
    tried, payload = steps_tried(0.0, (1.0, 2.0 * UNLIKE * 1.01))
    assert tried == [HOME.step_for(BUDGET), HOME.step_for(BUDGET / UNLIKE_COST)]
    assert payload == str(tried[-1]).encode()


def test_an_error_that_a_finer_step_halves_is_followed() -> None:
    """The error falls more slowly than on held-out text: one more try is needed."""
    tried: list[float] = []

    def encode_at(step: float) -> tuple[bytes, Measured]:
        tried.append(step)
        error = ERROR_SPREAD * 0.05 * (step / 0.1) ** 1.8
        return str(step).encode(), Measured((error,), (1.0, 2.0))

    payload = guarded(HOME, BUDGET, encode_at)
    assert 2 <= len(tried) <= TRIES
    assert tried == sorted(tried, reverse=True)
    assert payload == str(tried[-1]).encode()
    final = encode_at(tried[-1])[1]
    assert penalty(HOME, final, tried[-1]) * HOME.cost_at(tried[-1])[0] <= BUDGET * 1.01


def test_foreign_keys_are_given_up_at_once_and_stubborn_error_after_some_tries() -> None:
    assert steps_tried(0.0, (FOREIGN * 1.01, 0.0)) == ([HOME.step_for(BUDGET)], None)
    tried, payload = steps_tried(1e3, (1.0, 1.0))
    assert payload is None
    assert len(tried) == TRIES


@pytest.mark.parametrize(
    ("kinds", "tokens", "found"),
    [(1, 200, True), (8, 200, True), (20, 200, False), (1, 20, False), (200, 200, False)],
)
def test_mere_repetition_is_given_up_on(kinds: int, tokens: int, found: bool) -> None:
    """A few tokens over and over, at other positions each time; too short a run says nothing."""
    codec = PredictiveCodec(spec_of("float32"), PROFILE)
    few = make_run(kinds, 7, "float32", 10)
    again = (
        [few.k[:, i % kinds] for i in range(tokens)],
        [few.v[:, i % kinds] for i in range(tokens)],
    )
    run = KVRun(*(torch.stack(x, 1) for x in again), 10)
    _, measured = codec.encode_at(run, Strategy("predictive"), 0.1)
    assert measured.repetitive is found
    at_home = Measured((0.0,), (1.0,), measured.repetitive)
    assert penalty(PROFILE, at_home, 0.1) == (math.inf if found else 1.0)


def test_no_tokens_cost_nothing() -> None:
    nothing = Measured((), ())
    assert distance(HOME, nothing) == nothing.error == 0.0
    assert quarters(()) == []
    assert quarters(range(8)) == [0.5, 2.5, 4.5, 6.5]
    assert quarters([3.0]) == [3.0]


def test_the_codec_measures_real_runs() -> None:
    """More error at a coarser step, more distance for keys that no layer below predicts."""
    codec, strategy = PredictiveCodec(spec_of("float32"), PROFILE), Strategy("predictive", BUDGET)
    run = make_run(300, 7, "float32")
    fine, coarse = (codec.encode_at(run, strategy, step)[1] for step in (0.05, 0.2))
    assert 0 < fine.error < coarse.error
    assert all(0.5 < layer < 2 for layer in fine.novelty)
    shuffled = KVRun(run.k.flip(1), run.v, 0)
    assert max(codec.encode_at(shuffled, strategy, 0.05)[1].novelty) > 2 * max(fine.novelty)
