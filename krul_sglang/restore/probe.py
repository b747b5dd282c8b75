"""First values of the cost model, measured at launch in a fraction of a second.

They need only be of the right size: the first restores and prefills correct them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from krul_sglang.codec.base import Codec, KVRun, KVSpec
from krul_sglang.restore.cost import ComputeCost, LoadCost, Rate
from krul_sglang.strategy.base import Strategy

ROWS = 128
"""Tokens of each measurement."""
KEYS = 1024
"""Keys that each of them attends."""


@dataclass(frozen=True)
class ModelShape:
    """What decides a forward pass's cost on this rank.

    weights: scalars that a token is multiplied with, all layers. heads, head_dim: of the
    queries.
    """

    layers: int
    hidden: int
    weights: int
    heads: int
    head_dim: int


def _seconds(run: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """The fastest of some runs, after one that warms up."""
    best = float("inf")
    for _ in range(repeats + 1):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best


@torch.no_grad()
def compute_cost(shape: ModelShape, dtype: torch.dtype, device: torch.device) -> ComputeCost:
    """Seconds by token and by query-key pair, from one product and one attention."""
    hidden = shape.hidden
    x = torch.randn(ROWS, hidden, device=device).to(dtype)
    w = torch.randn(4 * hidden, hidden, device=device).to(dtype)
    product = _seconds(lambda: torch.nn.functional.linear(x, w), device)
    q = torch.randn(1, shape.heads, ROWS, shape.head_dim, device=device).to(dtype)
    k = torch.randn(1, shape.heads, KEYS, shape.head_dim, device=device).to(dtype)
    attend = torch.nn.functional.scaled_dot_product_attention
    attention = _seconds(lambda: attend(q, k, k), device)
    empty = _seconds(lambda: torch.nn.functional.linear(x[:1], w[:1]), device)
    return ComputeCost(
        fixed=empty * 20 * shape.layers,
        token=product / ROWS / w.numel() * shape.weights,
        pair=attention / (ROWS * KEYS) * shape.layers,
    )


def load_cost(
    spec: KVSpec, codecs: Mapping[str, Codec], threads: int, bandwidth: float | None
) -> LoadCost:
    """Seconds by token of each codec, from a run of noise; the link as it is configured."""
    dtype = getattr(torch, spec.dtype)

    def noise(dim: int) -> torch.Tensor:
        return torch.randn(spec.layers, ROWS, spec.kv_heads, dim).to(dtype)

    run = KVRun(noise(spec.head_dim), noise(spec.v_head_dim), start=16)
    rates = {}
    for name, codec in codecs.items():
        try:
            reader = codec.open(codec.encode(run, Strategy(name)))
        except ValueError:
            continue  # a codec that holds no noise is timed on its first restore

        def read(reader=reader) -> None:
            for _ in reader.layers(0, ROWS):
                pass

        rates[name] = Rate(_seconds(read, torch.device("cpu"), 1) / ROWS)
    links = {} if bandwidth is None else {"memory": Rate(1 / bandwidth)}
    return LoadCost(threads, links, rates)
