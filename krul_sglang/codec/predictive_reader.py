"""Reading what :mod:`krul_sglang.codec.predictive` wrote: several runs at once, cut anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import zstandard

from krul_sglang.codec.base import (
    CodecError,
    Description,
    Part,
    Payload,
    SegmentReader,
    StoredLayer,
)
from krul_sglang.codec.frames import by_layer, open_frame, open_head, shares, unpack_payload
from krul_sglang.codec.layout import (
    EXPANSION,
    FACTORS,
    Cell,
    Plan,
    cells_of,
    groups_of,
    slabs_of,
    unpack_classes,
)
from krul_sglang.codec.symbols import ALPHABETS, saturated, unpack
from krul_sglang.strategy.base import SINKS

if TYPE_CHECKING:
    from krul_sglang.codec.predictive import PredictiveCodec


FIELDS = {"profile": str, "step": float, "sizes": list, "shared": list, "errors": bytes}
"""The codec's own header fields. sizes: bytes of each frame once decompressed. shared: the layers
that are dropped. errors: float32 of each layer, see :class:`StoredLayer`."""


class _Coded(NamedTuple):
    """A layer of some tokens as it is stored: the tokens sorted by class, how many of each
    class there are, and symbols ``[width, tokens]`` float32 in that order."""

    order: np.ndarray
    of_class: np.ndarray
    symbols: np.ndarray


def _side_by_side(parts: Sequence[_Coded]) -> _Coded:
    """One run's tokens after the other's, again sorted by class."""
    offsets = accumulate((len(part.order) for part in parts), initial=0)
    slabs = [
        (c, part.order[begin:end] + offset, part.symbols[:, begin:end])
        for offset, part in zip(offsets, parts, strict=False)
        for c, begin, end in slabs_of(part.of_class)
    ]
    slabs.sort(key=lambda slab: slab[0])
    return _Coded(
        np.concatenate([order for _, order, _ in slabs]) if slabs else parts[0].order,
        np.sum([part.of_class for part in parts], axis=0),
        np.concatenate([symbols for *_, symbols in slabs], 1) if slabs else parts[0].symbols,
    )


class PredictiveReader(SegmentReader):
    """Reads group by group; every iterator has its own decompressor and state."""

    def __init__(self, payload: Payload, codec: PredictiveCodec) -> None:
        spec = codec.spec
        header, frames = unpack_payload(payload, codec.name, spec, FIELDS)
        if header["profile"] != codec.profile.id:
            raise CodecError(f"written with profile {header['profile'][:16]!r}, not this one")
        step: float = header["step"]
        if not 1e-30 < step < 1e30:
            raise CodecError("step out of range")
        self._spec, self._profile, self._step = spec, codec.profile, step
        self._plans = codec.plans
        self._shared = tuple(header["shared"])
        if len(self._shared) > spec.layers or any(type(n) is not int for n in self._shared):
            raise CodecError("the list of shared layers is none")
        self.tokens: int = header["tokens"]
        self.start: int = header["start"]
        self._skip = min(self.tokens, max(0, SINKS - self.start))
        self._coded = self.tokens - self._skip
        if len(header["errors"]) != (4 * spec.layers if self._coded else 0):
            raise CodecError("number of errors differs from what the shape implies")
        self._errors = np.frombuffer(header["errors"], "<f4")
        if not (np.isfinite(self._errors) & (self._errors >= 0)).all():
            raise CodecError("an error is negative or no number")
        self._groups = groups_of(spec.layers, self._coded * spec.layer_scalars)
        self._payload_bytes = len(payload)
        self._frames, self._sizes = frames[1:], header["sizes"]
        if len(self._frames) != len(self._groups) or len(self._sizes) != len(self._groups):
            raise CodecError("number of frames differs from what the shape implies")
        for (a, b), frame, size in zip(self._groups, self._frames, self._sizes, strict=True):
            least = (b - a) * -(-self._coded // 4)
            if type(size) is not int or not least <= size <= EXPANSION * len(frame):
                raise CodecError("a frame's size differs from what the shape allows")
        self._sink_codec, self._sink_frame = codec._sinks, frames[0]
        if not self._skip:
            if len(frames[0]):
                raise CodecError("sink tokens where there are none")
            self.batch_key = (step, self._shared)

    def _open_sinks(self) -> SegmentReader:
        """The leading tokens that are stored exactly."""
        sinks = self._sink_codec.open(bytes(self._sink_frame))
        if (sinks.tokens, sinks.start) != (self._skip, self.start):
            raise CodecError("the sink tokens are not those the header implies")
        return sinks

    def layer_bytes(self) -> list[int]:
        """See :class:`SegmentReader`."""
        sizes = [len(frame) for frame in self._frames]
        return by_layer(self._spec.layers, self._payload_bytes, self._groups, sizes)

    def describe(self) -> Description:
        """See :class:`SegmentReader`; the sink tokens are in no class."""
        layers = self._stored_layers()
        if self._skip:
            exact = self._open_sinks().describe().layers
            layers = [
                replace(
                    own,
                    nbytes=own.nbytes + sinks.nbytes,
                    in_shared_frame=own.in_shared_frame or sinks.in_shared_frame,
                )
                for own, sinks in zip(layers, exact, strict=True)
            ]
        header_bytes = self._payload_bytes - sum(layer.nbytes for layer in layers)
        return Description(header_bytes, tuple(layers), self._step, FACTORS)

    def _stored_layers(self) -> list[StoredLayer]:
        """Every layer without its sink tokens."""
        errors = self._errors.tolist() or [None] * self._spec.layers
        plans = self._plans(self._step, self._shared)
        decompressor = zstandard.ZstdDecompressor()
        out: list[StoredLayer] = []
        for (a, b), frame, size in zip(self._groups, self._frames, self._sizes, strict=True):
            head = open_head(decompressor, frame, size, (b - a) * -(-self._coded // 4))
            classes = self._classes(head, b - a)
            counts = [np.bincount(own, minlength=len(FACTORS)) for own in classes]
            packed = [plan.packed(count) for plan, count in zip(plans[a:b], counts, strict=True)]
            parts = shares(len(frame), packed)
            for layer, nbytes, count in zip(range(a, b), parts, counts, strict=True):
                out.append(
                    StoredLayer(
                        nbytes,
                        in_shared_frame=b - a > 1,
                        reference=layer - 1 if layer else None,
                        dropped=layer in self._shared,
                        error=errors[layer],
                        classes=tuple(count.tolist()),
                    )
                )
        return out

    def layers(self, lo: int, hi: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Layers in order; see :class:`SegmentReader`."""
        if not 0 <= lo <= hi <= self.tokens:
            raise ValueError(f"tokens [{lo}, {hi}) are not within [0, {self.tokens})")
        return self.layers_of([Part(self, lo, hi)])

    @torch.no_grad()
    def layers_of(self, parts: Sequence[Part]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Parts that were all encoded at this step; only a single one has sink tokens."""
        spec, dtype = self._spec, getattr(torch, self._spec.dtype)
        coded, tables = [], []
        for reader, lo, hi in parts:
            assert isinstance(reader, PredictiveReader)
            first, last = max(0, lo - reader._skip), max(0, hi - reader._skip)
            coded.append(reader._coefficients(first, last))
            begin = reader.start + reader._skip + first
            tables.append(self._profile.rope.tables(begin, last - first))
        cos, sin = (torch.cat(list(one)) for one in zip(*tables, strict=True))
        sinks = None
        if self._skip:
            (_, lo, hi), *_ = parts
            sinks = self._open_sinks().layers(min(lo, self._skip), min(hi, self._skip))
        keys = spec.kv_heads * spec.head_dim
        for x in self._rebuild(coded):
            k = x[:, :keys].unflatten(1, (spec.kv_heads, spec.head_dim))
            k = self._profile.rope.apply(k, (cos, sin)).to(dtype)
            v = x[:, keys:].unflatten(1, (spec.kv_heads, spec.v_head_dim)).to(dtype, copy=True)
            if sinks is not None:
                sink_k, sink_v = next(sinks)
                k, v = torch.cat([sink_k.to(dtype), k]), torch.cat([sink_v.to(dtype), v])
            yield k, v

    def _rebuild(self, parts: Sequence[Iterator[_Coded]]) -> Iterator[torch.Tensor]:
        """float32 ``[tokens, dim]`` of each layer, keys before RoPE."""
        rows: torch.Tensor | None = None
        place = torch.arange(0)  # where the tokens of ``rows`` are
        for plan, layers in zip(
            self._plans(self._step, self._shared), zip(*parts, strict=True), strict=True
        ):
            coded = layers[0] if len(layers) == 1 else _side_by_side(layers)
            index = torch.from_numpy(coded.order)
            rows = plan.maps.predict(rows, place[index] if rows is not None else index)
            y = torch.from_numpy(coded.symbols).T
            for c, begin, end in slabs_of(coded.of_class):
                width, scale = plan.widths[c], self._step * FACTORS[c]
                inverse = plan.maps.inverse[:width]
                rows[begin:end].addmm_(y[begin:end, :width], inverse, alpha=scale)
            place = torch.empty_like(index)
            place[index] = torch.arange(len(index))
            yield rows[place]

    def _coefficients(self, lo: int, hi: int) -> Iterator[_Coded]:
        """What is stored of tokens ``lo .. hi`` (behind the sinks), layer by layer."""
        plans = self._plans(self._step, self._shared)
        decompressor = zstandard.ZstdDecompressor()
        for (a, b), frame, size in zip(self._groups, self._frames, self._sizes, strict=True):
            raw = open_frame(decompressor, frame, size)
            classes = self._classes(raw, b - a)
            at = (b - a) * -(-self._coded // 4)
            coefficients = self._symbols(plans[a:b], classes, raw, at)
            for own, symbols in zip(classes, coefficients, strict=True):
                order = np.argsort(own, kind="stable")
                count = np.bincount(own[lo:hi], minlength=len(FACTORS))
                if (lo, hi) != (0, self._coded):
                    chosen = np.flatnonzero((order >= lo) & (order < hi))
                    order, symbols = order[chosen] - lo, np.ascontiguousarray(symbols[:, chosen])
                yield _Coded(order, count, symbols)

    def _classes(self, raw: bytes, layers: int) -> list[np.ndarray]:
        """The token classes that a group's frame begins with, uint8 ``[tokens]`` a layer."""
        packed = -(-self._coded // 4)
        return [
            unpack_classes(np.frombuffer(raw, np.uint8, packed, i * packed), self._coded)
            for i in range(layers)
        ]

    def _symbols(
        self, plans: Sequence[Plan], classes: Sequence[np.ndarray], raw: bytes, at: int
    ) -> list[np.ndarray]:
        """Symbols ``[width, tokens by class]`` float32 of a group's layers."""
        counts = [np.bincount(own, minlength=len(FACTORS)) for own in classes]
        bins: list[tuple[np.ndarray, list[Cell], np.ndarray, np.ndarray]] = []
        for alphabet, cells in zip(ALPHABETS, cells_of(plans, counts), strict=True):
            total = sum(cell.symbols for cell in cells)
            size = alphabet.packed(total)
            if at + size > len(raw):
                raise CodecError("a frame holds fewer symbols than its shape implies")
            symbols = unpack(raw[at : at + size], total, alphabet)
            at += size
            edge = saturated(symbols, alphabet)
            sign = np.where(symbols[edge] == 0, np.float32(-1), np.float32(1))
            values = np.subtract(symbols, np.float32(alphabet.largest), dtype=np.float32)
            bins.append((values, cells, edge, sign))
        over = sum(len(edge) for _, _, edge, _ in bins)
        if len(raw) - at != 2 * over:
            raise CodecError("a frame's overflow differs from what its symbols imply")
        extra = np.frombuffer(raw, np.uint8, over, at).astype(np.float32)
        extra += np.frombuffer(raw, np.uint8, over, at + over).astype(np.float32) * 256
        out = [np.zeros((plan.width, self._coded), np.float32) for plan in plans]
        for values, cells, edge, sign in bins:
            values[edge] += extra[: len(edge)] * sign
            extra = extra[len(edge) :]
            begin = 0
            for layer, first, last, left, right in cells:
                end = begin + (last - first) * (right - left)
                slab = values[begin:end].reshape(last - first, right - left)
                out[layer][first:last, left:right] = slab
                begin = end
        return out
