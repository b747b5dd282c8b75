"""The packed kernels against plain loops; Triton against the reference; odd shapes.

Needs torch, numpy and pytest. Without a GPU, Triton runs in its interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from krul_kernels import packed
from krul_kernels.packed import pool, symbols, transform
from krul_kernels.packed.layout import frame_layout, share_of
from packed_cases import (
    DEVICE,
    LARGEST,
    SHARES,
    Layer,
    make_frame,
    make_layer,
    make_symbols,
    matrices,
    pack_plainly,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
CASES = [
    pytest.param(1, (5, 3, 2, 1), (), id="one token"),
    pytest.param(17, (20, 13, 9, 0), (), id="17 tokens, a class that stores nothing"),
    pytest.param(40, (21, 21, 4, 4), (0, 2), id="absent classes"),
    pytest.param(9, (0, 0, 0, 0), (), id="width 0"),
    pytest.param(0, (4, 3, 2, 1), (), id="no token"),
]
DIM, RANK = 23, 7


class Version:
    """One version of every op, called by the op's name."""

    def __init__(self, modules: list[ModuleType], suffix: str, truncates: bool) -> None:
        self.modules, self.suffix, self.truncates = modules, suffix, truncates

    def __call__(self, name: str) -> Callable[..., Any]:
        name += self.suffix
        return next(getattr(one, name) for one in self.modules if hasattr(one, name))


@pytest.fixture(params=["reference", "triton"])
def version(request) -> Version:
    if request.param == "reference":
        return Version([symbols, transform, pool], "_reference", False)
    pytest.importorskip("triton")
    request.getfixturevalue("triton_device")
    from krul_kernels.packed import pool_triton, symbols_triton, transform_triton

    modules = [symbols_triton, transform_triton, pool_triton]
    # float32 to bfloat16 is rounded to nearest even by every GPU backend, but cut off by the
    # interpreter (`cast_impl` in Triton 3.9's runtime/interpreter.py).
    return Version(modules, "_triton", DEVICE == "cpu")


def bytes_on_device(raw: bytes) -> torch.Tensor:
    return torch.tensor(list(raw), dtype=torch.uint8, device=DEVICE)


def class_of(layer: Layer) -> list[int]:
    ends = layer.ends.tolist()
    return [sum(place >= end for end in ends) for place in range(len(layer.order))]


def predicted(layer: Layer) -> torch.Tensor:
    """float64 ``[tokens, dim]``."""
    bias = layer.bias.double().expand(len(layer.order), -1)
    if layer.below is None:
        return bias
    return bias + layer.below.double() @ layer.down.double() @ layer.up.double()


def test_kernels_in_a_process_of_their_own(interpreted):
    interpreted(Path(__file__))


# Symbols and bytes.


def test_digits_of_an_alphabet_fit_a_byte():
    assert tuple(map(share_of, LARGEST)) == SHARES


@pytest.mark.parametrize("byte", [0, 5])
@pytest.mark.parametrize(("tokens", "widths", "absent"), CASES)
def test_symbols_and_bytes_against_loops(version, tokens, widths, absent, byte):
    layers = [make_layer(tokens, DIM, rank, widths, absent) for rank in (0, RANK)]
    values = [make_symbols(layer, seed) for seed, layer in enumerate(layers)]
    bins, layout = make_frame(layers, byte)
    raw = pack_plainly(bins, values)
    frame = bytes_on_device(bytes(byte) + raw)

    unpacked, found = version("unpack_symbols")(
        frame, layout.cells, layout.blocks, layout.overflow, layout.coefficients, tokens
    )
    assert int(found) * 2 == len(frame) - layout.overflow
    for one, value in zip(matrices(unpacked, layers), values, strict=True):
        assert torch.equal(one, value)

    tables = layout.cells, layout.blocks, layout.overflow
    bins_only, over, count = version("pack_symbols")(torch.cat(values), *tables)
    entries, highest = count.tolist()
    assert entries == int(found)
    assert highest <= symbols.MOST
    assert torch.equal(torch.cat([bins_only, *over[:, :entries]]), frame)
    assert not over[:, entries:].any()


def test_a_cell_longer_than_a_block(version):
    layers = [make_layer(300, DIM, 0, (21, 21, 21, 21), (0, 1, 3))]
    values = [make_symbols(layers[0])]
    bins, layout = make_frame(layers)
    assert len(layout.blocks) > len(layout.cells)
    unpacked, _ = version("unpack_symbols")(
        bytes_on_device(pack_plainly(bins, values)),
        layout.cells,
        layout.blocks,
        layout.overflow,
        layout.coefficients,
        300,
    )
    assert torch.equal(unpacked, values[0])


def test_a_damaged_frame_is_reported_and_reads_nothing_outside(version):
    layers = [make_layer(17, DIM, 0, (20, 13, 9, 4))]
    values = [make_symbols(layers[0])]
    bins, layout = make_frame(layers)
    frame = bytes_on_device(pack_plainly(bins, values)[:-20])
    shape = layout.overflow, layout.coefficients, 17
    _, found = version("unpack_symbols")(frame, layout.cells, layout.blocks, *shape)
    assert int(found) * 2 == len(frame) + 20 - layout.overflow
    for wrong in (frame[:-1], frame[: layout.overflow - 2]):
        with pytest.raises(ValueError, match="overflow"):
            version("unpack_symbols")(wrong, layout.cells, layout.blocks, *shape)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NaN in the interpreter
def test_what_no_frame_can_hold_is_reported(version):
    layer = make_layer(17, DIM, 0, (20, 13, 9, 4))
    _, layout = make_frame([layer])
    x = predicted(layer).float()
    args = (*layer.classes, *layer.prediction, layer.forward, layer.inverse, 20, 0.4)
    for value in (float("nan"), float("inf"), -1e30, 1e6):
        far = x.clone()
        far[3, 2] = value
        quantized, _ = version("quantize_layer")(far, *args)
        tables = layout.cells, layout.blocks, layout.overflow
        *_, found = version("pack_symbols")(quantized, *tables)
        assert int(found[1]) > symbols.MOST


def test_impossible_tables_are_refused():
    with pytest.raises(ValueError, match="outside"):
        frame_layout([[(0, 0, 5, 0, 4)]], [1], [4], 4)
    with pytest.raises(ValueError, match="outside"):
        frame_layout([[(0, 2, 2, 0, 4)]], [1], [4], 4)
    with pytest.raises(ValueError, match="alphabet"):
        frame_layout([[]], [128], [4], 4)
    with pytest.raises(ValueError, match="int32"):
        frame_layout([[(0, 0, 1 << 16, 0, 1 << 16)]], [1], [1 << 16], 1 << 16)


# The transform.


@pytest.mark.parametrize("rank", [0, RANK])
@pytest.mark.parametrize(("tokens", "widths", "absent"), CASES)
def test_rebuilt_layer_against_float64(version, tokens, widths, absent, rank):
    layer = make_layer(tokens, DIM, rank, widths, absent)
    values = make_symbols(layer)
    x = version("rebuild_layer")(values, *layer.classes, *layer.prediction, layer.inverse)
    expected = predicted(layer).clone()
    for place, kind in enumerate(class_of(layer)):
        y = values[:, place].double() * float(layer.scales[kind])
        expected[layer.order[place]] += y @ layer.inverse.double()
    scale = float(expected.abs().max()) if tokens else 1.0
    torch.testing.assert_close(x / scale, (expected / scale).float(), **CLOSE)


@pytest.mark.parametrize("rank", [0, RANK])
@pytest.mark.parametrize(("tokens", "widths", "absent"), CASES)
def test_quantized_layer_against_float64(version, tokens, widths, absent, rank):
    layer = make_layer(tokens, DIM, rank, widths, absent)
    x = (predicted(layer) + torch.randn(tokens, DIM, device=DEVICE)).float()
    width, rounding = max(widths), 0.4
    maps = (layer.forward, layer.inverse)
    found, rebuilt = version("quantize_layer")(
        x, *layer.classes, *layer.prediction, *maps, width, rounding
    )
    assert found.shape == (width, tokens)
    residual = x.double() - predicted(layer)
    for place, kind in enumerate(class_of(layer)):
        y = residual[layer.order[place]] @ layer.forward.double() / float(layer.scales[kind])
        stored = found[:, place].double()
        assert not stored[widths[kind] :].any()
        stored, y = stored[: widths[kind]], y[: widths[kind]]
        whole = (y.abs() + rounding).floor() * y.sign()
        tie = (y.abs() + rounding - (y.abs() + rounding).round()).abs() < 1e-3
        assert torch.equal(stored[~tie], whole[~tie])
    again = version("rebuild_layer")(found, *layer.classes, *layer.prediction, layer.inverse)
    assert torch.equal(rebuilt, again)


@pytest.mark.parametrize(("tokens", "dim", "rank", "width"), [(70, 90, 40, 80), (65, 64, 33, 64)])
def test_several_tiles(version, tokens, dim, rank, width):
    layer = make_layer(tokens, dim, rank, (width, width - 20, width - 31, 3))
    values = make_symbols(layer)
    args = (values, *layer.classes, *layer.prediction, layer.inverse)
    expected = transform.rebuild_layer_reference(*args)
    scale = float(expected.abs().max())
    found = version("rebuild_layer")(*args)
    torch.testing.assert_close(found / scale, expected / scale, **CLOSE)
    x = expected + 0.05 * torch.randn(expected.shape, device=DEVICE)
    args = (*layer.classes, *layer.prediction, layer.forward, layer.inverse, width, 0.4)
    ours, _ = version("quantize_layer")(x, *args)
    theirs, _ = transform.quantize_layer_reference(x, *args)
    assert float((ours - theirs).abs().max()) <= 1
    assert float((ours != theirs).float().mean()) < 1e-3


def test_what_one_version_encodes_another_decodes(version):
    """Over many layers, each predicted from the rebuilt one below: errors must not grow."""
    ours = theirs = None
    for number in range(12):
        layer = make_layer(17, DIM, RANK if number else 0, (20, 13, 9, 4))
        layer = layer._replace(below=ours)
        x = (predicted(layer) + torch.randn(17, DIM, device=DEVICE)).float()
        maps = layer.forward, layer.inverse
        coded, ours = version("quantize_layer")(
            x, *layer.classes, *layer.prediction, *maps, 20, 0.4
        )
        maps = theirs, *layer.prediction[1:], layer.inverse
        theirs = transform.rebuild_layer_reference(coded, *layer.classes, *maps)
    torch.testing.assert_close(ours, theirs, **CLOSE)


# The pool.


def make_pool(heads: int, dims: tuple[int, int], dtype: torch.dtype, strided: bool):
    """Pools of 30 slots; strided ones are slices of something wider."""
    pools = []
    for dim in dims:
        one = torch.randn(30, 2 * heads, dim, device=DEVICE).to(dtype)
        pools.append(one[:, ::2] if strided else one[:, :heads].contiguous())
    return pools


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "heads", "dims", "half"),
    [
        (1, 1, (2, 2), 1),
        (17, 3, (8, 8), 4),
        (17, 2, (10, 6), 3),
        (5, 2, (4, 3), 0),
        (0, 1, (4, 4), 2),
    ],
)
@pytest.mark.parametrize("strided", [False, True])
def test_pool_rows_against_loops(version, tokens, heads, dims, half, dtype, strided):
    k_pool, v_pool = make_pool(heads, dims, dtype, strided)
    before = k_pool.clone(), v_pool.clone()
    rows = torch.randperm(30, device=DEVICE)[:tokens]
    angle = torch.rand(tokens, half, device=DEVICE) * 7
    cos, sin, scale = angle.cos(), angle.sin(), 1.25
    x = torch.randn(tokens, heads * sum(dims), device=DEVICE)
    version("scatter_layer")(x, rows, cos, sin, scale, k_pool, v_pool)
    # A pair is a complex number; RoPE turns and stretches it.
    k, v = x.split([heads * dims[0], heads * dims[1]], 1)
    k = k.unflatten(1, (heads, dims[0])).clone()
    pair = torch.complex(k[..., :half], k[..., half : 2 * half])
    pair = pair * torch.polar(torch.full_like(angle, scale), angle)[:, None]
    k[..., :half], k[..., half : 2 * half] = pair.real, pair.imag
    ulp = {torch.float32: 1e-5, torch.bfloat16: 0.008, torch.float16: 0.001}[dtype]
    torch.testing.assert_close(k_pool[rows].float(), k, rtol=ulp, atol=1e-5)
    v = v.unflatten(1, (heads, dims[1]))
    if version.truncates and dtype == torch.bfloat16:
        torch.testing.assert_close(v_pool[rows].float(), v, rtol=ulp, atol=1e-5)
    else:
        assert torch.equal(v_pool[rows], v.to(dtype))
    untouched = torch.ones(30, dtype=torch.bool, device=DEVICE)
    untouched[rows] = False
    assert torch.equal(k_pool[untouched], before[0][untouched])
    assert torch.equal(v_pool[untouched], before[1][untouched])

    back = version("gather_layer")(rows, cos, sin, scale, k_pool, v_pool)
    torch.testing.assert_close(back, x, rtol=2 * ulp, atol=4 * ulp)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_are_rounded_to_nearest_even(version, dtype):
    if version.truncates and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates")
    k_pool, v_pool = make_pool(1, (2, 64), dtype, False)
    step = torch.finfo(dtype).eps
    x = torch.cat([torch.zeros(2), 1 + step * torch.arange(64) / 4])[None].to(DEVICE)
    none = torch.zeros(1, 0, device=DEVICE)
    rows = torch.tensor([3], device=DEVICE)
    version("scatter_layer")(x, rows, none, none, 1.0, k_pool, v_pool)
    assert torch.equal(v_pool[3, 0], x[0, 2:].to(dtype))


def test_pools_that_do_not_fit_are_refused(version):
    k_pool, v_pool = make_pool(2, (4, 4), torch.float32, False)
    rows = torch.arange(3, device=DEVICE)
    turn = torch.zeros(3, 2, device=DEVICE)
    x = torch.zeros(3, 15, device=DEVICE)
    with pytest.raises(ValueError, match="pools"):
        version("scatter_layer")(x, rows, turn, turn, 1.0, k_pool, v_pool)
    with pytest.raises(ValueError, match="pools"):
        version("gather_layer")(rows, turn, turn, 1.0, k_pool, v_pool[:, :1])


# As custom ops.


@pytest.mark.parametrize("rank", [0, RANK])
def test_ops_are_well_behaved(rank):
    layer = make_layer(17, DIM, rank, (20, 13, 9, 0))
    values = make_symbols(layer)
    bins, layout = make_frame([layer])
    frame = bytes_on_device(pack_plainly(bins, [values]))
    tables = layout.cells, layout.blocks, layout.overflow
    k_pool, v_pool = make_pool(2, (8, 4), torch.bfloat16, False)
    turn = torch.rand(17, 3, device=DEVICE)
    rows = torch.randperm(30, device=DEVICE)[:17]
    x, wide = torch.randn(17, DIM, device=DEVICE), torch.randn(17, 24, device=DEVICE)
    maps = (layer.forward, layer.inverse)
    calls = [
        (packed.unpack_symbols, (frame, *tables, layout.coefficients, 17)),
        (packed.pack_symbols, (values, *tables)),
        (packed.rebuild_layer, (values, *layer.classes, *layer.prediction, layer.inverse)),
        (packed.quantize_layer, (x, *layer.classes, *layer.prediction, *maps, 20, 0.4)),
        (packed.scatter_layer, (wide, rows, turn, turn, 1.5, k_pool, v_pool)),
        (packed.gather_layer, (rows, turn, turn, 1.5, k_pool, v_pool)),
    ]
    for op, args in calls:
        torch.library.opcheck(op, args)
