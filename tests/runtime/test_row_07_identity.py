"""Row 7 at the server: each thing that decides what stored KV means changes the fingerprint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from sglang.srt.runtime_context import get_parallel
from small_profile import PROFILE
from tiny_model import write_model

from krul_sglang.codec import frames
from krul_sglang.codec.base import KVSpec
from krul_sglang.config import KrulConfig, KrulConfigError
from krul_sglang.runtime.disk import identity
from krul_sglang.store.disk.digest import fingerprint_of

SPEC = KVSpec(3, 2, 32, 32, "float32")
ARGS = {
    "quantization": None,
    "json_model_override_args": "{}",
    "revision": None,
    "load_format": "auto",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", "llama")


def fingerprint(
    model: Path,
    *,
    spec: KVSpec = SPEC,
    policy: str = "lossless",
    profile: Any = None,
    rank: int = 0,
    ranks: int = 1,
    page: int = 1,
    dtype: str = "torch.float32",
    **args: object,
) -> bytes:
    ctx = SimpleNamespace(
        server_args=SimpleNamespace(model_path=str(model), **{**ARGS, **args}),
        model_config=SimpleNamespace(dtype=dtype),
        params=SimpleNamespace(page_size=page),
        tp_rank=rank,
    )
    config = replace(KrulConfig(), dir=model.parent / "tier", policy=policy)
    # The widths that SGLang checks against each other where an earlier test has set them.
    with get_parallel().override(tp_size=ranks, attn_tp_size=ranks, moe_tp_size=ranks):
        return fingerprint_of(identity(config, ctx, spec, profile))


def test_the_same_server_finds_its_own(model) -> None:
    assert fingerprint(model) == fingerprint(model)


@pytest.mark.parametrize(
    "change",
    [
        {"spec": replace(SPEC, dtype="bfloat16")},
        {"spec": replace(SPEC, layers=4)},
        {"spec": replace(SPEC, kv_heads=1)},
        {"spec": replace(SPEC, v_head_dim=16)},
        {"policy": "predictive"},
        {"profile": PROFILE},
        {"rank": 1},
        {"ranks": 2},
        {"page": 16},
        {"dtype": "torch.bfloat16"},
        {"quantization": "awq"},
        {"json_model_override_args": '{"rope_theta": 1}'},
        {"revision": "main"},
        {"load_format": "dummy"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_setting_alone(model, change) -> None:
    assert fingerprint(model, **change) != fingerprint(model)


def test_another_profile(model) -> None:
    other = replace(PROFILE, rope=replace(PROFILE.rope, scale=2.0))
    assert fingerprint(model, profile=PROFILE) != fingerprint(model, profile=other)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 20000.0},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rms_norm_eps": 1e-3},
        {"vocab_size": 256},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_models_configuration(model, change) -> None:
    before = fingerprint(model)
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert fingerprint(model) != before


def test_the_models_weights(model) -> None:
    """Of the same size and shape; a fine-tune changes all of them."""
    before = fingerprint(model)
    (path,) = model.glob("*.safetensors")
    save_file({name: 1.01 * w for name, w in load_file(path).items()}, path)
    assert fingerprint(model) != before


def test_the_payloads_format(model, monkeypatch) -> None:
    before = fingerprint(model)
    monkeypatch.setattr(frames, "VERSION", frames.VERSION + 1)
    assert fingerprint(model) != before


def test_without_weights_there_is_nothing_to_bind_to(model) -> None:
    for path in model.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(KrulConfigError, match="bound to the model"):
        fingerprint(model)
