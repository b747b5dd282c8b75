"""What a finished request attended to travels with its nodes to the encoder."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from kv_oracle import DIM, HEADS, LAYERS, ROUNDING, RoundingCodec, oracle
from tree_rig import Rig

from krul_sglang.runtime import marks
from krul_sglang.runtime.taps import Taps
from krul_sglang.similarity.levels import LEVELS_A_NAT, codes_of, mean_mass
from krul_sglang.similarity.window import DECODE, PREFILL
from krul_sglang.strategy.base import Strategy

QUERY_HEADS = 2 * HEADS
END = 9


class Spy(RoundingCodec):
    """Keeps how each run was to be encoded: ``(start, tokens) -> strategy``."""

    def __init__(self, spec) -> None:
        super().__init__(spec)
        self.seen: dict[tuple[int, int], Strategy] = {}

    def encode(self, run, strategy: Strategy) -> bytes:
        self.seen[run.start, run.tokens] = strategy
        return super().encode(run, strategy)


def query(position: int, layer: int) -> torch.Tensor:
    gen = torch.Generator().manual_seed(1000 * layer + position)
    return torch.randn(QUERY_HEADS, DIM, generator=gen)


def tapped_rig(make_rig, page_size: int = 1) -> tuple[Rig, Spy]:
    rig = make_rig(page_size, lossy=ROUNDING, turn_ends=[END])
    spy = Spy(rig.krul.pool.spec)
    codec_for = {
        "rounding": spy,
        "lossless": rig.krul.store._codec_for("lossless"),
    }.__getitem__
    rig.krul.store._codec_for = rig.krul.store._encoder._codec_for = codec_for
    slots = len(rig.req_to_token_pool.req_to_token)
    rig.krul.taps = Taps(LAYERS, QUERY_HEADS, DIM, torch.float32, torch.device("cpu"), slots, 2)
    return rig, spy


def record(rig: Rig, req, begin: int, end: int, decoding: bool) -> None:
    """What the attention backend sees of tokens ``begin .. end``."""
    slot = req.kv.req_pool_idx
    batch = SimpleNamespace(
        forward_mode=SimpleNamespace(is_decode=lambda: decoding, is_extend=lambda: not decoding),
        rids=[req.rid],
        seq_lens=torch.tensor([end]),
        req_pool_indices=torch.tensor([slot]),
        req_pool_indices_cpu=None,
        extend_prefix_lens_cpu=[begin],
        extend_seq_lens_cpu=[end - begin],
    )
    for layer in range(LAYERS):
        rows = torch.stack([query(p, layer) for p in range(begin, end)])
        rig.krul.taps.record(rows, layer, batch)


def turn(rig: Rig, tokens: list[int], answer: list[int], end=Rig.finish):
    req = rig.request(tokens)
    rig.match(req)
    assert rig.admit(req)
    begin = req.prefix_len
    rig.prefill(req)
    record(rig, req, begin, len(tokens), decoding=False)
    for step, token in enumerate(answer):
        rig.decode(req, token)
        if step:
            record(rig, req, len(tokens) + step - 1, len(tokens) + step, decoding=True)
    end(rig, req)
    return req, begin


def brute_force(tokens: list[int], prompt: int, begin: int) -> torch.Tensor:
    """Codes ``[layers, tokens]`` by whole attention maps of the sampled queries."""
    count = len(tokens)
    kept = [p for p in range(begin, prompt) if p % PREFILL.stride == 0][-PREFILL.size :]
    kept += [p for p in range(prompt, count) if p % DECODE.stride == 0][-DECODE.size :]
    k = oracle(tuple(tokens))[0]
    out = torch.zeros(LAYERS, count)
    for layer in range(LAYERS):
        source = layer - layer % 2
        for position in kept:
            q = query(position, source)
            for head in range(QUERY_HEADS):
                keys = k[source, : position + 1, head // (QUERY_HEADS // HEADS)]
                share = (keys @ q[head] / math.sqrt(DIM)).softmax(0)
                out[layer, : position + 1] += share / QUERY_HEADS
    seen = torch.tensor([sum(p >= t for p in kept) for t in range(count)])
    return codes_of(mean_mass(out, seen), 4)


def attention(strategy: Strategy) -> torch.Tensor:
    return torch.frombuffer(bytearray(strategy.attention), dtype=torch.uint8).view(LAYERS, -1)


def agree(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within one code: the sums run in another order."""
    assert found.shape == expected.shape
    assert int((found.int() - expected.int()).abs().max()) <= 1


@pytest.mark.parametrize("page_size", [1, 16])
def test_the_encoder_is_told_what_was_attended_to(make_rig, page_size: int) -> None:
    rig, spy = tapped_rig(make_rig, page_size)
    prompt, answer = [5, END, *range(100, 162)], list(range(200, 250))
    turn(rig, prompt, answer)
    assert rig.krul.counters.measured_requests == 1
    rig.evict()
    rig.sealed()
    tokens = [*prompt, *answer[:-1]]
    tokens = tokens[: len(tokens) // page_size * page_size]
    expected = brute_force([*prompt, *answer[:-1]], len(prompt), 0)
    assert spy.seen
    for (start, count), strategy in spy.seen.items():
        agree(attention(strategy), expected[:, start : start + count])
    assert sum(count for _, count in spy.seen) > len(tokens) - 2 * max(4, page_size)
    assert expected.float().std() > LEVELS_A_NAT / 4  # there was something to tell


def test_a_branch_later_on_divides_it(make_rig) -> None:
    rig, spy = tapped_rig(make_rig)
    prompt, answer = [5, END, *range(100, 162)], list(range(200, 240))
    turn(rig, prompt, answer)
    rig.turn([*prompt[:40], 7, 8], answer=[1])
    rig.evict()
    rig.sealed()
    expected = brute_force([*prompt, *answer[:-1]], len(prompt), 0)
    tagged = {key: s for key, s in spy.seen.items() if s.attention}
    assert min(start for start, _ in tagged) == 40  # what is above the branch is stored exactly
    for (start, count), strategy in tagged.items():
        agree(attention(strategy), expected[:, start : start + count])


def test_the_next_turn_measures_what_is_not_stored_yet(make_rig) -> None:
    """Restored tokens keep their stored copy; the new ones carry what the new turn attended."""
    rig, spy = tapped_rig(make_rig)
    first, answer = [5, END, *range(100, 162)], list(range(200, 220))
    turn(rig, first, answer)
    rig.evict()
    rig.sealed()
    spy.seen.clear()
    second = [*first, *answer[:-1], *range(300, 340)]
    _, begin = turn(rig, second, answer)
    assert begin > len(first)
    rig.evict()
    rig.sealed()
    assert spy.seen
    tokens = [*second, *answer[:-1]]
    # Its own oracle: rows computed on a lossy prefix are tainted, so only shapes are compared.
    for (start, count), strategy in spy.seen.items():
        assert start >= begin
        assert len(strategy.attention) == LAYERS * count
    assert sum(count for _, count in spy.seen) == len(tokens) - begin


@pytest.mark.parametrize("end", [Rig.abort, Rig.retract])
def test_a_request_that_did_not_finish_says_nothing(make_rig, end) -> None:
    rig, spy = tapped_rig(make_rig)
    req, _ = turn(rig, [5, END, *range(100, 162)], list(range(200, 230)), end)
    assert rig.krul.counters.measured_requests == 0
    assert rig.krul.taps.window(req.rid, 60) is None
    assert not any(marks.tag_of(node) for node in rig.nodes())
    rig.evict()
    rig.sealed()
    assert all(strategy.attention == b"" for strategy in spy.seen.values())
