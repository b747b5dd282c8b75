"""How fast packed layers decode into a paged pool, against copying the KV they stand for.

    python benchmarks/packed.py --shape smollm2 --tokens 4096 --json out.json

On a GPU the Triton kernels, else their torch references. The profile is random, of a model's
shape, with coefficients that fall off as SmolLM2's do at a budget of 0.01 nats. Timed is what
follows zstd: the frames' bytes lie on the device, the tables and maps too. GB/s are bytes of
the rebuilt KV as bfloat16, over time; the copies move as many bytes. Needs no SGLang.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path += [str(Path(__file__).resolve().parent.parent / part) for part in ("", "kernels")]

import numpy as np
import torch
from krul_kernels import packed
from krul_kernels.packed.transform import rebuild_layer_reference

from krul_sglang.codec.layout import FACTORS, Plan, cells_of, groups_of, plans_of
from krul_sglang.codec.symbols import ALPHABETS
from krul_sglang.profile.rope import Rope

SHAPES = {"smollm2": (30, 3, 64), "8b": (32, 8, 128)}
"""Layers, KV heads, dimensions of a head."""
RANK = 0.4
"""Of a prediction, as a share of a layer's scalars: SmolLM2's are 0.2 to 0.5."""
OF_CLASS = (0.05, 0.25, 0.4, 0.3)
"""Share of the tokens in each class."""


@dataclass(frozen=True)
class Frame:
    """Bytes and tables of a frame on the device; per layer its arguments and pools."""

    data: torch.Tensor
    layout: packed.FrameLayout
    widths: list[int]
    classes: list[tuple[torch.Tensor, ...]]
    maps: list[Maps]
    pools: list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Maps:
    """What decoding wants of a profile's LayerMaps; ``sigma`` on the host, for the plan."""

    bias: torch.Tensor
    down: torch.Tensor
    up: torch.Tensor
    inverse: torch.Tensor
    sigma: torch.Tensor


def make_maps(layers: int, width: int, device: str) -> list[Maps]:
    """Random ones on ``device``, as large as they must be for ``x`` to keep its scale."""
    sigma = 1.6 * torch.exp(-2.7 * torch.arange(width) / width)
    out = []
    for layer in range(layers):
        rank = int(RANK * width) if layer else 0
        down = torch.randn(width, rank, device=device) / width**0.5
        up = torch.randn(rank, width, device=device) / max(1, rank) ** 0.5
        inverse = torch.randn(width, width, device=device) / width**0.5
        out.append(Maps(torch.randn(width, device=device), down, up, inverse, sigma))
    return out


def make_symbols(plan: Plan, kinds: np.ndarray) -> torch.Tensor:
    """int32 ``[width, tokens]`` of sorted ``kinds``, as quantizing normal values gives them."""
    factors = torch.tensor(FACTORS)[torch.from_numpy(kinds).long()]
    ratio = plan.maps.sigma[: plan.width, None] / factors
    symbols = (torch.randn(ratio.shape) * ratio).round_().int()
    stored = torch.tensor(plan.widths)[torch.from_numpy(kinds).long()]
    return symbols * (torch.arange(plan.width)[:, None] < stored)


def make_frames(maps: list[Maps], tokens: int, heads: int, dim: int, device: str) -> list[Frame]:
    """A segment of ``tokens`` tokens as its decoder finds it, and pools for it."""
    plans = plans_of(SimpleNamespace(layers=maps), 1.0)  # all that a plan wants of a profile
    rng, out = np.random.default_rng(0), []
    for a, b in groups_of(len(plans), tokens * 2 * heads * dim):
        symbols, counts, classes = [], [], []
        for plan in plans[a:b]:
            kinds = rng.choice(len(FACTORS), tokens, p=OF_CLASS)
            order = np.argsort(kinds, kind="stable")
            counts.append(np.bincount(kinds, minlength=len(FACTORS)))
            symbols.append(make_symbols(plan, kinds[order]))
            ends = torch.from_numpy(counts[-1].cumsum()).int()
            widths = torch.tensor(plan.widths, dtype=torch.int32)
            tables = (torch.from_numpy(order), ends, widths, torch.tensor(FACTORS))
            classes.append(tuple(table.to(device) for table in tables))
        widths_of = [plan.width for plan in plans[a:b]]
        largest = [alphabet.largest for alphabet in ALPHABETS]
        cells = cells_of(plans[a:b], counts)
        layout = packed.frame_layout(cells, largest, widths_of, tokens).to(device)
        flat = torch.cat(symbols).to(device)
        bins, over, found = packed.pack_symbols(flat, layout.cells, layout.blocks, layout.overflow)
        data = torch.cat([bins, *over[:, : int(found[0])]])
        shape = (2 * tokens, heads, dim)
        pools = [
            tuple(torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
            for _ in range(a, b)
        ]
        out.append(Frame(data, layout, widths_of, classes, maps[a:b], pools))
    return out


class Decoder:
    """The three steps over all layers, together and each alone."""

    def __init__(self, frames: list[Frame], tokens: int, dim: int) -> None:
        self.frames = frames
        device = frames[0].data.device
        self.rows = torch.randperm(2 * tokens)[:tokens].to(device)
        rope = Rope(10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        self.cos, self.sin = (table.to(device) for table in rope.tables(0, tokens))

    def unpack(self, frame: Frame) -> torch.Tensor:
        one = frame.layout
        tables = one.cells, one.blocks, one.overflow, one.coefficients, one.tokens
        return packed.unpack_symbols(frame.data, *tables)[0]

    def rebuild(
        self, frame: Frame, symbols: torch.Tensor, x: torch.Tensor | None, build: Callable[..., Any]
    ) -> list[torch.Tensor]:
        layers = []
        for own, classes, one in zip(
            symbols.split(frame.widths), frame.classes, frame.maps, strict=True
        ):
            x = build(own, *classes, x, one.bias, one.down, one.up, one.inverse)
            layers.append(x)
        return layers

    def scatter(self, frame: Frame, layers: list[torch.Tensor]) -> None:
        for x, pools in zip(layers, frame.pools, strict=True):
            packed.scatter_layer(x, self.rows, self.cos, self.sin, 1.0, *pools)

    def decode(self) -> None:
        """All layers, from bytes to the pools."""
        x = None
        for frame in self.frames:
            layers = self.rebuild(frame, self.unpack(frame), x, packed.rebuild_layer)
            self.scatter(frame, layers)
            x = layers[-1]

    def check(self) -> float:
        """Largest error of the last layer against the reference, relative to its largest value."""
        found = expected = None
        for frame in self.frames:
            symbols = self.unpack(frame)
            found = self.rebuild(frame, symbols, found, packed.rebuild_layer)[-1]
            expected = self.rebuild(frame, symbols, expected, rebuild_layer_reference)[-1]
        assert found is not None
        assert expected is not None
        error = float((found - expected).abs().max() / expected.abs().max())
        if not error < 1e-4:
            raise SystemExit(f"the kernels are wrong: {error:.2e} from the reference")
        return error

    def steps(self) -> dict[str, Callable[[], None]]:
        """Each step alone, over all layers; layers are rebuilt upon, and pools filled with, the
        first frame's last one, so that only one layer is held."""
        symbols = [self.unpack(frame) for frame in self.frames]
        pairs = list(zip(self.frames, symbols, strict=True))
        below = self.rebuild(*pairs[0], None, packed.rebuild_layer)[-1]

        def unpack() -> None:
            for frame in self.frames:
                self.unpack(frame)

        def rebuild() -> None:
            for pair in pairs:
                self.rebuild(*pair, below, packed.rebuild_layer)

        def scatter() -> None:
            for frame in self.frames:
                self.scatter(frame, [below] * len(frame.pools))

        return {"unpack": unpack, "rebuild": rebuild, "scatter": scatter}


def measure(work: Callable[[], object], repeats: int, device: str, size: int) -> dict[str, float]:
    """Seconds of ``work`` (median, fastest, slowest) and GB/s of the median, for ``size`` bytes."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds = []
    for _ in range(repeats + 2):  # the first two compile and warm up
        wait()
        start = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - start)
    seconds = seconds[2:]
    median = statistics.median(seconds)
    return {
        "median_s": median,
        "min_s": min(seconds),
        "max_s": max(seconds),
        "gb_per_s": size / median / 1e9,
    }


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="write the result here too")
    args = parser.parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    layers, heads, dim = SHAPES[args.shape]
    layers = min(layers, args.layers or layers)
    maps = make_maps(layers, 2 * heads * dim, device)
    decoder = Decoder(make_frames(maps, args.tokens, heads, dim, device), args.tokens, dim)
    size = layers * args.tokens * 2 * heads * dim * 2
    one = torch.zeros(size, dtype=torch.uint8, device=device)
    two = torch.zeros_like(one)

    def timed(work: Callable[[], object]) -> dict[str, float]:
        return measure(work, args.repeats, device, size)

    result = {
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"cpu, {platform.machine()}",
        "version": "triton" if device == "cuda" else "reference",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "shape": args.shape,
        "layers": layers,
        "tokens": args.tokens,
        "repeats": args.repeats,
        "kv_bytes": size,
        "frame_bytes": sum(len(frame.data) for frame in decoder.frames),
        "error": decoder.check(),
        "decode": timed(decoder.decode),
        "steps": {name: timed(work) for name, work in decoder.steps().items()},
        "device_copy": timed(lambda: two.copy_(one)),
    }
    if device == "cuda":
        host = torch.zeros(size, dtype=torch.uint8, pin_memory=True)
        result["host_to_device"] = timed(lambda: two.copy_(host, non_blocking=True))
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
