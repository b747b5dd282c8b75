"""The profile's file: safetensors, with the fingerprint in its metadata."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from krul_sglang.profile.base import LayerMaps, Profile, ProfileError
from krul_sglang.profile.rope import Rope

FORMAT = "4"
_SAMPLE = 1 << 16
_STRIDE = 1 << 24
_LAYER_TENSORS = ("bias", "down", "up", "forward", "inverse", "sigma", "token", "attended")


def fingerprint(model_dir: str | Path, tp_rank: int = 0, tp_size: int = 1) -> dict[str, str]:
    """What a profile of this model and rank is bound to.

    Weights are hashed by file size and 64 KiB in every 16 MiB: a second even for a
    large model, and a fine-tune changes all of them. Raises :class:`ProfileError`
    where ``model_dir`` holds no config or no weights.
    """
    root = Path(model_dir)
    if not root.is_dir():
        raise ProfileError(f"{root}: no such folder; give the model's")
    try:
        config = json.loads((root / "config.json").read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ProfileError(f"{root}: no readable config.json ({reason})") from error
    # In this order: a profile may lie beside the weights and is none of them.
    found = (sorted(root.glob(p)) for p in ("model*.safetensors", "*.safetensors", "*.bin"))
    files = next(filter(None, found), None)
    if not files:
        raise ProfileError(f"{root}: no weights (*.safetensors or *.bin)")
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as stream:
            for offset in range(0, size, _STRIDE):
                stream.seek(offset)
                digest.update(stream.read(_SAMPLE))
    rope = {name: config.get(name) for name in ("rope_theta", "rope_scaling", "rope_parameters")}
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    # Written by tools into copies of one model; says nothing about its KV.
    passing = {"_name_or_path", "transformers_version"}
    settled = {name: value for name, value in config.items() if name not in passing}
    return {
        "format": FORMAT,
        "weights": digest.hexdigest()[:16],
        "config": _short(settled),
        "rope": _short(rope),
        "dtype": str(dtype),
        "tp_rank": str(tp_rank),
        "tp_size": str(tp_size),
    }


def _short(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def save_profile(profile: Profile, path: str | Path) -> None:
    """Write ``path`` atomically. Raises OSError, a full disk included."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {"rope.inv_freq": profile.rope.inv_freq.contiguous()}
    for index, maps in enumerate(profile.layers):
        for name in _LAYER_TENSORS:
            tensors[f"{index}.{name}"] = getattr(maps, name).contiguous().clone()
    metadata = {f"fingerprint.{name}": text for name, text in profile.fingerprint.items()}
    shape = {
        "layers": len(profile.layers),
        "kv_heads": profile.kv_heads,
        "head_dim": profile.head_dim,
        "v_head_dim": profile.v_head_dim,
        "rope_scale": profile.rope.scale,
        "curve": [list(point) for point in profile.curve],
        "novelty": list(profile.novelty),
        "id": profile.id,
    }
    metadata["shape"] = json.dumps(shape)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        save_file(tensors, str(draft), metadata)
        os.replace(draft, target)
    except SafetensorError as error:
        raise OSError(f"{target}: cannot be written ({error})") from error
    finally:
        draft.unlink(missing_ok=True)


def load_profile(path: str | Path, expected: Mapping[str, str] | None = None) -> Profile:
    """The profile at ``path``.

    expected: the model's :func:`fingerprint`; every field is compared. Raises
    :class:`ProfileError` naming the first that differs, or saying how the file is
    damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            found = {
                name.removeprefix("fingerprint."): text
                for name, text in metadata.items()
                if name.startswith("fingerprint.")
            }
            _compare(found, {"format": FORMAT} if expected is None else expected, path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ProfileError(f"{path}: damaged or truncated profile ({error})") from error
    try:
        shape = json.loads(metadata["shape"])
        layers = [
            LayerMaps(**{name: tensors[f"{index}.{name}"] for name in _LAYER_TENSORS})
            for index in range(int(shape["layers"]))
        ]
        profile = Profile(
            kv_heads=int(shape["kv_heads"]),
            head_dim=int(shape["head_dim"]),
            v_head_dim=int(shape["v_head_dim"]),
            rope=Rope(tensors["rope.inv_freq"], float(shape["rope_scale"])),
            layers=layers,
            curve=[(float(step), float(kl), float(err)) for step, kl, err in shape["curve"]],
            novelty=[float(distance) for distance in shape["novelty"]],
            fingerprint=found,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ProfileError(f"{path}: damaged profile ({error!r})") from error
    _check_shapes(profile, path)
    _check_curve(profile, path)
    if profile.id != shape.get("id"):
        raise ProfileError(f"{path}: damaged profile (id differs from its contents)")
    return profile


def _compare(found: Mapping[str, str], expected: Mapping[str, str], path: str | Path) -> None:
    for name, want in expected.items():
        if found.get(name) != want:
            raise ProfileError(
                f"{path}: {name} of the profile is {found.get(name)!r}, of the model {want!r}; "
                "run `krul calibrate` again"
            )


def _check_curve(profile: Profile, path: str | Path) -> None:
    columns = list(zip(*profile.curve, strict=True))
    rising = all(a < b for column in columns for a, b in itertools.pairwise(column))
    figures = [x for column in columns for x in column] + list(profile.novelty)
    if len(profile.curve) < 2 or not rising or not all(0 < x < math.inf for x in figures):
        raise ProfileError(f"{path}: damaged profile (its curve does not rise)")


def _check_shapes(profile: Profile, path: str | Path) -> None:
    dim = profile.kv_heads * (profile.head_dim + profile.v_head_dim)
    for index, maps in enumerate(profile.layers):
        rank, kept = maps.down.shape[-1], len(maps.sigma)
        wanted = {
            "bias": (dim,),
            "down": (dim, rank),
            "up": (rank, dim),
            "forward": (dim, kept),
            "inverse": (kept, dim),
            "sigma": (kept,),
            "token": (dim + 1,),
            "attended": (dim + 3,),
        }
        for name, size in wanted.items():
            tensor = getattr(maps, name)
            if tuple(tensor.shape) != size or tensor.dtype != torch.float32:
                raise ProfileError(f"{path}: damaged profile (shape of {index}.{name})")
