"""Four bits a scalar, no sharing between layers: the first lossy form.

K is quantized per channel over groups of tokens (its outliers sit in fixed
channels), V per token and head, both asymmetric to 16 levels with float16 scale
and offset (the choice of axes follows KIVI, arXiv 2402.02750). Nibbles and
scales go through zstd, one checksummed frame a layer group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import zstandard

from krul_sglang.codec.base import Codec, CodecError, KVRun, KVSpec, SegmentReader
from krul_sglang.codec.frames import open_frame, pack_payload, unpack_payload

if TYPE_CHECKING:
    from krul_sglang.strategy.base import Strategy

TOKEN_GROUP = 128
"""Tokens that share a K channel's scale."""
GROUP_BYTES = 32 * 1024
"""Layers share a frame until it holds this many bytes, so short runs stay small."""
LEVELS = 15
_FLOAT16_MAX = 65504.0


class Int4Codec(Codec):
    """Lossy; raises ValueError for KV it cannot hold (NaN, Inf, beyond float16, odd head size)."""

    name: ClassVar[str] = "int4"
    exact: ClassVar[bool] = False

    def encode(self, run: KVRun, strategy: Strategy) -> bytes:
        """The payload of ``run``; ``strategy`` has nothing to decide here."""
        spec = self.spec
        if spec.head_dim % 2 or spec.v_head_dim % 2:
            raise ValueError("int4 packs channel pairs; the head size must be even")
        compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)
        frames = []
        for first, last in _layer_groups(spec, run.tokens):
            parts: list[bytes] = []
            for layer in range(first, last):
                k, v = run.k[layer].float(), run.v[layer].float()
                if not (_holds(k) and _holds(v)):
                    raise ValueError("values that float16 scales cannot hold")
                for group in k.split(TOKEN_GROUP):
                    parts += _quantize(group, dim=0)
                parts += _quantize(v, dim=2)
            frames.append(compressor.compress(b"".join(parts)))
        return pack_payload(self.name, spec, run.tokens, run.start, frames)

    def open(self, payload: bytes) -> SegmentReader:
        """Check header and sizes; frames are checked as they are read."""
        return _Int4Reader(payload, self.spec)


def _holds(x: torch.Tensor) -> bool:
    # NaN fails the comparison too.
    return x.numel() == 0 or bool(x.abs().max() <= _FLOAT16_MAX / 2)


def _quantize(x: torch.Tensor, dim: int) -> list[bytes]:
    """Offset, scale (float16) and nibbles of ``[tokens, heads, channels]`` over ``dim``."""
    low = x.amin(dim, keepdim=True).half()
    # Rounded up, so that the largest value stays within the 16 levels.
    scale = ((x.amax(dim, keepdim=True) - low.float()) / LEVELS).clamp_min(6e-8) * (1 + 2**-10)
    scale = scale.half().clamp_min(2**-24)
    codes = ((x - low.float()) / scale.float()).round_().clamp_(0, LEVELS).to(torch.uint8)
    packed = codes[..., ::2] | (codes[..., 1::2] << 4)
    return [_bytes(low), _bytes(scale), _bytes(packed)]


def _bytes(x: torch.Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def _layer_bytes(spec: KVSpec, tokens: int) -> int:
    groups = -(-tokens // TOKEN_GROUP)
    k = groups * spec.kv_heads * spec.head_dim * 4 + tokens * spec.kv_heads * spec.head_dim // 2
    v = tokens * spec.kv_heads * 4 + tokens * spec.kv_heads * spec.v_head_dim // 2
    return k + v


def _layer_groups(spec: KVSpec, tokens: int) -> list[tuple[int, int]]:
    size = max(1, -(-GROUP_BYTES // max(1, _layer_bytes(spec, tokens))))
    return [(a, min(a + size, spec.layers)) for a in range(0, spec.layers, size)]


class _Int4Reader(SegmentReader):
    """Reads frame by frame; every iterator has its own decompressor."""

    def __init__(self, payload: bytes, spec: KVSpec) -> None:
        header, self._frames = unpack_payload(payload, Int4Codec.name, spec)
        self._spec = spec
        self.tokens: int = header["tokens"]
        self.start: int = header["start"]
        # zstd cannot shrink random nibbles by much more than a constant; a payload that
        # claims far more tokens than its bytes could carry is refused before any allocation.
        groups = -(-self.tokens * spec.layers * _layer_bytes(spec, 1) // (1 << 30))
        if groups > 1 + len(payload) // 1024:
            raise CodecError("more tokens are declared than the payload could hold")
        self._groups = _layer_groups(spec, self.tokens)
        if len(self._frames) != len(self._groups):
            raise CodecError("number of frames differs from what the shape implies")

    def layers(self, lo: int, hi: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Layers in order; see :class:`SegmentReader`."""
        if not 0 <= lo <= hi <= self.tokens:
            raise ValueError(f"tokens [{lo}, {hi}) are not within [0, {self.tokens})")
        spec, dtype = self._spec, getattr(torch, self._spec.dtype)
        decompressor = zstandard.ZstdDecompressor()
        for (first, last), frame in zip(self._groups, self._frames, strict=True):
            size = (last - first) * _layer_bytes(spec, self.tokens)
            cursor = _Cursor(
                np.frombuffer(bytearray(open_frame(decompressor, frame, size)), np.uint8)
            )
            for _ in range(first, last):
                parts = []
                for begin in range(0, self.tokens, TOKEN_GROUP):
                    tokens = min(TOKEN_GROUP, self.tokens - begin)
                    parts.append(
                        cursor.dequantize(
                            (1, spec.kv_heads, spec.head_dim), tokens, spec.kv_heads, spec.head_dim
                        )
                    )
                k = torch.cat(parts) if parts else torch.empty(0, spec.kv_heads, spec.head_dim)
                v = cursor.dequantize(
                    (self.tokens, spec.kv_heads, 1), self.tokens, spec.kv_heads, spec.v_head_dim
                )
                yield k[lo:hi].to(dtype), v[lo:hi].to(dtype)


class _Cursor:
    """Walks a decompressed frame, whose size has been checked against the shape."""

    def __init__(self, raw: np.ndarray) -> None:
        self._raw = torch.from_numpy(raw)

    def _take(self, count: int) -> torch.Tensor:
        taken, self._raw = self._raw[:count], self._raw[count:]
        return taken

    def dequantize(
        self, scales: tuple[int, int, int], tokens: int, heads: int, channels: int
    ) -> torch.Tensor:
        """float32 ``[tokens, heads, channels]``; ``scales`` is the scale's shape."""
        count = 2 * scales[0] * scales[1] * scales[2]
        # clone: a slice of bytes is not aligned for a float16 view
        low = self._take(count).clone().view(torch.float16).view(scales).float()
        scale = self._take(count).clone().view(torch.float16).view(scales).float()
        packed = self._take(tokens * heads * channels // 2).view(tokens, heads, channels // 2)
        codes = torch.stack((packed & 0xF, packed >> 4), dim=-1).view(tokens, heads, channels)
        return codes.float().mul_(scale).add_(low)
