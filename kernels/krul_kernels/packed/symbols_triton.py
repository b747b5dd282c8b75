"""Triton versions of :mod:`krul_kernels.packed.symbols`.

Two passes over the symbols with a running sum between them: how many overflow entries
each block has says where the entries of the next block begin.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from krul_kernels.packed.layout import BLOCK, COLUMNS
from krul_kernels.packed.symbols import _entries

_FIELDS = tl.constexpr(len(COLUMNS))


@triton.jit
def _place(cells, blocks, tokens, BLOCK: tl.constexpr):
    """Of each symbol of this program's block: byte, what its digit counts there, where it
    is in the symbol matrix, and whether it exists; and the largest of its alphabet."""
    block = tl.program_id(0)
    cell = cells + tl.load(blocks + 2 * block) * _FIELDS
    byte = tl.load(cell)
    length = tl.load(cell + 1)
    largest = tl.load(cell + 3)
    rows = tl.load(cell + 4)
    columns = tl.load(cell + 5)
    index = tl.load(blocks + 2 * block + 1) + tl.arange(0, BLOCK)
    valid = index < rows * columns
    target = tl.load(cell + 6) + index // columns * tokens + index % columns
    symbol = tl.load(cell + 2) + index
    place = symbol // length
    weight = tl.full([BLOCK], 1, tl.int32)
    for passed in tl.static_range(1, 5):  # five digits a byte at most
        weight = tl.where(place >= passed, weight * (2 * largest + 1), weight)
    return byte + symbol % length, weight, target, valid, largest


@triton.jit
def _digit(frame, byte, weight, valid, largest):
    value = tl.load(frame + byte, mask=valid, other=0).to(tl.int32)
    return value // weight % (2 * largest + 1) - largest


@triton.jit
def _count_packed(frame, cells, blocks, counts, tokens, BLOCK: tl.constexpr):
    byte, weight, _, valid, largest = _place(cells, blocks, tokens, BLOCK)
    edge = valid & (tl.abs(_digit(frame, byte, weight, valid, largest)) == largest)
    tl.store(counts + tl.program_id(0), tl.sum(edge.to(tl.int32), 0))


@triton.jit
def _unpack(frame, cells, blocks, before, out, overflow, entries, tokens, BLOCK: tl.constexpr):
    byte, weight, target, valid, largest = _place(cells, blocks, tokens, BLOCK)
    digit = _digit(frame, byte, weight, valid, largest)
    edge = valid & (tl.abs(digit) == largest)
    rank = tl.load(before + tl.program_id(0)) + tl.cumsum(edge.to(tl.int32), 0) - 1
    known = edge & (rank < entries)  # all, but in a damaged frame
    low = tl.load(frame + overflow + rank, mask=known, other=0).to(tl.int32)
    high = tl.load(frame + overflow + entries + rank, mask=known, other=0).to(tl.int32)
    extra = low + high * 256
    tl.store(out + target, tl.where(digit < 0, digit - extra, digit + extra), mask=valid)


@triton.jit
def _count_symbols(symbols, cells, blocks, counts, tokens, BLOCK: tl.constexpr):
    _, _, target, valid, largest = _place(cells, blocks, tokens, BLOCK)
    value = tl.load(symbols + target, mask=valid, other=0)
    edge = valid & (tl.abs(value) >= largest)
    tl.store(counts + tl.program_id(0), tl.sum(edge.to(tl.int32), 0))


@triton.jit
def _pack(symbols, cells, blocks, before, words, low, high, highest, tokens, BLOCK: tl.constexpr):
    byte, weight, target, valid, largest = _place(cells, blocks, tokens, BLOCK)
    value = tl.load(symbols + target, mask=valid, other=0)
    clipped = tl.minimum(tl.maximum(value, -largest), largest)
    # A byte's digits come from different programs. They never carry into the next byte,
    # so adding them to the word in any order gives the same bits.
    digit = ((clipped + largest) * weight) << (byte % 4 * 8)
    tl.atomic_add(words + byte // 4, digit, mask=valid, sem="relaxed")
    edge = valid & (tl.abs(clipped) == largest)
    extra = tl.abs(value - clipped)
    rank = tl.load(before + tl.program_id(0)) + tl.cumsum(edge.to(tl.int32), 0) - 1
    tl.store(low + rank, (extra & 0xFF).to(tl.uint8), mask=edge)
    tl.store(high + rank, (extra >> 8 & 0xFF).to(tl.uint8), mask=edge)
    tl.store(highest + tl.program_id(0), tl.max(tl.where(edge, extra, 0), 0))


def unpack_symbols_triton(
    frame: torch.Tensor,
    cells: torch.Tensor,
    blocks: torch.Tensor,
    overflow: int,
    coefficients: int,
    tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`krul_kernels.packed.symbols.unpack_symbols_reference` on a GPU."""
    entries = _entries(frame, overflow)
    frame = frame.contiguous()
    out = torch.zeros(coefficients, tokens, dtype=torch.int32, device=frame.device)
    counts = torch.zeros(len(blocks), dtype=torch.int32, device=frame.device)
    if len(blocks):
        grid = (len(blocks),)
        _count_packed[grid](frame, cells, blocks, counts, tokens, BLOCK)
        before = counts.cumsum(0, dtype=torch.int32) - counts
        _unpack[grid](frame, cells, blocks, before, out, overflow, entries, tokens, BLOCK)
    return out, counts.sum()


def pack_symbols_triton(
    symbols: torch.Tensor, cells: torch.Tensor, blocks: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`krul_kernels.packed.symbols.pack_symbols_reference` on a GPU."""
    symbols, tokens = symbols.contiguous(), symbols.shape[1]
    words = torch.zeros(-(-size // 4), dtype=torch.int32, device=symbols.device)
    over = torch.zeros(2, symbols.numel(), dtype=torch.uint8, device=symbols.device)
    counts = torch.zeros(len(blocks), dtype=torch.int32, device=symbols.device)
    highest = torch.zeros(len(blocks) + 1, dtype=torch.int32, device=symbols.device)
    if len(blocks):
        grid = (len(blocks),)
        _count_symbols[grid](symbols, cells, blocks, counts, tokens, BLOCK)
        before = counts.cumsum(0, dtype=torch.int32) - counts
        _pack[grid](symbols, cells, blocks, before, words, over[0], over[1], highest, tokens, BLOCK)
    found = torch.stack([counts.sum(), highest.amax().long()])
    # Words are little-endian wherever Triton runs. The clone cuts off the last word's rest.
    return words.view(torch.uint8)[:size].clone(), over, found
