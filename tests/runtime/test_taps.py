"""Taps: what is kept of running requests, and that it is what the model attended with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_model import write_model

from krul_sglang.live_server import server_environment
from krul_sglang.runtime import taps as module
from krul_sglang.runtime.taps import Taps
from krul_sglang.similarity.window import DECODE, PREFILL, ROWS

LAYERS, HEADS, DIM, SLOTS = 5, 2, 4, 9
HERE = Path(__file__).resolve().parent


@pytest.mark.process
def test_a_model_runner_keeps_the_queries_it_attends_with(tmp_path: Path) -> None:
    """Mass from the taps of SGLang's ModelRunner equals that of transformers' maps, with two
    requests in a batch and one prefilled in chunks."""
    model = write_model(tmp_path, "llama", num_hidden_layers=5, max_position_embeddings=512)
    env = server_environment({"KRUL_ENABLED": "1", "PYTHONPATH": str(HERE.parent)})
    child = [sys.executable, str(HERE / "taps_child.py"), str(model)]
    done = subprocess.run(child, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"chunked", "whole"}
    for rid, tokens, prompt in (("chunked", 118, 73), ("whole", 68, 23)):
        one = found[rid]
        assert one["tokens"] == tokens
        kept = {p for p in one["positions"] if p >= 0}
        assert kept == set(expected(prompt, tokens))
        assert one["difference"] < 1e-5
        assert one["mass"] == pytest.approx(len(kept), abs=1e-3)


def expected(prompt: int, tokens: int) -> list[int]:
    prefilled = [p for p in range(prompt) if p % PREFILL.stride == 0][-PREFILL.size :]
    decoded = [p for p in range(prompt, tokens) if p % DECODE.stride == 0][-DECODE.size :]
    return prefilled + decoded


def make(static: bool = False) -> Taps:
    taps = Taps(LAYERS, HEADS, DIM, torch.float32, torch.device("cpu"), SLOTS, 2)
    taps.static = static
    return taps


def queries(slots: list[int], positions: list[int], layer: int) -> torch.Tensor:
    """A value of its own for every slot, position and layer."""
    values = [
        1e4 * slot + position + 0.1 * layer for slot, position in zip(slots, positions, strict=True)
    ]
    return torch.tensor(values)[:, None].expand(-1, HEADS * DIM).contiguous()


def run(taps: Taps, batch: SimpleNamespace, slots: list[int], positions: list[int]) -> None:
    for layer in range(LAYERS):
        taps.record(queries(slots, positions, layer), layer, batch)


def extend(taps: Taps, *parts: tuple[str, int, int, int]) -> None:
    """Parts: rid, slot, tokens before, tokens new."""
    mode = SimpleNamespace(is_decode=lambda: False, is_extend=lambda: True)
    rids, slots, before, new = (list(column) for column in zip(*parts, strict=True))
    batch = SimpleNamespace(
        forward_mode=mode,
        rids=rids,
        req_pool_indices=torch.tensor(slots),
        req_pool_indices_cpu=None,
        extend_prefix_lens_cpu=before,
        extend_seq_lens_cpu=new,
    )
    owner = [slot for _, slot, _, n in parts for _ in range(n)]
    run(taps, batch, owner, [p for _, _, b, n in parts for p in range(b, b + n)])


def decode(taps: Taps, slots: list[int], positions: list[int]) -> None:
    mode = SimpleNamespace(is_decode=lambda: True, is_extend=lambda: False)
    lengths = torch.tensor(positions) + 1
    indices = torch.tensor(slots)
    batch = SimpleNamespace(forward_mode=mode, seq_lens=lengths, req_pool_indices=indices)
    run(taps, batch, slots, positions)


def check(taps: Taps, rid: str, slot: int, kept: list[int], tokens: int) -> None:
    window = taps.window(rid, tokens)
    assert sorted(p for p in window.positions.tolist() if p >= 0) == kept
    assert window.q.shape == (3, ROWS, HEADS, DIM)
    for row, position in enumerate(window.positions.tolist()):
        for index, layer in enumerate((0, 2, 4)):
            if position >= 0:
                assert torch.equal(
                    window.q[index, row].flatten(), queries([slot], [position], layer)[0]
                )


@pytest.mark.parametrize("static", [False, True])
def test_every_request_keeps_its_own_latest_rows(static: bool) -> None:
    """Static is what CUDA graphs replay; both keep the same."""
    taps = make(static)
    extend(taps, ("a", 3, 0, 50), ("b", 1, 20, 30))
    extend(taps, ("a", 3, 50, 14))
    for step in range(200):
        # Slot 0 is what graphs pad a batch with.
        decode(taps, [1, 3, 0], [50 + step, 64 + step, 0])
    check(taps, "a", 3, expected(64, 264), 264)
    prompt_b = [p for p in range(20, 50) if p % 4 == 0][-8:]
    check(taps, "b", 1, prompt_b + expected(50, 250)[8:], 250)


def test_a_window_ends_where_the_conversation_does() -> None:
    """One step more than was asked for may be in flight when a request ends."""
    taps = make()
    extend(taps, ("a", 1, 0, 32))
    for position in range(32, 49):
        decode(taps, [1], [position])
    check(taps, "a", 1, [*expected(32, 32), 32, 40], 48)


def test_too_few_rows_say_nothing() -> None:
    taps = make()
    extend(taps, ("a", 1, 0, 9), ("b", 2, 0, 13), ("c", 3, 99, 2))
    assert taps.window("a", 9) is None
    assert taps.window("b", 13) is not None
    for position in range(101, 140):
        decode(taps, [3], [position])
    assert taps.window("c", 101) is None
    check(taps, "c", 3, [100, 104, 112, 120, 128, 136], 140)


def test_lanes_are_bounded_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LANES", 2)
    taps = make()
    size = taps.nbytes
    extend(taps, ("a", 1, 0, 40))
    extend(taps, ("b", 2, 0, 40))
    extend(taps, ("c", 3, 0, 40))  # the oldest prompt gives its lane up
    assert taps.window("a", 40) is None
    decode(taps, [1, 2, 3], [40, 40, 40])  # goes nowhere, and not to c
    check(taps, "b", 2, [*expected(40, 40), 40], 41)
    check(taps, "c", 3, [*expected(40, 40), 40], 41)
    taps.release("b")
    taps.release("b")
    taps.release("never seen")
    extend(taps, ("d", 1, 0, 16))  # a freed lane keeps nothing of its last request
    check(taps, "d", 1, [0, 4, 8, 12], 16)
    check(taps, "c", 3, [*expected(40, 40), 40], 41)
    assert taps.nbytes == size


def test_a_request_that_was_retracted_starts_anew() -> None:
    taps = make()
    extend(taps, ("a", 1, 0, 40))
    extend(taps, ("a", 2, 0, 44))  # same request, another slot
    check(taps, "a", 2, expected(44, 44), 44)


def test_memory_is_bounded_by_bytes() -> None:
    row = 3 * HEADS * DIM * 4
    shape = (LAYERS, HEADS, DIM, torch.float32, torch.device("cpu"), SLOTS, 2)
    taps = Taps(*shape, memory=4 * (ROWS + 1) * row)
    assert taps.lanes == 3, "the lane and the rows that nobody reads count"
    assert taps._q.nbytes <= 4 * (ROWS + 1) * row
    assert Taps(*shape, memory=4 * (ROWS + 1) * row - 1).lanes == 2
    assert Taps(*shape, memory=1).lanes == 1
