"""What calibration asks for beside the text's going on."""

from __future__ import annotations

import torch

from krul_sglang.profile.fit import QUOTING, Samples, metrics
from krul_sglang.profile.importance import QUOTATIONS, QUOTED, quotations


def test_quotations_are_passages_from_all_over() -> None:
    ids, seen = list(range(1000, 1800)), set()
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        quoted = quotations(ids, generator)
        assert len(quoted) == QUOTATIONS * QUOTED
        for begin in range(0, len(quoted), QUOTED):
            passage = quoted[begin : begin + QUOTED]
            assert passage == list(range(passage[0], passage[0] + QUOTED))
            seen.add((passage[0] - 1000) // 100)
    assert seen == set(range(8)), "none of the text is left out"


def test_a_text_shorter_than_a_quotation_is_quoted_whole() -> None:
    assert quotations([7, 8, 9], torch.Generator()) == [7, 8, 9] * QUOTATIONS


def test_the_metric_weighs_quotations() -> None:
    """Against brute force; K and V apart."""
    generator = torch.Generator().manual_seed(2)
    x = torch.zeros(2, 5, 6)
    g = torch.randn(1, 2, 5, 6, generator=generator)
    quoted = torch.randn(2, 2, 5, 6, generator=generator)
    found = metrics([Samples(x, g, quoted, 4)], 1)
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for weight, draws in ((1.0, g[:, 1]), (QUOTING, quoted[:, 1])):
        for token in draws.reshape(-1, 6).double():
            expected += weight / 2 / draws[..., 0].numel() * torch.outer(token, token)
    expected[:4, 4:] = expected[4:, :4] = 0
    assert torch.allclose(found, expected, atol=1e-5)
