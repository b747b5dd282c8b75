"""Random layers and frames for the packed kernels, and a slow, plain numpy packing of them."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from krul_kernels.packed import FrameLayout, frame_layout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGEST, SHARES = (1, 2, 7, 127), (5, 3, 2, 1)


class Layer(NamedTuple):
    """Arguments that the ops of a layer share, on :data:`DEVICE`."""

    order: torch.Tensor
    ends: torch.Tensor
    widths: torch.Tensor
    scales: torch.Tensor
    below: torch.Tensor | None
    bias: torch.Tensor
    down: torch.Tensor
    up: torch.Tensor
    forward: torch.Tensor
    inverse: torch.Tensor

    @property
    def classes(self) -> tuple[torch.Tensor, ...]:
        return self.order, self.ends, self.widths, self.scales

    @property
    def prediction(self) -> tuple[torch.Tensor | None, ...]:
        return self.below, self.bias, self.down, self.up


def make_layer(
    tokens: int, dim: int, rank: int, widths: tuple[int, ...], absent: tuple[int, ...] = ()
) -> Layer:
    """A layer of random maps; no token is of a class in ``absent``; rank 0: the lowest."""
    gen = torch.Generator().manual_seed(tokens * 1000 + dim + rank)
    present = [c for c in range(len(widths)) if c not in absent]
    kinds = torch.tensor(present)[torch.randint(len(present), (tokens,), generator=gen)]
    square = torch.linalg.qr(torch.randn(dim, dim, generator=gen))[0]
    stored = max(widths)
    layer = Layer(
        kinds.argsort(stable=True),
        kinds.bincount(minlength=len(widths)).cumsum(0).int(),
        torch.tensor(widths, dtype=torch.int32),
        torch.tensor([0.1 * 1.5**c for c in range(len(widths))]),
        torch.randn(tokens, dim, generator=gen) if rank else None,
        torch.randn(dim, generator=gen),
        torch.randn(dim, rank, generator=gen) / dim**0.5,
        torch.randn(rank, dim, generator=gen) / max(1, rank) ** 0.5,
        square[:, :stored].contiguous(),
        square.T[:stored].contiguous(),
    )
    return Layer(*(one if one is None else one.to(DEVICE) for one in layer))


def make_symbols(layer: Layer, seed: int = 0) -> torch.Tensor:
    """int32 ``[width, tokens]``, mostly small, some huge, 0 where a class stores none."""
    gen = torch.Generator().manual_seed(seed)
    width, tokens = int(layer.widths.max()), len(layer.order)
    symbols = (torch.randn(width, tokens, generator=gen) * 2).round().int()
    huge = torch.rand(width, tokens, generator=gen) < 0.02
    symbols[huge] *= 9000
    ends, widths = layer.ends.tolist(), layer.widths.tolist()
    for begin, end, stored in zip([0, *ends], ends, widths, strict=False):
        symbols[stored:, begin:end] = 0
    return symbols.to(DEVICE)


def make_frame(layers: list[Layer], byte: int = 0) -> tuple[list[list], FrameLayout]:
    """Cells and tables of a frame of these layers: each class's coefficients are spread over
    the four alphabets, the widest alphabet first."""
    bins: list[list[tuple[int, int, int, int, int]]] = [[] for _ in LARGEST]
    for number, layer in enumerate(layers):
        ends = [0, *layer.ends.tolist()]
        for c, width in enumerate(layer.widths.tolist()):
            cuts = [width * part // 7 for part in (7, 4, 2, 1, 0)]
            for b, cells in enumerate(bins):
                if cuts[b] > cuts[b + 1] and ends[c + 1] > ends[c]:
                    cells.append((number, cuts[b + 1], cuts[b], ends[c], ends[c + 1]))
    widths = [int(layer.widths.max()) for layer in layers]
    layout = frame_layout(bins, LARGEST, widths, len(layers[0].order), byte)
    return bins, layout.to(DEVICE)


def pack_plainly(bins: list[list], symbols: list[torch.Tensor]) -> bytes:
    """The bytes of a frame from :func:`make_frame`, a digit at a time."""
    arrays = [one.cpu().numpy() for one in symbols]
    packed, over = bytearray(), []
    for cells, largest, share in zip(bins, LARGEST, SHARES, strict=True):
        flat = [
            int(arrays[layer][row, column])
            for layer, first, last, begin, end in cells
            for row in range(first, last)
            for column in range(begin, end)
        ]
        length = -(-len(flat) // share)
        digits = [min(max(value, -largest), largest) + largest for value in flat]
        digits += [0] * (length * share - len(flat))
        for j in range(length):
            packed.append(
                sum(digits[p * length + j] * (2 * largest + 1) ** p for p in range(share))
            )
        over += [abs(value) - largest for value in flat if abs(value) >= largest]
    extra = np.array(over, np.int64)
    return bytes(packed) + bytes((extra & 0xFF).tolist()) + bytes((extra >> 8).tolist())


def matrices(symbols: torch.Tensor, layers: list[Layer]) -> list[torch.Tensor]:
    """A frame's symbols, layer by layer."""
    ends = list(accumulate(int(layer.widths.max()) for layer in layers))
    return [symbols[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
