"""What a server answers, for two layers more or less."""

from __future__ import annotations

from typing import Any

LINE = {
    "id": "1f97bc132f65",
    "age_seconds": 24.0,
    "tokens": 1100,
    "device_tokens": 11,
    "stored_tokens": 1089,
    "exact_tokens": 11,
    "lossy_tokens": 1089,
    "segments": 2,
    "stored_bytes": 2_173_342,
    "raw_bytes": 50_181_120,
    "ratio": 23.089,
    "codecs": ["predictive"],
    "waiting_tokens": 0,
    "lost_tokens": 0,
    "dp_rank": 0,
}


def layer(number: int, **changes: Any) -> dict[str, Any]:
    below = [number - 1] if number else []
    return {
        "layer": number,
        "references": below,
        "dropped": 0.0,
        "step": 0.00018,
        "error": 1.2e-6,
        "stored_bytes": 45_600,
        "raw_bytes": 1_672_704,
        "ratio": 36.7,
        "in_shared_frame": True,
        "classes": [0.1, 0.2, 0.3, 0.4],
        **changes,
    }


def conversation(count: int = 4, **changes: Any) -> dict[str, Any]:
    segments = [
        {
            "start": 11 + 1024 * n,
            "tokens": tokens,
            "state": state,
            "codec": codec,
            "exact": False,
            "step": step,
            "stored_bytes": stored,
            "raw_bytes": 1000 * tokens,
            "ratio": 23.9 if stored else None,
        }
        for n, (tokens, state, codec, step, stored) in enumerate(
            ((1024, "sealed", "predictive", 0.000171, 1_970_000), (65, "staged", None, None, 0))
        )
    ]
    half = list(range(0, count, 2))
    return {
        **LINE,
        "segments": segments,
        "header_bytes": 1210,
        "class_factors": [0.354, 0.595, 1.0, 1.68],
        "classed_tokens": 1089,
        "layers": [layer(n) for n in range(count)],
        "similarity": {
            "measure": "correlation",
            "tokens": 1089,
            "layers": half,
            "matrix": [[1.0 if a == b else 0.25 for a in half] for b in half],
        },
        **changes,
    }
