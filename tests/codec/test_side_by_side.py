"""Several runs decoded as one give what each gives alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_profile import PROFILE, make_run, spec_of

from krul_sglang.codec.base import Part
from krul_sglang.codec.predictive import PredictiveCodec
from krul_sglang.strategy.base import Strategy

CODEC = PredictiveCodec(spec_of("float32"), PROFILE)
STEP = PROFILE.step_for(0.01)


def reader(tokens: int, seed: int, start: int, step: float = STEP):
    run = make_run(tokens, seed, "float32", start)
    return CODEC.open(CODEC.encode_at(run, Strategy("predictive", 0.01), step)[0])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 60), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5
    )
)
def test_side_by_side_is_one_after_the_other(runs) -> None:
    parts = []
    for seed, (tokens, *cut) in enumerate(runs):
        lo, hi = sorted(round(share * tokens) for share in cut)
        parts.append(Part(reader(tokens, seed, 10 + 100 * seed), lo, hi))
    assert len({part.reader.batch_key for part in parts}) == 1
    alone = [list(part.reader.layers(part.lo, part.hi)) for part in parts]
    for layer, (k, v) in enumerate(parts[0].reader.layers_of(parts)):
        for found, index in ((k, 0), (v, 1)):
            expected = torch.cat([own[layer][index] for own in alone])
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_only_equal_steps_join_and_nothing_with_sinks() -> None:
    assert reader(9, 0, 0).batch_key is None
    assert reader(9, 0, 4).batch_key == reader(7, 1, 50).batch_key
    assert reader(9, 0, 4).batch_key != reader(9, 0, 4, STEP / 2).batch_key


@pytest.mark.parametrize("at", [0, 1, 2])
def test_damage_in_one_of_them_is_noticed(at: int) -> None:
    from krul_sglang.codec.base import CodecError

    payloads = []
    for seed in range(3):
        run = make_run(30, seed, "float32", 10)
        payloads.append(bytearray(CODEC.encode_at(run, Strategy("predictive"), STEP)[0]))
    payloads[at][-5] ^= 0x10
    parts = [Part(CODEC.open(bytes(p)), 0, 30) for p in payloads]
    with pytest.raises(CodecError):
        list(parts[0].reader.layers_of(parts))
