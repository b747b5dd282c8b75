"""The chats that calibration has the model write itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from krul_sglang.profile.conversations import OPENINGS, generate_conversations
from krul_sglang.quality.forward import draw, load_model


def test_draws_have_the_softmax_distribution() -> None:
    """Against torch's own sampling: Pearson's statistic of both stays where chance leaves it."""
    logits = torch.tensor([-torch.inf, 2.0, 0.0, -torch.inf, -1.0, 1.0, -3.0, -torch.inf])
    probabilities, count = logits.softmax(0), 100_000
    generator = torch.Generator().manual_seed(3)
    drawn = draw(logits.expand(count, -1), generator)[:, 0]
    peer = torch.multinomial(probabilities, count, replacement=True, generator=generator)
    for tokens in (drawn, peer):
        found = torch.bincount(tokens, minlength=8).double()
        assert not found[probabilities == 0].any(), "what cannot be is never drawn"
        expected = (count * probabilities.double())[probabilities > 0]
        statistic = ((found[probabilities > 0] - expected) ** 2 / expected).sum()
        assert statistic < 18.5, "4 degrees of freedom: one in a thousand lies beyond"


def test_rows_are_drawn_apart() -> None:
    """Each row of a batch from its own distribution; certain ones always the same."""
    certain = torch.full((5, 49_152), -torch.inf)
    certain[range(5), [0, 1, 2, 25_000, 49_151]] = 0.0
    drawn = draw(certain, torch.Generator().manual_seed(4))
    assert drawn.tolist() == [[0], [1], [2], [25_000], [49_151]]


@pytest.mark.process
def test_every_opening_is_answered_and_followed(chat_model: Path) -> None:
    model, tokenizer = load_model(chat_model)
    shares: list[float] = []
    chats = generate_conversations(model, tokenizer, 3, 6, shares.append)
    again = generate_conversations(model, tokenizer, 3, 6)
    assert chats == again, "the same on every run"
    for chat, opening in zip(chats, OPENINGS, strict=False):
        assert [turn["role"] for turn in chat] == ["user", "assistant", "user"]
        assert (chat[0]["content"], chat[2]["content"]) == opening
    assert len({chat[1]["content"] for chat in chats}) == 3
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
