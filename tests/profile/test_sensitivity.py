"""What a layer's errors really cost, and what calibration makes of it."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from small_profile import LAYERS, WIDTH, make_run
from tiny_model import write_model

from krul_sglang.codec.base import KVRun, KVSpec
from krul_sglang.codec.predictive import ROUNDING, PredictiveCodec
from krul_sglang.profile.calibrate import calibrate
from krul_sglang.profile.fit import Samples, fit
from krul_sglang.profile.sensitivity import MOST, TRUST, corrections, layer_costs
from krul_sglang.profile.trial import SIDE_BY_SIDE, Trial
from krul_sglang.quality.forward import (
    continuation_logits,
    divergence,
    history_kv,
    load_model,
    logits_by_layer,
)
from krul_sglang.strategy.base import Strategy

IDS = [5 + (i * i) % 90 for i in range(120)]
DEEP = SIDE_BY_SIDE + 2
TEXTS = ["".join(chr(33 + (i * i + s) % 90) for i in range(1000)) for s in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 8}
    out = tmp_path_factory.mktemp("model")
    return write_model(out, "llama", num_hidden_layers=DEEP, **small)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_model(folder)[0]


def test_layers_side_by_side_are_what_they_are_one_by_one(model: Any) -> None:
    k, v = history_kv(model, IDS[:80])
    gen = torch.Generator().manual_seed(0)
    other = [x + 0.3 * torch.randn(x.shape, generator=gen) for x in (k, v)]
    layers = [5, 0, 3]
    found = logits_by_layer(model, (k, v), (other[0], other[1]), IDS[80:], layers)
    for layer, logits in zip(layers, found, strict=True):
        own_k, own_v = k.clone(), v.clone()
        own_k[layer], own_v[layer] = other[0][layer], other[1][layer]
        alone = continuation_logits(model, own_k, own_v, IDS[80:])
        assert torch.allclose(logits, alone, atol=1e-4)
        assert not torch.allclose(logits, continuation_logits(model, k, v, IDS[80:]), atol=1e-3)


def test_a_trial_restores_one_layer_at_a_time(model: Any, folder: Path) -> None:
    """Against brute force: encode, decode, put one layer in place, continue."""
    profile = calibrate(folder, TEXTS, None)
    step = profile.curve[-1][0]
    trial = Trial(model, IDS, 0, profile.kv_heads, (60, 80), 40)
    found, _ = trial.cost_by_layer(profile, step)
    k, v = history_kv(model, IDS[:80])
    spec = KVSpec(k.shape[0], k.shape[2], k.shape[3], v.shape[3], "float32")
    codec = PredictiveCodec(spec, profile)
    run = KVRun(k, v, 0)
    payload, _ = codec.encode_at(run, Strategy("predictive"), step)
    restored = list(codec.open(payload).layers(0, 80))
    for layer, (own_k, own_v) in enumerate(restored):
        ck, cv = k.clone(), v.clone()
        ck[layer], cv[layer] = own_k, own_v
        kl = 0.0
        for cut in (60, 80):
            ids = IDS[cut : cut + 40]
            full = continuation_logits(model, k[:, :cut], v[:, :cut], ids)
            own = continuation_logits(model, ck[:, :cut], cv[:, :cut], ids)
            kl += float(divergence(full, own, ids).kl.mean()) / 2
        assert found[layer] == pytest.approx(kl, rel=0.02, abs=1e-7)
    (costs, measured), told = trial.cost_by_layer(profile, step), []
    again = layer_costs([trial], profile, step, told.append)
    assert told == [1.0]
    raw = [max(1e-12, a) / b for a, b in zip(costs, measured.errors, strict=True)]
    for (a, b), (c, d) in zip(pairwise(raw), pairwise(again), strict=True):
        assert (a < b) == (c < d) or math.isclose(c, d), "the order of what they cost is kept"


def test_a_correction_follows_the_cost_part_of_the_way() -> None:
    assert corrections([2.0, 2.0, 2.0]) == pytest.approx([1, 1, 1])
    found = corrections([1.0, 8.0, 64.0])
    assert math.prod(found) == pytest.approx(1)
    assert found == pytest.approx([8**-TRUST, 1, 8**TRUST])
    assert MOST**TRUST < 10, "no layer is taken for more than ten times what its metric says"


def test_a_layer_that_costs_more_is_stored_finer() -> None:
    gen = torch.Generator().manual_seed(7)
    run = make_run(400, 3, "float32")
    x = torch.cat([run.k.flatten(2), run.v.flatten(2)], 2)
    g = torch.randn(1, LAYERS, 400, WIDTH, generator=gen)
    samples = [Samples(x, g, g / 2, WIDTH // 2)]
    dearer = [1.0] * LAYERS
    dearer[2] = 16.0
    plain, corrected = (fit(samples, 0.1, ROUNDING, c)[0] for c in (None, dearer))
    for layer, (a, b) in enumerate(zip(plain, corrected, strict=True)):
        # What a step of a coefficient is in K and V.
        coarse, fine = (float(maps.inverse.square().sum(1).mean().sqrt()) for maps in (a, b))
        assert coarse / fine == pytest.approx(4.0 if layer == 2 else 1.0, rel=0.2)
