"""The default lossy codec: each layer predicted from the rebuilt layer below.

Keys and values of neighbouring layers are far apart as vectors and close under a
calibrated linear map. So a layer is stored as what the map of the *rebuilt* layer
below leaves over, in the principal axes of the importance metric, quantized with
one step for all layers (the metric carries their sensitivities) times a factor for
the token's class. Nothing links one token to another: a run can be cut anywhere.

Frames: the exact sink tokens (a lossless payload, or empty), then one zstd frame a
group of layers: token classes, symbols bin by bin, overflow (low bytes, high bytes).
The header also says what error each layer was left with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import zstandard

from krul_sglang.codec.base import Codec, KVRun, KVSpec, Payload, SegmentReader
from krul_sglang.codec.frames import pack_payload
from krul_sglang.codec.guard import Measured, guarded
from krul_sglang.codec.layout import (
    EXPANSION,
    FACTORS,
    Plan,
    cells_of,
    groups_of,
    pack_classes,
    plans_of,
    slabs_of,
)
from krul_sglang.codec.lossless import LosslessCodec, check_run, huffman_compressor
from krul_sglang.codec.predictive_reader import PredictiveReader
from krul_sglang.codec.symbols import ALPHABETS, pack
from krul_sglang.similarity.levels import levels_of
from krul_sglang.strategy.base import EXACT, SINKS

if TYPE_CHECKING:
    from krul_sglang.profile.base import LayerMaps, Profile
    from krul_sglang.strategy.base import Strategy

ROUNDING = 0.4
"""Dead zone: less than this share of a step rounds up; saves 5 % at equal divergence."""
STRENGTH = 0.4
"""How far a step follows 1/sqrt(importance), whose exponent would be 0.5: the guess
of a token's importance explains 40 % of its variance."""
ATTENDED_STRENGTH = 0.3
"""The same where attention was measured: 0.22 to 0.45 give the same divergence on what comes
next, and at 0.45 facts that nobody has looked at since are lost (docs/quality.md)."""
MEASURED_TOKENS = 128
"""About how many tokens of a run the guard looks at."""
FARTHEST = 16.0
"""What a token's distance counts at most: one odd token does not make a text unlike."""


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
        levels = _given_levels(strategy.attention, spec.layers, run.tokens)
        below: torch.Tensor | None = None
        sizes: list[int] = []
        errors: list[float] = []
        novelty: list[float] = []
        for a, b in groups_of(spec.layers, tokens * spec.layer_scalars):
            parts: list[bytes] = []
            counts, symbols = [], []
            for layer in range(a, b):
                self.pace()
                k = profile.rope.undo(run.k[layer, sinks:].float(), tables)
                x = torch.cat([k.flatten(1), run.v[layer, sinks:].float().flatten(1)], 1)
                if not bool(torch.isfinite(x.sum())):
                    raise ValueError("NaN or infinite values")
                maps = plans[layer].maps
                if chosen is None:
                    classes = _judge(x, maps, None if levels is None else levels[layer, :, sinks:])
                else:
                    classes = chosen[layer, sinks:]
                plan = plans[layer]
                quantized, below, count, residual = _encode_layer(x, below, plan, classes, step)
                if tokens:
                    error, distance = _measure(residual, x, below, maps)
                    errors.append(error)
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
        if not math.isfinite(sum(errors)):
            raise ValueError("values too far from what the profile predicts")
        fields = {
            "profile": profile.id,
            "step": step,
            "sizes": sizes,
            "shared": sorted(set(strategy.shared)),
            "errors": np.array(errors, "<f4").tobytes(),
        }
        payload = pack_payload(self.name, spec, run.tokens, run.start, frames, fields)
        repetitive = tokens > 0 and _is_repetitive(run.v[0, sinks:])
        return payload, Measured(tuple(errors), tuple(novelty), repetitive)

    def open(self, payload: Payload) -> SegmentReader:
        """Check header and sizes; frames are checked as they are read."""
        return PredictiveReader(payload, self)


def _given_classes(classes: bytes, layers: int, tokens: int) -> np.ndarray | None:
    """``[layers, tokens]`` uint8 of a strategy's classes, None where it leaves them open."""
    if not classes:
        return None
    given = np.frombuffer(classes, np.uint8)
    if len(given) not in (tokens, layers * tokens) or int(given.max()) >= len(FACTORS):
        raise ValueError(f"{len(given)} token classes for {tokens} tokens, or one above 3")
    return np.broadcast_to(given.reshape(-1, tokens), (layers, tokens))


def _given_levels(attention: bytes, layers: int, tokens: int) -> torch.Tensor | None:
    """``[layers, 2, tokens]``: a token's attention level in the layer and its mean over all
    layers; None where a strategy has none."""
    if not attention:
        return None
    if len(attention) != layers * tokens:
        raise ValueError(f"attention of {len(attention)} bytes for {layers} x {tokens} tokens")
    levels = levels_of(torch.frombuffer(bytearray(attention), dtype=torch.uint8))
    own = levels.view(layers, tokens)
    return torch.stack([own, own.mean(0).expand(layers, tokens)], 1)


def _judge(x: torch.Tensor, maps: LayerMaps, levels: torch.Tensor | None) -> np.ndarray:
    """Classes of the rows of ``x`` by the importance that the profile expects of them;
    levels: ``[2, rows]`` of :func:`_given_levels`."""
    if levels is None:
        importance, strength = x @ maps.token[:-1] + maps.token[-1], STRENGTH
    else:
        dim, weights = x.shape[1], maps.attended
        importance = x @ weights[:dim] + weights[dim:-1] @ levels + weights[-1]
        strength = ATTENDED_STRENGTH
    level = (importance * (-strength / (0.75 * math.log(2)))).round_() + 2
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
    rows = plan.maps.predict(below, order)
    residual = x[order].sub_(rows)
    sample = residual[:: max(1, len(x) // MEASURED_TOKENS)].clone()
    symbols = np.zeros((len(x), plan.width), np.int32)
    for c, begin, end in slabs_of(count):
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
