"""Levels: a byte a token and layer says how much attention it drew."""

from __future__ import annotations

import math

import torch

from krul_sglang.similarity.estimate import codes_of_maps
from krul_sglang.similarity.levels import LEVELS_A_NAT, OFFSET, codes_of, levels_of, mean_mass
from krul_sglang.similarity.window import DECODE


def test_a_level_is_the_log_of_the_share() -> None:
    mass = torch.rand(3, 200, generator=torch.Generator().manual_seed(0)) ** 6
    mass[:, 5] = 0
    expected = (mass / mass[:, 4:].mean(1, keepdim=True) + OFFSET).log()
    found = levels_of(codes_of(mass, 4))
    assert float((found - expected).abs().max()) <= 0.5 / LEVELS_A_NAT + 1e-5


def test_sinks_do_not_weigh_on_the_others() -> None:
    mass = torch.ones(1, 50)
    plain = codes_of(mass, 4)
    mass[:, :4] = 1e6
    assert torch.equal(codes_of(mass, 4)[:, 4:], plain[:, 4:])
    assert int(codes_of(mass, 4)[0, 0]) == 255
    assert codes_of(mass[:, :3], 4).shape == (1, 3)  # nothing but sinks


def test_scale_and_emptiness_do_not_matter() -> None:
    mass = torch.rand(2, 60)
    assert torch.equal(codes_of(mass, 4), codes_of(mass * 1e-9, 4))
    assert levels_of(codes_of(torch.zeros(2, 60), 4)).max() <= math.log(OFFSET) + 1e-6


def test_a_mean_is_over_the_rows_that_could_look() -> None:
    mass = torch.tensor([[6.0, 6.0, 6.0, 0.0]])
    found = mean_mass(mass, torch.tensor([24, 12, 3, 0]))
    # Of the last two, few rows have seen one and none the other: 2 is usual there.
    assert found.tolist() == [[0.25, 0.5, 2.0, 2.0]]


def test_codes_of_maps_take_what_would_have_been_sampled() -> None:
    gen = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 2, 96, 300, generator=gen)
    logits.masked_fill_(torch.arange(300) > torch.arange(204, 300)[:, None], -math.inf)
    maps = logits.softmax(-1)
    kept = [p for p in range(204, 300) if p % DECODE.stride == 0]
    assert len(kept) == DECODE.size
    mass = torch.zeros(5, 300)
    for layer in range(5):
        for p in kept:
            mass[layer] += maps[layer - layer % 2, :, p - 204].mean(0)
    seen = torch.tensor([sum(p >= t for p in kept) for t in range(300)])
    expected = codes_of(mean_mass(mass, seen), 4)
    found = codes_of_maps(maps, 4)
    assert int((found.int() - expected.int()).abs().max()) <= 1
