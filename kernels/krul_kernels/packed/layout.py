"""Where the symbols of a frame lie: small int32 tables that a kernel can look up.

A frame holds one run of packed bytes a bin (symbols of similar spread, one alphabet).
A bin's symbols are cells one after the other: coefficients ``first .. last`` of one
layer for the tokens of one class, coefficient-major. Symbol ``p * bytes + j`` of a bin
of ``bytes`` bytes is place ``p`` of byte ``j`` in base ``2 * largest + 1``, so
consecutive symbols lie in consecutive bytes. Behind the bins come the overflow entries,
all low bytes, then all high bytes: one for each symbol at an end of its alphabet, in the
order of the symbols.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

COLUMNS = ("byte", "bytes", "symbol", "largest", "rows", "columns", "target")
"""Of the table of cells. The bin lies at ``byte``, ``bytes`` long; ``symbol`` is the
cell's first one within the bin; the cell has ``rows`` coefficients of ``columns`` tokens,
the first at ``target`` of the flat symbol matrix."""
BLOCK = 1024
"""Symbols of a cell that one program of a kernel handles."""


@dataclass(frozen=True)
class FrameLayout:
    """Tables of one frame, all on one device.

    cells: int32 ``[cells, len(COLUMNS)]``, in the order of the symbols.
    blocks: int32 ``[blocks, 2]``: cell and first symbol within it of each :data:`BLOCK`.
    overflow: byte of the frame where the bins end and overflow begins.
    coefficients: rows of the symbol matrix, the widths of all layers together.
    tokens: its columns.
    """

    cells: torch.Tensor
    blocks: torch.Tensor
    overflow: int
    coefficients: int
    tokens: int

    def to(self, device: torch.device | str) -> FrameLayout:
        """The same tables on ``device``; asynchronous only from pinned memory."""
        return FrameLayout(
            self.cells.to(device, non_blocking=True),
            self.blocks.to(device, non_blocking=True),
            self.overflow,
            self.coefficients,
            self.tokens,
        )


def share_of(largest: int) -> int:
    """How many digits of base ``2 * largest + 1`` go into a byte."""
    share, values = 0, 2 * largest + 1
    while values <= 256:
        share, values = share + 1, values * (2 * largest + 1)
    return share


def frame_layout(
    bins: Sequence[Sequence[tuple[int, int, int, int, int]]],
    largest: Sequence[int],
    widths: Sequence[int],
    tokens: int,
    byte: int = 0,
) -> FrameLayout:
    """The tables of a frame, on the host.

    bins: per bin its cells ``(layer, first, last, begin, end)``, none empty: coefficients
        ``first .. last`` of the tokens ``begin .. end`` as they are sorted by class.
    largest: per bin, symbols are ``-largest .. largest``; at most 127.
    widths: coefficients of each layer of the frame; ``layer`` counts within the frame.
    byte: where the first bin begins in the frame.

    Raises ValueError for cells outside the symbol matrix, and for more symbols or bytes
    than int32 counts.
    """
    offsets = list(accumulate(widths, initial=0))
    table: list[tuple[int, ...]] = []
    for cells, limit in zip(bins, largest, strict=True):
        if not 0 < limit <= 127:
            raise ValueError(f"an alphabet of {limit} on either side of 0")
        sizes = [(last - first) * (end - begin) for _, first, last, begin, end in cells]
        firsts = accumulate(sizes, initial=0)
        length = -(-sum(sizes) // share_of(limit))
        for (layer, first, last, begin, end), symbol in zip(cells, firsts, strict=False):
            if not (0 <= first < last <= widths[layer] and 0 <= begin < end <= tokens):
                raise ValueError(f"cell {(layer, first, last, begin, end)} outside its layer")
            target = (offsets[layer] + first) * tokens + begin
            table.append((byte, length, symbol, limit, last - first, end - begin, target))
        byte += length
    rows = np.array(table, np.int64).reshape(len(table), len(COLUMNS))
    symbols = rows[:, 4] * rows[:, 5]
    if max(byte, offsets[-1] * tokens, int(symbols.sum())) > np.iinfo(np.int32).max:
        raise ValueError("more symbols than int32 counts")
    blocks = -(-symbols // BLOCK)
    cell = np.repeat(np.arange(len(rows)), blocks)
    within = np.arange(len(cell)) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    return FrameLayout(
        torch.from_numpy(rows.astype(np.int32)),
        torch.from_numpy(np.stack([cell, within * BLOCK], 1).astype(np.int32)),
        byte,
        offsets[-1],
        tokens,
    )
