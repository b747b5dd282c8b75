"""The rate-distortion plot of docs/quality.md, from the JSON of `krul quality` or quality.py.

python benchmarks/plot_quality.py quality.json docs/quality.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

FLOOR = 1e-5
"""KL below this (exact policies) is drawn on the lower edge."""
CURVE = "predictive"


def points(policies: dict[str, Any]) -> dict[str, tuple[float, float, float, float]]:
    """Ratio, mean KL and its interval of every policy that stores anything."""
    return {
        name: (row["ratio"], max(FLOOR, row["kl_mean"]), *(max(FLOOR, x) for x in row["kl_ci95"]))
        for name, row in policies.items()
        if row.get("ratio")
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    result = json.loads(options.json.read_text())
    found = points(result["policies"])
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    curve = sorted(p for name, p in found.items() if name.partition("@")[0] == CURVE)
    if curve:
        ratio, kl, low, high = zip(*curve, strict=True)
        axes.fill_between(ratio, low, high, color="C0", alpha=0.2, linewidth=0)
        axes.plot(ratio, kl, color="C0", marker="o", label=f"{CURVE}, by budget in nats")
        axes.legend(loc="upper right")
    for index, (name, (ratio, kl, low, high)) in enumerate(
        (name, p) for name, p in found.items() if name.partition("@")[0] != CURVE
    ):
        axes.errorbar(
            ratio,
            kl,
            [[kl - low], [high - kl]],
            fmt="s",
            color=f"C{1 + index % 9}",
            capsize=3,
        )
        axes.annotate(name, (ratio, kl), xytext=(7, 4), textcoords="offset points", fontsize=9)
    for name, (ratio, kl, *_) in found.items():
        if name.partition("@")[0] == CURVE:
            budget = name.partition("@")[2] or "0.01"
            axes.annotate(budget, (ratio, kl), xytext=(4, -12), textcoords="offset points", size=8)
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("bfloat16 KV over stored bytes (right is smaller)")
    axes.set_ylabel("mean KL from the full cache, nats (down is better)")
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.set_xticks([1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24])
    axes.minorticks_off()
    count = max(row["conversations"] for row in result["policies"].values())
    axes.set_title(
        f"{count} conversations, {result['history']} tokens restored, the next "
        f"{result['continuation']} compared",
        fontsize=10,
    )
    axes.grid(alpha=0.3)
    figure.savefig(options.out, dpi=130)


if __name__ == "__main__":
    main()
