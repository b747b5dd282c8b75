"""Calibration of a tiny random model of each family: it runs, and the profile serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_model import write_model

from krul_sglang.codec.base import KVRun, KVSpec
from krul_sglang.codec.predictive import PredictiveCodec
from krul_sglang.profile.base import ProfileError
from krul_sglang.profile.calibrate import calibrate
from krul_sglang.profile.file import fingerprint, load_profile
from krul_sglang.quality.forward import history_kv, load_model
from krul_sglang.strategy.base import Strategy

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": None},
}
TEXTS = ["".join(chr(33 + (i * i + s) % 90) for i in range(1000)) for s in range(5)]


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
}


def save_model(root: Path, family: str) -> None:
    write_model(root, family, **{**SMALL, **FAMILIES[family]})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_each_family(family: str, tmp_path: Path) -> None:
    save_model(tmp_path, family)
    stages: list[tuple[str, float]] = []
    out = tmp_path / "profile.safetensors"
    made = calibrate(tmp_path, TEXTS, out, lambda *stage: stages.append(stage))
    assert stages[-1] == ("measuring", pytest.approx(1.0))
    assert [share for _, share in stages] == sorted(share for _, share in stages)
    profile = load_profile(out, fingerprint(tmp_path))
    assert profile.id == made.id
    for column in zip(*profile.curve, strict=True):
        assert list(column) == sorted(set(column))
    assert all(far > 0 for far in profile.novelty)
    model, _ = load_model(tmp_path)
    k, v = history_kv(model, [5 + i % 90 for i in range(200)])
    spec = KVSpec(k.shape[0], k.shape[2], k.shape[3], v.shape[3], "float32")
    payload = PredictiveCodec(spec, profile).encode(KVRun(k, v, 0), Strategy("predictive", 0.01))
    assert len(payload) * 4 < k.nbytes + v.nbytes


def test_a_rank_gets_its_own_heads(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    ranks = [calibrate(tmp_path, TEXTS, None, tp_rank=r, tp_size=2) for r in range(2)]
    assert [p.kv_heads for p in ranks] == [1, 1]
    assert ranks[0].id != ranks[1].id
    assert ranks[1].fingerprint["tp_rank"] == "1"


def test_too_little_text_is_said(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    with pytest.raises(ProfileError, match="3 are needed"):
        calibrate(tmp_path, TEXTS[:1], None)


def test_ids_the_model_does_not_know_are_said(tmp_path: Path) -> None:
    write_model(tmp_path, "llama", vocab_size=20)
    with pytest.raises(OSError, match="knows 20 tokens"):
        calibrate(tmp_path, TEXTS, None)
