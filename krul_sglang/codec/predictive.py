"""The default lossy codec: each layer predicted from the rebuilt layer below.

Keys and values of neighbouring layers are far apart as vectors and close under a
calibrated linear map. So a layer is stored as what the map of the *rebuilt* layer
below leaves over, in the principal axes of the importance metric, quantized with
one step for all layers (the metric carries their sensitivities) times a factor for
the token's class. Nothing links one token to another: a run can be cut anywhere.

Frames: the exact sink tokens (a lossless payload, or empty), then one zstd frame a
group of layers: token classes, symbols bin by bin, overflow (low bytes, high bytes).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import torch
import zstandard

from krul_sglang.codec.base import Codec, CodecError, KVRun, KVSpec, Part, SegmentReader
from krul_sglang.codec.frames import open_frame, pack_payload, unpack_payload
from krul_sglang.codec.guard import Measured, guarded
from krul_sglang.codec.layout import (
    FACTORS,
    Cell,
    Plan,
    cells_of,
    groups_of,
    pack_classes,
    plans_of,
    unpack_classes,
)
from krul_sglang.codec.lossless import LosslessCodec, check_run, huffman_compressor
from krul_sglang.codec.symbols import ALPHABETS, pack, saturated, unpack
from krul_sglang.strategy.base import EXACT

if TYPE_CHECKING:
    from krul_sglang.profile.base import LayerMaps, Profile
    from krul_sglang.strategy.base import Strategy

SINKS = 4
"""Tokens at the start of a sequence that are kept at 16 bits: attention sinks."""
ROUNDING = 0.4
"""Dead zone: less than this share of a step rounds up; saves 5 % at equal divergence."""
STRENGTH = 0.4
"""How far a step follows 1/sqrt(importance), whose exponent would be 0.5: the guess
of a token's importance explains 40 % of its variance."""
MEASURED_TOKENS = 128
"""About how many tokens of a run the guard looks at."""
FARTHEST = 16.0
"""What a token's distance counts at most: one odd token does not make a text unlike."""
EXPANSION = 512
"""A frame may hold at most this many times its length; what packs better is no KV."""


class PredictiveCodec(Codec):
    """Lossy; ``encode`` raises ValueError for KV it cannot hold (NaN, Inf, far outliers)."""

    name: ClassVar[str] = "predictive"
    exact: ClassVar[bool] = False

    def __init__(self, spec: KVSpec, profile: Profile) -> None:
        """Raises :class:`~krul_sglang.profile.base.ProfileError` on another shape's profile."""
        super().__init__(spec)
        profile.check_spec(spec)
        self.profile = profile
        # A server uses a few steps; drawing up their plans costs more than a short run.
        self.plans = lru_cache(16)(partial(plans_of, profile))
        sinks = "bfloat16" if spec.dtype == "float32" else spec.dtype
        self._sinks = LosslessCodec(
            KVSpec(spec.layers, spec.kv_heads, spec.head_dim, spec.v_head_dim, sinks)
        )

    def encode(self, run: KVRun, strategy: Strategy) -> bytes:
        """The payload of ``run`` at the coarsest step that the guard lets through.

        Raises ValueError where none is, and for KV the codec cannot hold.
        """
        return guarded(self.profile, strategy.budget, partial(self.encode_at, run, strategy))

    @torch.no_grad()
    def encode_at(self, run: KVRun, strategy: Strategy, step: float) -> tuple[bytes, Measured]:
        """The payload at a given ``step``, and what it cost (calibration, the guard)."""
        spec, profile = self.spec, self.profile
        check_run(run, spec)
        sinks = min(run.tokens, max(0, SINKS - run.start))
        frames = [b""]
        if sinks:
            kind = getattr(torch, self._sinks.spec.dtype)
            head = KVRun(run.k[:, :sinks].to(kind), run.v[:, :sinks].to(kind), run.start)
            frames = [self._sinks.encode(head, EXACT)]
        tokens = run.tokens - sinks
        tables = profile.rope.tables(run.start + sinks, tokens)
        plans = self.plans(step, strategy.shared)
        chosen = _given_classes(strategy.classes, spec.layers, run.tokens)
        below: torch.Tensor | None = None
        sizes: list[int] = []
        novelty: list[float] = []
        error = 0.0
        for a, b in groups_of(spec.layers, tokens * _dim(spec)):
            parts: list[bytes] = []
            counts, symbols = [], []
            for layer in range(a, b):
                k = profile.rope.undo(run.k[layer, sinks:].float(), tables)
                x = torch.cat([k.flatten(1), run.v[layer, sinks:].float().flatten(1)], 1)
                if not bool(torch.isfinite(x.sum())):
                    raise ValueError("NaN or infinite values")
                maps = plans[layer].maps
                classes = _judge(x, maps) if chosen is None else chosen[layer, sinks:]
                plan = plans[layer]
                quantized, below, count, residual = _encode_layer(x, below, plan, classes, step)
                if tokens:
                    cost, distance = _measure(residual, x, below, maps)
                    error += cost
                    novelty.append(distance)
                parts.append(pack_classes(classes))
                counts.append(count)
                symbols.append(quantized)
            blocks = [b"".join(parts)]
            over = []
            for alphabet, cells in zip(ALPHABETS, cells_of(plans[a:b], counts), strict=True):
                flat = [
                    symbols[c.layer][c.begin : c.end, c.first : c.last].T.reshape(-1) for c in cells
                ]
                if flat:
                    packed, rest = pack(np.concatenate(flat), alphabet)
                    blocks.append(packed)
                    over.append(rest)
            if over:
                extra = np.concatenate(over)
                blocks += [(extra & 0xFF).astype(np.uint8).tobytes()]
                blocks += [(extra >> 8).astype(np.uint8).tobytes()]
            frame, size = _compress(blocks)
            frames.append(frame)
            sizes.append(size)
        shared = sorted(set(strategy.shared))
        extra_fields = {"profile": profile.id, "step": step, "sizes": sizes, "shared": shared}
        payload = pack_payload(self.name, spec, run.tokens, run.start, frames, extra_fields)
        repetitive = tokens > 0 and _is_repetitive(run.v[0, sinks:])
        return payload, Measured(error, tuple(novelty), repetitive)

    def open(self, payload: bytes) -> SegmentReader:
        """Check header and sizes; frames are checked as they are read."""
        return _PredictiveReader(payload, self)


def _dim(spec: KVSpec) -> int:
    return spec.kv_heads * (spec.head_dim + spec.v_head_dim)


def _given_classes(classes: bytes, layers: int, tokens: int) -> np.ndarray | None:
    """``[layers, tokens]`` uint8 of a strategy's classes, None where it leaves them open."""
    if not classes:
        return None
    given = np.frombuffer(classes, np.uint8)
    if len(given) not in (tokens, layers * tokens) or int(given.max()) >= len(FACTORS):
        raise ValueError(f"{len(given)} token classes for {tokens} tokens, or one above 3")
    return np.broadcast_to(given.reshape(-1, tokens), (layers, tokens))


def _judge(x: torch.Tensor, maps: LayerMaps) -> np.ndarray:
    """Classes of the rows of ``x`` by the importance that the profile expects of them."""
    importance = x @ maps.token[:-1] + maps.token[-1]
    level = (importance * (-STRENGTH / (0.75 * math.log(2)))).round_() + 2
    return level.clamp_(0, len(FACTORS) - 1).to(torch.uint8).numpy()


def _measure(
    residual: torch.Tensor, x: torch.Tensor, rebuilt: torch.Tensor, maps: LayerMaps
) -> tuple[float, float]:
    """Error of a layer in the importance metric, a token's mean, and how far its tokens
    are from what the profile has seen (Mahalanobis distance over its dimensions, 1 = at home)."""
    rows = slice(None, None, max(1, len(x) // MEASURED_TOKENS))
    error = (x[rows] - rebuilt[rows]) @ maps.forward
    distance = (residual @ maps.forward) / maps.sigma
    far = distance.square().mean(1).clamp_max(FARTHEST)
    return float(error.square().sum(1).mean()), float(far.mean())


def _is_repetitive(v: torch.Tensor) -> bool:
    """Whether ``v`` (``[tokens, heads, dim]`` of the lowest layer, which knows of a token only
    which one it is) is as varied as a 16th of its tokens, all different, at most: the
    perplexity of its tokens' frequencies."""
    rows = v[:: max(1, len(v) // MEASURED_TOKENS)].flatten(1)
    if len(rows) < MEASURED_TOKENS // 4:
        return False
    share = rows.unique(dim=0, return_counts=True)[1] / len(rows)
    return float((-share * share.log()).sum().exp()) <= len(rows) / 16


def _encode_layer(
    x: torch.Tensor, below: torch.Tensor | None, plan: Plan, classes: np.ndarray, step: float
) -> tuple[np.ndarray, torch.Tensor, np.ndarray, torch.Tensor]:
    """Symbols ``[tokens by class, width]`` int32, the rebuilt layer, tokens of each class,
    and a sample of the rows that were to be coded."""
    order = torch.from_numpy(np.argsort(classes, kind="stable"))
    count = np.bincount(classes, minlength=len(FACTORS))
    rows = _predict(below, plan.maps, order)
    residual = x[order].sub_(rows)
    sample = residual[:: max(1, len(x) // MEASURED_TOKENS)].clone()
    symbols = np.zeros((len(x), plan.width), np.int32)
    for c, begin, end in _slabs(count):
        width, scale = plan.widths[c], step * FACTORS[c]
        y = (residual[begin:end] @ plan.maps.forward[:, :width]).mul_(1 / scale).numpy()
        if y.size and not max(float(y.max()), -float(y.min())) < 2**24:
            raise ValueError("values too far from what the profile predicts")
        y += np.copysign(np.float32(ROUNDING), y)
        whole = y.astype(np.int32)  # towards zero
        symbols[begin:end, :width] = whole
        y[...] = whole
        rows[begin:end].addmm_(torch.from_numpy(y), plan.maps.inverse[:width], alpha=scale)
    rebuilt = residual  # its memory is free now
    rebuilt[order] = rows
    return symbols, rebuilt, count, sample


def _slabs(count: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """``(class, begin, end)`` of the tokens of each class that occurs."""
    end = 0
    for c, tokens in enumerate(count.tolist()):
        begin, end = end, end + tokens
        if tokens:
            yield c, begin, end


def _predict(below: torch.Tensor | None, maps: LayerMaps, order: torch.Tensor) -> torch.Tensor:
    if below is None:
        return maps.bias.expand(len(order), -1).clone()
    # Reordered where it is narrowest.
    return torch.addmm(maps.bias, (below @ maps.down)[order], maps.up)


def _compress(blocks: Sequence[bytes]) -> tuple[bytes, int]:
    """One checksummed frame, each block with a Huffman table of its own."""
    size = sum(map(len, blocks))
    writer = huffman_compressor().compressobj(size=size)
    out = []
    for block in blocks:
        out.append(writer.compress(block))
        out.append(writer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    out.append(writer.flush())
    frame = b"".join(out)
    if size > EXPANSION * len(frame):
        raise ValueError("too regular for this codec")
    return frame, size


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
        for c, begin, end in _slabs(part.of_class)
    ]
    slabs.sort(key=lambda slab: slab[0])
    return _Coded(
        np.concatenate([order for _, order, _ in slabs]) if slabs else parts[0].order,
        np.sum([part.of_class for part in parts], axis=0),
        np.concatenate([symbols for *_, symbols in slabs], 1) if slabs else parts[0].symbols,
    )


class _PredictiveReader(SegmentReader):
    """Reads group by group; every iterator has its own decompressor and state."""

    def __init__(self, payload: bytes, codec: PredictiveCodec) -> None:
        spec = codec.spec
        fields = {"profile": str, "step": float, "sizes": list, "shared": list}
        header, frames = unpack_payload(payload, codec.name, spec, fields)
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
        self._groups = groups_of(spec.layers, self._coded * _dim(spec))
        self._frames, self._sizes = frames[1:], header["sizes"]
        if len(self._frames) != len(self._groups) or len(self._sizes) != len(self._groups):
            raise CodecError("number of frames differs from what the shape implies")
        for (a, b), frame, size in zip(self._groups, self._frames, self._sizes, strict=True):
            least = (b - a) * -(-self._coded // 4)
            if type(size) is not int or not least <= size <= EXPANSION * len(frame):
                raise CodecError("a frame's size differs from what the shape allows")
        self._sinks: SegmentReader | None = None
        if self._skip:
            self._sinks = codec._sinks.open(bytes(frames[0]))
            if (self._sinks.tokens, self._sinks.start) != (self._skip, self.start):
                raise CodecError("the sink tokens are not those the header implies")
        elif len(frames[0]):
            raise CodecError("sink tokens where there are none")
        else:
            self.batch_key = (step, self._shared)

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
            assert isinstance(reader, _PredictiveReader)
            first, last = max(0, lo - reader._skip), max(0, hi - reader._skip)
            coded.append(reader._coefficients(first, last))
            begin = reader.start + reader._skip + first
            tables.append(self._profile.rope.tables(begin, last - first))
        cos, sin = (torch.cat(list(one)) for one in zip(*tables, strict=True))
        sinks = None
        if self._sinks:
            (_, lo, hi), *_ = parts
            sinks = self._sinks.layers(min(lo, self._skip), min(hi, self._skip))
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
            rows = _predict(rows, plan.maps, place[index] if rows is not None else index)
            y = torch.from_numpy(coded.symbols).T
            for c, begin, end in _slabs(coded.of_class):
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
            packed = -(-self._coded // 4)
            classes = [
                unpack_classes(np.frombuffer(raw, np.uint8, packed, i * packed), self._coded)
                for i in range(b - a)
            ]
            coefficients = self._symbols(plans[a:b], classes, raw, packed * (b - a))
            for own, symbols in zip(classes, coefficients, strict=True):
                order = np.argsort(own, kind="stable")
                count = np.bincount(own[lo:hi], minlength=len(FACTORS))
                if (lo, hi) != (0, self._coded):
                    chosen = np.flatnonzero((order >= lo) & (order < hi))
                    order, symbols = order[chosen] - lo, np.ascontiguousarray(symbols[:, chosen])
                yield _Coded(order, count, symbols)

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
