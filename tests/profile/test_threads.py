"""How many threads calibration computes with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from krul_sglang.profile import threads
from krul_sglang.profile.threads import Threads


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("fastest", [1, 2, 4])
def test_the_fastest_number_is_taken_and_given_back(
    four_threads: None, monkeypatch: pytest.MonkeyPatch, fastest: int
) -> None:
    asked: list[int] = []

    def speed(count: int) -> float:
        asked.append(count)
        torch.set_num_threads(count)
        return float(count == fastest)

    monkeypatch.setattr(threads, "_speed", speed)
    with Threads() as chosen:
        chosen.adapt()
        assert sorted(asked) == [1, 2, 4]
        assert torch.get_num_threads() == fastest
        chosen.adapt()
        assert len(asked) == 3, "it has looked a moment ago"
        monkeypatch.setattr(threads, "EVERY", 0.0)
        chosen._next = 0.0
        chosen.adapt()
        assert len(asked) == 6
    assert torch.get_num_threads() == 4


def test_threads_are_given_back_when_calibration_fails(four_threads: None) -> None:
    def calibrate() -> None:
        with Threads() as chosen:
            chosen.adapt()  # the real measurement
            assert torch.get_num_threads() in (1, 2, 4)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate()
    assert torch.get_num_threads() == 4


def test_one_thread_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(threads, "_speed", None)
    with Threads() as chosen:
        chosen.adapt()
