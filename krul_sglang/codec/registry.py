"""Codecs by name. Each is imported when it is first made, never before."""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING

from krul_sglang.codec.base import Codec, KVSpec

if TYPE_CHECKING:
    from krul_sglang.profile.base import Profile

_CLASSES = {
    "lossless": ("krul_sglang.codec.lossless", "LosslessCodec"),
    "pair_merge": ("krul_sglang.codec.pair_merge", "PairMergeCodec"),
    "predictive": ("krul_sglang.codec.predictive", "PredictiveCodec"),
}
_NEEDS_PROFILE = frozenset({"predictive"})


def codec_names() -> tuple[str, ...]:
    """Every codec's name, exact ones first."""
    return tuple(_CLASSES)


def make_codec(name: str, spec: KVSpec, profile: Profile | None = None) -> Codec:
    """The codec called ``name`` for KV of shape ``spec``; ``profile`` where it needs one.

    Raises ValueError for an unknown name (with the nearest known one) and where
    a profile is needed and none is given.
    """
    if name not in _CLASSES:
        near = difflib.get_close_matches(name, _CLASSES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown codec {name!r} (known: {', '.join(_CLASSES)}){hint}")
    module, attribute = _CLASSES[name]
    cls = getattr(importlib.import_module(module), attribute)
    if name not in _NEEDS_PROFILE:
        return cls(spec)
    if profile is None:
        raise ValueError(f"codec {name!r} needs a profile: run `krul calibrate`")
    return cls(spec, profile)
