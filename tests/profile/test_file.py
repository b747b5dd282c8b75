"""The profile's file: everything comes back, nothing foreign or damaged is accepted."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from krul_sglang.codec.base import KVSpec
from krul_sglang.profile.base import LayerMaps, Profile, ProfileError
from krul_sglang.profile.file import fingerprint, load_profile, save_profile
from krul_sglang.profile.rope import Rope


def layer(rank: int, seed: int) -> LayerMaps:
    gen = torch.Generator().manual_seed(seed)

    def some(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=gen)

    return LayerMaps(
        some(32),
        some(32, rank),
        some(rank, 32),
        some(32, 9),
        some(9, 32),
        some(9),
        some(33),
        some(35),
    )


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    root.mkdir()
    (root / "config.json").write_text(json.dumps({"rope_theta": 1e4, "dtype": "bfloat16"}))
    save_file({"w": torch.arange(1000.0)}, str(root / "model.safetensors"))
    return root


def make(model_dir: Path) -> Profile:
    curve = [(0.1, 0.001, 0.01), (0.2, 0.01, 0.04)]
    layers = [layer(0, 1), layer(5, 2)]
    return Profile(2, 8, 8, Rope(torch.rand(4), 1.5), layers, curve, fingerprint(model_dir), [1.0])


def test_everything_comes_back(model_dir: Path, tmp_path: Path) -> None:
    profile = make(model_dir)
    path = tmp_path / "deep" / "p.safetensors"
    save_profile(profile, path)
    back = load_profile(path, fingerprint(model_dir))
    assert back.id == profile.id
    assert list(back.curve) == list(profile.curve)
    assert back.fingerprint == profile.fingerprint
    assert back.rope.scale == 1.5
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_foreign_profile_is_refused_by_field(model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    save_profile(make(model_dir), path)
    with pytest.raises(ProfileError, match="tp_size of the profile is '1', of the model '2'"):
        load_profile(path, fingerprint(model_dir, 0, 2))
    save_file({"w": torch.arange(1000.0) + 1}, str(model_dir / "model.safetensors"))
    with pytest.raises(ProfileError, match="weights of the profile"):
        load_profile(path, fingerprint(model_dir))
    (model_dir / "config.json").write_text(json.dumps({"rope_theta": 2e4, "dtype": "bfloat16"}))
    with pytest.raises(ProfileError, match="of the profile is"):
        load_profile(path, fingerprint(model_dir))


def test_damage_is_noticed(model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    save_profile(make(model_dir), path)
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ProfileError, match="damaged"):
            load_profile(path)
    for at in range(len(whole) - 400, len(whole), 37):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ProfileError, match="damaged"):
            load_profile(path)
    with pytest.raises(ProfileError, match="damaged"):
        load_profile(tmp_path / "absent.safetensors")


def test_a_model_without_weights_is_said(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"config\.json"):
        fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ProfileError, match="no weights"):
        fingerprint(tmp_path)


def test_another_shape_is_refused(model_dir: Path) -> None:
    make(model_dir).check_spec(KVSpec(2, 2, 8, 8, "bfloat16"))
    with pytest.raises(ProfileError, match="kv_heads 2, the model has 4"):
        make(model_dir).check_spec(KVSpec(2, 4, 8, 8, "bfloat16"))


def test_a_budget_is_looked_up_between_measured_points(model_dir: Path) -> None:
    profile = make(model_dir)
    assert profile.step_for(0.001) == pytest.approx(0.1)
    assert profile.step_for(0.01) == pytest.approx(0.2)
    assert 0.1 < profile.step_for(0.003) < 0.2
    assert profile.step_for(1e-5) < 0.1
    for step in (0.02, 0.1, 0.17, 0.25):
        kl, error = profile.cost_at(step)
        assert profile.step_for(kl) == pytest.approx(step)
        assert error == pytest.approx(step**2)
    assert profile.step_for(5.0) == profile.step_for(9.0) > 0.2
    with pytest.raises(ValueError, match="exact"):
        profile.step_for(0.0)


def test_no_room_for_the_file_is_an_oserror_and_leaves_nothing(model_dir: Path, tmp_path) -> None:
    """A file size limit stands in for a full disk: both fail the write itself."""
    profile, out = make(model_dir), tmp_path / "out"
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, kept[1]))
    try:
        with pytest.raises(OSError, match="cannot be written"):
            save_profile(profile, out / "p.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    assert list(out.iterdir()) == []
