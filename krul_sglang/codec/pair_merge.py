"""Two layers share one direction per vector: MiniCache's merge operator.

Our reimplementation, from the formulas of MiniCache (arXiv 2405.14366); nobody's code
was used. Every K and V vector of a head is split into magnitude and direction. The two
directions of a pair of layers are interpolated on the sphere (SLERP, ``T`` of the way
from the upper layer to the lower one) and stored once at 16 bits beside both
magnitudes. Keys are merged as they lie in the cache: the same token
is rotated by the same RoPE in both layers, and SLERP commutes with rotations.

What we found open is decided in favour of the operator: the direction starts from the
upper layer (from the lower one, SmolLM2's KL was 5 to 18 % higher), K and V choose
their own outliers (by angle, averaged over heads), the attention sinks are always among
them, all 16-bit words are entropy-coded, and outliers and layers without a partner are
bit-exact.

Frames: three lossless payloads (layers without a partner; directions, a "layer" a
pair; outliers, a "layer" a merged layer; each empty where there is nothing), then one
zstd frame a pair: bitmaps of the outliers of K and V, magnitudes (low bytes, high
bytes). Every lossless payload can be read in step with the layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import zstandard

from krul_sglang.codec.base import (
    Codec,
    CodecError,
    Description,
    KVRun,
    KVSpec,
    Payload,
    SegmentReader,
    StoredLayer,
)
from krul_sglang.codec.frames import open_frame, pack_payload, shares, unpack_payload
from krul_sglang.codec.lossless import LosslessCodec, check_run, huffman_compressor
from krul_sglang.strategy.base import EXACT

if TYPE_CHECKING:
    from krul_sglang.strategy.base import Strategy

T = 0.6
"""Where the shared direction lies between the upper layer's (0) and the lower's (1)."""
OUTLIERS = 0.05
"""Share of a pair's tokens that are kept unmerged: those with the largest angle."""
SINKS = 4
"""Tokens at the start of a sequence that are always outliers: attention sinks."""
_SMALL = 1e-3
"""Below this sine the sphere is flat (or the arc is not unique): a straight line serves."""


def slerp(lower: torch.Tensor, upper: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shared direction and angle of vectors along the last axis.

    lower, upper: float32 ``[..., dim]``. Returns unit directions ``[..., dim]`` and
    angles ``[...]`` in radians. A zero vector has no direction: the other's is taken,
    at angle 0, for nothing is lost. Opposite vectors give the lower direction.
    """
    u, w = _unit(lower), _unit(upper)
    # acos loses half of float32's digits near 0 and pi.
    angle = 2 * torch.atan2((u - w).norm(dim=-1), (u + w).norm(dim=-1))
    sine = angle.sin()
    flat = sine < _SMALL
    a = torch.where(flat, T, (T * angle).sin())
    b = torch.where(flat, 1 - T, ((1 - T) * angle).sin())
    zero = (u == 0).all(-1) | (w == 0).all(-1)
    # Dividing by sin(angle) and restoring unit length are one normalization.
    return _unit(u * a[..., None] + w * b[..., None]), angle.masked_fill(zero, 0)


def _unit(x: torch.Tensor) -> torch.Tensor:
    """``x`` at unit length along the last axis; zero stays zero. No square can overflow."""
    largest = x.abs().amax(-1, keepdim=True)
    scaled = x / largest.masked_fill(largest == 0, 1)
    norm = scaled.norm(dim=-1, keepdim=True)
    return scaled / norm.masked_fill(norm == 0, 1)


def _outlier_count(tokens: int, start: int) -> int:
    sinks = min(tokens, max(0, SINKS - start))
    return sinks + round(OUTLIERS * (tokens - sinks))


def _farthest(angle: torch.Tensor, start: int) -> torch.Tensor:
    """bool ``[tokens]``: the outliers for angles ``[tokens, heads]``; ties to the earlier."""
    mean = angle.mean(1)
    mean[: max(0, SINKS - start)] = torch.inf
    order = torch.argsort(mean, descending=True, stable=True)
    chosen = torch.zeros(len(mean), dtype=torch.bool)
    chosen[order[: _outlier_count(len(mean), start)]] = True
    return chosen


def _merge(
    lower: torch.Tensor, upper: torch.Tensor, start: int, kind: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge ``[tokens, heads, dim]`` of two layers.

    Returns the outliers (bool ``[tokens]``), the directions of the other tokens
    (``kind`` ``[rest, heads, dim]``) and their magnitudes (``kind`` ``[2, rest, heads]``).
    """
    both = torch.stack([lower, upper]).float()
    magnitude = both.norm(dim=-1).to(kind)
    if not bool(torch.isfinite(magnitude).all()):
        raise ValueError("NaN, infinite or very large values")
    direction, angle = slerp(both[0], both[1])
    chosen = _farthest(angle, start)
    return chosen, direction[~chosen].to(kind), magnitude[:, ~chosen]


@dataclass(frozen=True)
class _Parts:
    """The shapes of a payload's three lossless parts; None where there is nothing."""

    plain: KVSpec | None
    merged: KVSpec | None
    outliers: KVSpec | None

    @classmethod
    def of(cls, spec: KVSpec, pairs: int) -> _Parts:
        def part(layers: int, dtype: str) -> KVSpec | None:
            if not layers:
                return None
            return KVSpec(layers, spec.kv_heads, spec.head_dim, spec.v_head_dim, dtype)

        kind = "float16" if spec.dtype == "float16" else "bfloat16"
        return cls(
            part(spec.layers - 2 * pairs, spec.dtype),
            part(pairs, kind),
            part(2 * pairs, spec.dtype),
        )


def _problem(pairs: Sequence[tuple[int, int]], layers: int) -> str | None:
    """What is wrong with a list of pairs, if anything."""
    flat = [layer for pair in pairs for layer in pair]
    if len(set(flat)) != len(flat):
        return "a layer is in more than one pair"
    if any(not 0 <= lower < upper < layers for lower, upper in pairs):
        return f"a pair is not two ascending layers below {layers}"
    return None


class PairMergeCodec(Codec):
    """Lossy in the layers of ``strategy.pairs``, bit-exact in all others.

    ``encode`` raises ValueError for pairs that are not disjoint ascending layers and for
    NaN, infinite or very large values (a vector's length must fit 16 bits) in a paired
    layer.
    """

    name: ClassVar[str] = "pair_merge"
    in_order: ClassVar[bool] = False  # what pairs share lies before what they do not
    exact: ClassVar[bool] = False

    @torch.no_grad()
    def encode(self, run: KVRun, strategy: Strategy) -> bytes:
        """The payload of ``run`` with the layers of ``strategy.pairs`` merged."""
        check_run(run, self.spec)
        pairs = sorted(strategy.pairs)
        if problem := _problem(pairs, self.spec.layers):
            raise ValueError(problem)
        parts = _Parts.of(self.spec, len(pairs))
        paired = sorted(layer for pair in pairs for layer in pair)
        frames = [b"", b"", b""]
        if parts.plain:
            rest = [layer for layer in range(self.spec.layers) if layer not in paired]
            plain = KVRun(run.k[rest], run.v[rest], run.start)
            frames[0] = LosslessCodec(parts.plain).encode(plain, EXACT)
        if parts.merged and parts.outliers:
            kind = getattr(torch, parts.merged.dtype)
            compressor = huffman_compressor()
            merged: list[list[torch.Tensor]] = [[], []]
            kept: list[dict[int, torch.Tensor]] = [{}, {}]
            for lower, upper in pairs:
                self.pace()
                maps, magnitudes = [], []
                for side, x in enumerate((run.k, run.v)):
                    chosen, direction, magnitude = _merge(x[lower], x[upper], run.start, kind)
                    merged[side].append(direction)
                    kept[side][lower], kept[side][upper] = x[lower, chosen], x[upper, chosen]
                    maps.append(np.packbits(chosen.numpy()))
                    magnitudes.append(magnitude.view(torch.int16).numpy().reshape(-1))
                words = np.concatenate(magnitudes).view(np.uint8).reshape(-1, 2)
                planes = [*maps, words[:, 0], words[:, 1]]
                frames.append(compressor.compress(np.concatenate(planes).data))
            directions = KVRun(torch.stack(merged[0]), torch.stack(merged[1]), 0)
            frames[1] = LosslessCodec(parts.merged).encode(directions, EXACT)
            k, v = (torch.stack([own[layer] for layer in paired]) for own in kept)
            frames[2] = LosslessCodec(parts.outliers).encode(KVRun(k, v, 0), EXACT)
        fields = {"pairs": [list(pair) for pair in pairs]}
        return pack_payload(self.name, self.spec, run.tokens, run.start, frames, fields)

    def open(self, payload: Payload) -> SegmentReader:
        """Check header and sizes; frames are checked as they are read."""
        return _PairMergeReader(payload, self.spec)


@dataclass(frozen=True)
class _Side:
    """K or V of a pair that has been read: all tokens, compact without the outliers.

    chosen: bool ``[tokens]``. direction: ``[rest, heads, dim]``. magnitude: ``[2, rest, heads]``.
    """

    chosen: torch.Tensor
    direction: torch.Tensor
    magnitude: torch.Tensor

    def rows(self, which: int, kept: torch.Tensor, lo: int, hi: int) -> torch.Tensor:
        """Tokens ``[lo, hi)`` of the lower (0) or upper (1) layer; ``kept`` its outliers."""
        cut = self.chosen[lo:hi]
        a = int(self.chosen[:lo].sum())
        b = a + int(cut.sum())
        merged = slice(lo - a, hi - b)
        out = torch.empty((hi - lo, *kept.shape[1:]), dtype=kept.dtype)
        magnitude = self.magnitude[which, merged, :, None].float()
        out[~cut] = (self.direction[merged].float() * magnitude).to(kept.dtype)
        out[cut] = kept[a:b]
        return out


class _PairMergeReader(SegmentReader):
    """Reads layer by layer; every iterator has its own decompressor and state."""

    def __init__(self, payload: Payload, spec: KVSpec) -> None:
        header, frames = unpack_payload(payload, PairMergeCodec.name, spec, {"pairs": list})
        self._spec = spec
        self.tokens: int = header["tokens"]
        self.start: int = header["start"]
        self._pairs = _checked_pairs(header["pairs"], spec.layers)
        if len(frames) != 3 + len(self._pairs):
            raise CodecError("number of frames differs from what the pairs imply")
        self._kept = _outlier_count(self.tokens, self.start)
        self._rest = self.tokens - self._kept
        parts = _Parts.of(spec, len(self._pairs))
        # A lossless payload is never much smaller than the tokens it declares, so these
        # checks bound everything that is allocated later by the payload's length.
        self._plain = _open(parts.plain, frames[0], self.tokens, self.start)
        self._merged = _open(parts.merged, frames[1], self._rest, 0)
        self._outliers = _open(parts.outliers, frames[2], self._kept, 0)
        self._frames = frames[3:]
        self._payload_bytes = len(payload)

    def layer_bytes(self) -> list[int]:
        """See :class:`SegmentReader`: what a pair shares counts for its lower layer."""
        readers = (self._plain, self._merged, self._outliers)
        plain, merged, outliers = (iter(r.layer_bytes() if r else ()) for r in readers)
        frames, uppers = map(len, self._frames), dict(self._pairs)
        out = []
        for layer in range(self._spec.layers):
            if layer in uppers:
                out.append(next(frames) + next(merged) + next(outliers))
            else:
                out.append(next(outliers if layer in uppers.values() else plain))
        out[0] += self._payload_bytes - sum(out)
        return out

    def describe(self) -> Description:
        """See :class:`SegmentReader`; what a pair shares counts half for either layer."""
        plain, merged, outliers = (
            iter(part.describe().layers if part else ())
            for part in (self._plain, self._merged, self._outliers)
        )
        partner = {a: b for pair in self._pairs for a, b in (pair, pair[::-1])}
        half: dict[int, int] = {}
        for (lower, upper), frame in zip(self._pairs, self._frames, strict=True):
            half[lower], half[upper] = shares(len(frame) + next(merged).nbytes, (1, 1))
        layers = [
            StoredLayer(half[n] + next(outliers).nbytes, in_shared_frame=True, reference=partner[n])
            if n in partner
            else next(plain)
            for n in range(self._spec.layers)
        ]
        header_bytes = self._payload_bytes - sum(layer.nbytes for layer in layers)
        return Description(header_bytes, tuple(layers))

    def layers(self, lo: int, hi: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Layers in order; see :class:`SegmentReader`."""
        if not 0 <= lo <= hi <= self.tokens:
            raise ValueError(f"tokens [{lo}, {hi}) are not within [0, {self.tokens})")
        plain = _iterate(self._plain, lo, hi)
        merged = _iterate(self._merged, 0, self._rest)
        outliers = _iterate(self._outliers, 0, self._kept)
        frames = iter(self._frames)
        decompressor = zstandard.ZstdDecompressor()
        upper_of = dict(self._pairs)
        waiting: dict[int, tuple[_Side, _Side]] = {}
        for layer in range(self._spec.layers):
            if layer in upper_of:
                sides = self._sides(decompressor, next(frames), next(merged))
                waiting[upper_of[layer]] = sides
                which = 0
            elif layer in waiting:
                sides, which = waiting.pop(layer), 1
            else:
                yield next(plain)
                continue
            k, v = next(outliers)
            yield sides[0].rows(which, k, lo, hi), sides[1].rows(which, v, lo, hi)

    def _sides(
        self,
        decompressor: zstandard.ZstdDecompressor,
        frame: memoryview,
        directions: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[_Side, _Side]:
        """K's and V's side of the pair whose frame this is."""
        bitmap, scalars = -(-self.tokens // 8), 2 * self._rest * self._spec.kv_heads
        raw = open_frame(decompressor, frame, 2 * bitmap + 4 * scalars)
        planes = np.frombuffer(raw, np.uint8, 4 * scalars, 2 * bitmap).reshape(2, -1)
        words = np.array(planes.T, order="C").view(np.int16)
        shape = (2, 2, self._rest, self._spec.kv_heads)
        magnitudes = torch.from_numpy(words.reshape(shape)).view(directions[0].dtype)
        sides = []
        for side, direction in enumerate(directions):
            bits = np.unpackbits(np.frombuffer(raw, np.uint8, bitmap, side * bitmap))
            chosen = torch.from_numpy(bits[: self.tokens].astype(bool))
            if int(chosen.sum()) != self._kept:
                raise CodecError("number of outliers differs from what the tokens imply")
            sides.append(_Side(chosen, direction, magnitudes[side]))
        return sides[0], sides[1]


def _checked_pairs(pairs: list[Any], layers: int) -> list[tuple[int, int]]:
    """The pairs of a header, which are sorted and valid, or :class:`CodecError`."""
    for pair in pairs:
        if type(pair) is not list or len(pair) != 2 or any(type(n) is not int for n in pair):
            raise CodecError("a pair of layers is none")
    checked = [(lower, upper) for lower, upper in pairs]
    if problem := _problem(checked, layers):
        raise CodecError(problem)
    if checked != sorted(checked):
        raise CodecError("pairs of layers out of order")
    return checked


def _open(part: KVSpec | None, frame: memoryview, tokens: int, start: int) -> SegmentReader | None:
    """The lossless payload of one part, which holds just these tokens."""
    if part is None:
        if len(frame):
            raise CodecError("a part where there is nothing to store")
        return None
    reader = LosslessCodec(part).open(bytes(frame))
    if (reader.tokens, reader.start) != (tokens, start):
        raise CodecError("a part's tokens are not those the header implies")
    return reader


def _iterate(
    reader: SegmentReader | None, lo: int, hi: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return reader.layers(lo, hi) if reader else iter(())
