"""What the field compares with: quantization, sharing between layers, recomputing.

No part of the package. Each is a policy in the sense of :mod:`krul_sglang.quality.measure`.
"""

from __future__ import annotations

import torch
import zstandard

from krul_sglang.codec.base import KVRun
from krul_sglang.quality.measure import Policy, Restored

TOKEN_GROUP = 128
"""Tokens that share a K channel's scale."""


def _grid(x: torch.Tensor, dim: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, bytes]:
    """``x`` in ``2 ** bits`` steps per slice along ``dim``: rebuilt, codes, scales."""
    levels = (1 << bits) - 1
    low = x.amin(dim, keepdim=True).half()
    # Rounded up, so that the largest value stays within the levels.
    scale = ((x.amax(dim, keepdim=True) - low.float()) / levels).clamp_min(6e-8) * (1 + 2**-10)
    scale = scale.half().clamp_min(2**-24)
    codes = ((x - low.float()) / scale.float()).round_().clamp_(0, levels)
    rebuilt = codes * scale.float() + low.float()
    scales = torch.cat([low.flatten(), scale.flatten()]).numpy().tobytes()
    return rebuilt, codes.to(torch.uint8), scales


def _quantize(run: KVRun, bits: int) -> Restored:
    """K per channel over groups of tokens, V per token and head (KIVI, arXiv 2402.02750);
    codes and scales of each layer go through zstd."""
    stored = 0
    keys, values = [], []
    for k, v in zip(run.k.float(), run.v.float(), strict=True):
        grids = [_grid(group, 0, bits) for group in k.split(TOKEN_GROUP)]
        grids.append(_grid(v, 2, bits))
        keys.append(torch.cat([rebuilt for rebuilt, *_ in grids[:-1]]))
        values.append(grids[-1][0])
        parts = []
        for _, codes, scales in grids:
            packed = codes if bits == 8 else codes[..., ::2] | codes[..., 1::2] << 4
            parts += [scales, packed.numpy().tobytes()]
        stored += len(zstandard.compress(b"".join(parts), 1))
    return Restored(torch.stack(keys), torch.stack(values), stored)


def int8(run: KVRun) -> Restored:
    """8 bits a scalar."""
    return _quantize(run, 8)


def int4(run: KVRun) -> Restored:
    """4 bits a scalar."""
    return _quantize(run, 4)


def recompute(run: KVRun) -> Restored:
    """Nothing is stored, nothing is lost."""
    return Restored(run.k, run.v, 0)


def _share(run: KVRun, source: list[int]) -> Restored:
    kept = sorted(set(source))
    stored = run.nbytes * len(kept) // len(source)
    return Restored(run.k[source], run.v[source], stored)


def raw_share(run: KVRun) -> Restored:
    """The deep half's layers in pairs, the upper one reusing the lower one's KV as it is."""
    layers = run.k.shape[0]
    source = list(range(layers))
    for layer in range(layers // 2 + 1, layers, 2):
        source[layer] = layer - 1
    return _share(run, source)


def dissimilar(run: KVRun) -> Restored:
    """A quarter of the layers reuse the layer they differ from most (KVSharer, 2410.18517)."""
    layers = run.k.shape[0]
    flat = torch.cat([run.k.float().flatten(2), run.v.float().flatten(2)], 2).mean(1)
    distance = torch.cdist(flat, flat)
    source, used = list(range(layers)), set[int]()
    pairs = sorted(
        ((float(distance[i, j]), i, j) for j in range(layers) for i in range(j)), reverse=True
    )
    for _, i, j in pairs:
        if len({n for n, s in enumerate(source) if n != s}) >= layers // 4:
            break
        if source[j] == j and source[i] == i and j not in used:
            source[j] = i
            used.add(i)
    return _share(run, source)


BASELINES: dict[str, Policy] = {
    "recompute": recompute,
    "int8": int8,
    "int4": int4,
    "raw_share": raw_share,
    "dissimilar": dissimilar,
}
