"""RoPE: our frequencies against transformers', and the rotation against its inverse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from krul_sglang.profile.rope import RopeError, rope_of

KINDS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 512,
        "mscale": 1.0,
        "mscale_all_dim": 0.8,
        "beta_fast": 16,
    },
]


def config_of(params: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=2048,
        rope_parameters={"rope_theta": 50000.0, **params},
    )


@pytest.mark.parametrize("params", KINDS, ids=lambda p: p["rope_type"])
def test_frequencies_are_those_of_transformers(params: dict[str, Any]) -> None:
    config = config_of(params)
    rope = rope_of(config.to_dict(), "transformers")
    if params["rope_type"] == "default":
        inv_freq, scale = LlamaRotaryEmbedding(config).inv_freq, 1.0
    else:
        inv_freq, scale = ROPE_INIT_FUNCTIONS[params["rope_type"]](config, torch.device("cpu"))
    torch.testing.assert_close(rope.inv_freq, inv_freq, rtol=1e-6, atol=0)
    assert rope.scale == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize("params", KINDS, ids=lambda p: p["rope_type"])
def test_undo_gives_back_what_the_model_rotated(params: dict[str, Any]) -> None:
    config = config_of(params)
    k = torch.randn(7, 2, 64, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(900, 907)[None]
    embedding = LlamaRotaryEmbedding(config)
    cos, sin = embedding(k, positions)
    rotated = apply_rotary_pos_emb(k.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)[1]
    rope = rope_of(config.to_dict(), "transformers")
    tables = rope.tables(900, 7)
    undone = rope.undo(rotated[0].transpose(0, 1).contiguous(), tables)
    torch.testing.assert_close(undone, k, rtol=0, atol=2e-6)
    torch.testing.assert_close(rope.undo(rope.apply(k, tables), tables), k, rtol=0, atol=2e-6)


def test_old_and_new_spelling_mean_the_same() -> None:
    shape = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 2048}
    old = {**shape, "rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {**shape, "rope_parameters": {"rope_theta": 5e4, "rope_type": "linear", "factor": 2.0}}
    assert torch.equal(rope_of(old, "sglang").inv_freq, rope_of(new, "sglang").inv_freq)


def test_a_partial_rotation_leaves_the_rest_alone() -> None:
    shape = {"hidden_size": 256, "num_attention_heads": 4, "partial_rotary_factor": 0.5}
    rope = rope_of(shape, "sglang")
    k = torch.randn(3, 2, 64)
    undone = rope.undo(k, rope.tables(5, 3))
    assert torch.equal(undone[..., 32:], k[..., 32:])
    assert not torch.equal(undone[..., :32], k[..., :32])


@pytest.mark.parametrize(
    "params",
    [{"rope_type": "longrope"}, {"rope_type": "default", "mrope_section": [16, 24, 24]}],
    ids=str,
)
def test_what_cannot_be_undone_is_said(params: dict[str, Any]) -> None:
    shape = {"hidden_size": 256, "num_attention_heads": 4, "rope_scaling": params}
    with pytest.raises(RopeError, match="not supported"):
        rope_of(shape, "sglang")
