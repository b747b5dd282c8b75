"""The packed ops are the predictive codec's twin: its payloads decode to its layers, and
its layers encode to what its reader reads."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("krul_sglang.codec.predictive")
small = pytest.importorskip("small_profile")

import zstandard  # noqa: E402
from krul_kernels import packed  # noqa: E402

from krul_sglang.codec.frames import open_frame  # noqa: E402
from krul_sglang.codec.layout import (  # noqa: E402
    FACTORS,
    Plan,
    cells_of,
    groups_of,
    unpack_classes,
)
from krul_sglang.codec.predictive import ROUNDING, PredictiveCodec  # noqa: E402
from krul_sglang.codec.symbols import ALPHABETS  # noqa: E402
from krul_sglang.strategy.base import Strategy  # noqa: E402

LARGEST = [alphabet.largest for alphabet in ALPHABETS]
STEP, START = 0.1, 8  # behind the sinks


class Frame(NamedTuple):
    """zstd undone: layers ``first ..``, their tokens' classes, the bytes, the tables."""

    first: int
    classes: list[np.ndarray]
    raw: torch.Tensor
    layout: packed.FrameLayout


def frames_of(codec: PredictiveCodec, payload: bytes, shared: tuple[int, ...]) -> list[Frame]:
    reader, plans = codec.open(payload), codec.plans(STEP, shared)
    tokens, out = reader.tokens, []
    size = -(-tokens // 4)
    for (a, b), frame, length in zip(reader._groups, reader._frames, reader._sizes, strict=True):
        raw = open_frame(zstandard.ZstdDecompressor(), frame, length)
        classes = [
            unpack_classes(np.frombuffer(raw, np.uint8, size, i * size), tokens)
            for i in range(b - a)
        ]
        counts = [np.bincount(own, minlength=len(FACTORS)) for own in classes]
        widths = [plan.width for plan in plans[a:b]]
        cells = cells_of(plans[a:b], counts)
        layout = packed.frame_layout(cells, LARGEST, widths, tokens, size * (b - a))
        out.append(Frame(a, classes, torch.frombuffer(bytearray(raw), dtype=torch.uint8), layout))
    return out


def classes_of(plan: Plan, classes: np.ndarray) -> tuple[torch.Tensor, ...]:
    """order, ends, widths, scales."""
    return (
        torch.from_numpy(np.argsort(classes, kind="stable")),
        torch.from_numpy(np.bincount(classes, minlength=len(FACTORS))).cumsum(0).int(),
        torch.tensor(plan.widths, dtype=torch.int32),
        torch.tensor([STEP * factor for factor in FACTORS]),
    )


CASES = pytest.mark.parametrize(
    ("tokens", "dtype", "shared"),
    [(1, "float32", ()), (17, "bfloat16", (2,)), (60, "float16", (0,)), (150, "float32", ())],
)


@CASES
def test_a_payload_decodes_to_the_readers_layers(tokens, dtype, shared):
    codec = PredictiveCodec(small.spec_of(dtype), small.PROFILE)
    run = small.make_run(tokens, 9, dtype, START)
    run.v[3, 0, 1, 2] = 300.0  # overflows its alphabet; float32 errors are of its size
    near = max(1e-4, torch.finfo(run.k.dtype).eps)
    payload, _ = codec.encode_at(run, Strategy("predictive", 0.01, shared=shared), STEP)
    expected = list(codec.open(payload).layers(0, tokens))
    cos, sin = small.ROPE.tables(START, tokens)
    rows = torch.randperm(2 * tokens)[:tokens]
    x, plans = None, codec.plans(STEP, shared)
    for frame in frames_of(codec, payload, shared):
        layout = frame.layout
        tables = layout.cells, layout.blocks, layout.overflow, layout.coefficients, tokens
        symbols, found = packed.unpack_symbols(frame.raw, *tables)
        assert int(found) * 2 == len(frame.raw) - layout.overflow
        for layer, classes in enumerate(frame.classes, frame.first):
            plan, maps = plans[layer], plans[layer].maps
            own, symbols = symbols[: plan.width], symbols[plan.width :]
            args = (*classes_of(plan, classes), x, maps.bias, maps.down, maps.up, maps.inverse)
            x = packed.rebuild_layer(own, *args)
            shape = 2 * tokens, small.HEADS, small.DIM
            pools = [torch.zeros(shape, dtype=getattr(torch, dtype)) for _ in range(2)]
            packed.scatter_layer(x, rows, cos, sin, small.ROPE.scale, *pools)
            for pool, one in zip(pools, expected[layer], strict=True):
                torch.testing.assert_close(pool[rows], one, rtol=near, atol=1e-4)
        assert not len(symbols)


@CASES
def test_symbols_pack_to_the_encoders_bytes(tokens, dtype, shared):
    codec = PredictiveCodec(small.spec_of(dtype), small.PROFILE)
    run = small.make_run(tokens, 3, dtype, START)
    payload, _ = codec.encode_at(run, Strategy("predictive", 0.01, shared=shared), STEP)
    for frame in frames_of(codec, payload, shared):
        layout = frame.layout
        tables = layout.cells, layout.blocks, layout.overflow
        symbols, _ = packed.unpack_symbols(frame.raw, *tables, layout.coefficients, tokens)
        bins, over, found = packed.pack_symbols(symbols, *tables)
        begin = int(layout.cells[0, 0]) if len(layout.cells) else layout.overflow
        expected = frame.raw[begin:]
        assert torch.equal(torch.cat([bins[begin:], *over[:, : int(found[0])]]), expected)


@CASES
def test_layers_encode_as_the_codec_does(tokens, dtype, shared):
    codec = PredictiveCodec(small.spec_of(dtype), small.PROFILE)
    run = small.make_run(tokens, 3, dtype, START)
    payload, _ = codec.encode_at(run, Strategy("predictive", 0.01, shared=shared), STEP)
    cos, sin = small.ROPE.tables(START, tokens)
    rows = torch.arange(tokens)
    below, plans = None, codec.plans(STEP, shared)
    for frame in frames_of(codec, payload, shared):
        layout, mine = frame.layout, []
        tables = layout.cells, layout.blocks, layout.overflow
        for layer, classes in enumerate(frame.classes, frame.first):
            plan, maps = plans[layer], plans[layer].maps
            x = packed.gather_layer(rows, cos, sin, small.ROPE.scale, run.k[layer], run.v[layer])
            args = (*classes_of(plan, classes), below, maps.bias, maps.down, maps.up)
            coded, below = packed.quantize_layer(
                x, *args, maps.forward, maps.inverse, plan.width, ROUNDING
            )
            mine.append(coded)
        theirs, _ = packed.unpack_symbols(frame.raw, *tables, layout.coefficients, tokens)
        off = (torch.cat(mine) - theirs).abs()
        # A value on the edge between two symbols may go either way.
        assert int(off.amax() if off.numel() else 0) <= 1
        assert int((off > 0).sum()) <= off.numel() // 1000


def test_the_case_of_several_layers_a_frame_is_covered():
    (a, b), *_ = groups_of(small.LAYERS, 150 * small.WIDTH)
    assert b - a > 1
