"""Small integers to packed bytes with overflow, and back; a frame at a time.

A whole frame, because the overflow entry of a symbol is found by counting the symbols at
an end of their alphabet before it, over all layers. The unpacked symbols are int32 and
not fused into the transform: unpacking costs divisions, and every tile of columns of the
transform would repeat them.
"""

from __future__ import annotations

from typing import Any

import torch

MOST = 0xFFFF
"""Highest overflow entry; :func:`pack_symbols` reports what exceeds it."""


def unpack_symbols_reference(
    frame: torch.Tensor,
    cells: torch.Tensor,
    blocks: torch.Tensor,
    overflow: int,
    coefficients: int,
    tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Symbols of all layers of a frame, and how many overflow entries they imply.

    frame: uint8 ``[bytes]``, zstd undone. cells, blocks, overflow, coefficients, tokens:
        a :class:`~krul_kernels.packed.layout.FrameLayout`'s.

    Returns int32 ``[coefficients, tokens]``, 0 where nothing is stored, and an int64
    scalar. Where that is not ``(bytes - overflow) / 2``, the frame is damaged and the
    symbols are meaningless; the caller compares once it waits for the device anyway.
    Raises ValueError where the frame has no room for its bins, or an odd overflow.
    """
    entries = _entries(frame, overflow)
    low, high = frame[overflow:].view(2, entries).int()
    extra = torch.cat([low + 256 * high, low.new_zeros(1)])
    out = torch.zeros(coefficients, tokens, dtype=torch.int32, device=frame.device)
    found = torch.zeros((), dtype=torch.int64, device=frame.device)
    for byte, length, symbol, largest, rows, columns, target in cells.tolist():
        base = 2 * largest + 1
        index = torch.arange(symbol, symbol + rows * columns, device=frame.device)
        digits = frame[byte + index % length].int()
        digits = digits // base ** (index // length).int() % base - largest
        edge = digits.abs() == largest
        rank = found + edge.cumsum(0) - 1
        more = extra[rank.clamp(max=entries)] * edge
        digits = torch.where(digits < 0, digits - more, digits + more)
        out.as_strided((rows, columns), (tokens, 1), target).copy_(digits.view(rows, columns))
        found += edge.sum()
    return out, found


def pack_symbols_reference(
    symbols: torch.Tensor, cells: torch.Tensor, blocks: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The packed bins of a frame and its overflow entries.

    symbols: int32 ``[coefficients, tokens]``. cells, blocks: as for
        :func:`unpack_symbols_reference`. size: the layout's ``overflow``.

    Returns

    * uint8 ``[size]``, 0 in front of the first bin, where other things may go;
    * uint8 ``[2, coefficients * tokens]``: low and high bytes of the overflow entries, only
      the first ``found[0]`` of which belong to the frame, the others are 0;
    * ``found``, int64 ``[2]``: how many entries, and the highest. Above :data:`MOST` a
      value was too far from its prediction, and the result must be thrown away.
    """
    device = symbols.device
    packed = torch.zeros(size, dtype=torch.int32, device=device)
    extras = [torch.zeros(0, dtype=torch.int32, device=device)]
    for byte, length, symbol, largest, rows, columns, target in cells.tolist():
        base = 2 * largest + 1
        index = torch.arange(symbol, symbol + rows * columns, device=device)
        values = symbols.as_strided((rows, columns), (symbols.shape[1], 1), target).reshape(-1)
        clipped = values.clamp(-largest, largest)
        digits = (clipped + largest) * base ** (index // length).int()
        packed.index_add_(0, byte + index % length, digits)
        extras.append((values - clipped).abs()[clipped.abs() == largest])
    extra = torch.cat(extras)
    over = torch.zeros(2, symbols.numel(), dtype=torch.uint8, device=device)
    over[0, : len(extra)] = extra & 0xFF
    over[1, : len(extra)] = extra >> 8 & 0xFF
    highest = torch.cat([extra, extra.new_zeros(1)]).amax().long()
    found = torch.stack([torch.full_like(highest, len(extra)), highest])
    return packed.to(torch.uint8), over, found


def _entries(frame: torch.Tensor, overflow: int) -> int:
    entries, odd = divmod(len(frame) - overflow, 2)
    if entries < 0 or odd:
        raise ValueError(f"{len(frame)} bytes do not hold {overflow} and whole overflow entries")
    return entries


@torch.library.custom_op("krul_kernels::unpack_symbols", mutates_args=(), device_types="cpu")
def unpack_symbols(
    frame: torch.Tensor,
    cells: torch.Tensor,
    blocks: torch.Tensor,
    overflow: int,
    coefficients: int,
    tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`unpack_symbols_reference` on a CPU, its Triton version on a GPU."""
    return unpack_symbols_reference(frame, cells, blocks, overflow, coefficients, tokens)


@unpack_symbols.register_kernel("cuda")
def _(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    from krul_kernels.packed.symbols_triton import unpack_symbols_triton

    with torch.cuda.device_of(args[0]):
        return unpack_symbols_triton(*args)


@unpack_symbols.register_fake
def _(
    frame: torch.Tensor,
    cells: torch.Tensor,
    blocks: torch.Tensor,
    overflow: int,
    coefficients: int,
    tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = frame.new_empty((coefficients, tokens), dtype=torch.int32)
    return out, frame.new_empty((), dtype=torch.int64)


@torch.library.custom_op("krul_kernels::pack_symbols", mutates_args=(), device_types="cpu")
def pack_symbols(
    symbols: torch.Tensor, cells: torch.Tensor, blocks: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`pack_symbols_reference` on a CPU, its Triton version on a GPU."""
    return pack_symbols_reference(symbols, cells, blocks, size)


@pack_symbols.register_kernel("cuda")
def _(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from krul_kernels.packed.symbols_triton import pack_symbols_triton

    with torch.cuda.device_of(args[0]):
        return pack_symbols_triton(*args)


@pack_symbols.register_fake
def _(
    symbols: torch.Tensor, cells: torch.Tensor, blocks: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    over = symbols.new_empty((2, symbols.numel()), dtype=torch.uint8)
    return (
        symbols.new_empty(size, dtype=torch.uint8),
        over,
        symbols.new_empty(2, dtype=torch.int64),
    )
