"""Undoing rotary position embedding, which is an exact rotation at a known position.

Keys are predictable across layers before RoPE, not after it. Frequencies follow
the model's config; formulas: transformers ``modeling_rope_utils`` and SGLang
``srt/layers/rotary_embedding``, which agree except for ``dynamic`` (see
:func:`rope_of`). Only the half-split (NeoX) pairing of Llama, Qwen and Mistral is
handled. A wrong frequency could cost ratio, never correctness: what
:meth:`Rope.undo` takes off, :meth:`Rope.apply` puts back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch


class RopeError(ValueError):
    """This model's position embedding cannot be undone; the message says why."""


@dataclass(frozen=True)
class Rope:
    """inv_freq: ``[rotary_dim / 2]`` float32, radians a position; scale: factor on cos, sin."""

    inv_freq: torch.Tensor
    scale: float = 1.0

    def tables(self, start: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of positions ``start ..``, ``[tokens, rotary_dim / 2]`` float32."""
        # float32 products, as the model computes them: at position 1e5 the
        # rounding of the angle is part of what has to be undone.
        positions = torch.arange(start, start + tokens, dtype=torch.float32)
        angles = positions[:, None] * self.inv_freq[None, :]
        return angles.cos(), angles.sin()

    def undo(self, k: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Pre-RoPE keys. ``k``: ``[tokens, heads, dim]`` float32, left as it is."""
        cos, sin = tables
        return _rotate(k, cos / self.scale, -sin / self.scale)

    def apply(self, k: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Post-RoPE keys; the inverse of :meth:`undo`."""
        cos, sin = tables
        return _rotate(k, cos * self.scale, sin * self.scale)


def _rotate(k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    x, y = k[..., :half], k[..., half : 2 * half]
    out = torch.empty_like(k)
    torch.mul(x, cos, out=out[..., :half]).addcmul_(y, sin, value=-1.0)
    torch.mul(y, cos, out=out[..., half : 2 * half]).addcmul_(x, sin)
    out[..., 2 * half :] = k[..., 2 * half :]
    return out


def rope_of(config: Mapping[str, Any], runtime: Literal["sglang", "transformers"]) -> Rope:
    """The rotation a model applies, from its ``config.json`` as a dict.

    runtime: whose ``dynamic`` scaling is meant: SGLang stretches the base once, for
        the longest context; transformers leaves it alone up to
        ``max_position_embeddings``. Raises :class:`RopeError`.
    """
    params = _parameters(config)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    partial = params.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    dim = int(head_dim * partial)
    base = float(params.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = params.get("rope_type") or params.get("type") or "default"
    odd = {"mrope_section", "use_fope", "alpha"} & params.keys()
    if odd or dim % 2 or config.get("dual_chunk_attention_config"):
        raise RopeError(
            f"rope_type {kind!r} with {sorted(odd) or 'an odd layout'} is not supported"
        )
    longest = int(config.get("max_position_embeddings") or 2048)
    factor = float(params.get("factor") or 1.0)
    scale = 1.0
    if kind == "dynamic" and runtime == "sglang":
        base *= (factor * factor - (factor - 1)) ** (dim / (dim - 2))
    inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if kind == "linear":
        inv_freq = inv_freq / factor
    elif kind == "llama3":
        inv_freq = _llama3(inv_freq, params, factor, longest)
    elif kind == "yarn":
        inv_freq, scale = _yarn(inv_freq, params, base, factor, longest)
    elif kind not in ("default", "dynamic"):
        raise RopeError(f"rope_type {kind!r} is not supported")
    return Rope(inv_freq, scale)


def _parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Both spellings: ``rope_parameters`` (transformers 5) and ``rope_scaling``."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if any(isinstance(value, Mapping) for value in found.values()):
        raise RopeError("RoPE parameters that differ by layer type are not supported")
    return dict(found)


def _llama3(
    inv_freq: torch.Tensor, params: Mapping[str, Any], factor: float, longest: int
) -> torch.Tensor:
    low, high = float(params["low_freq_factor"]), float(params["high_freq_factor"])
    original = float(params.get("original_max_position_embeddings") or longest)
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - low) / (high - low) if high != low else 0.0
    blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    out = torch.where(wavelength > original / low, inv_freq / factor, blended)
    return torch.where(wavelength < original / high, inv_freq, out)


def _yarn(
    inv_freq: torch.Tensor, params: Mapping[str, Any], base: float, factor: float, longest: int
) -> tuple[torch.Tensor, float]:
    dim = 2 * inv_freq.numel()
    original = float(params.get("original_max_position_embeddings") or longest)

    def boundary(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = boundary(float(params.get("beta_fast") or 32))
    high = boundary(float(params.get("beta_slow") or 1))
    if params.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = (high - low) or 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    kept = 1 - ramp
    out = inv_freq / factor * (1 - kept) + inv_freq * kept

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    scale = params.get("attention_factor")
    if scale is None:
        one, all_dim = params.get("mscale"), params.get("mscale_all_dim")
        scale = mscale(one) / mscale(all_dim) if one and all_dim else mscale(1.0)
        scale *= float(params.get("attn_factor") or 1.0)
    return out, float(scale)
