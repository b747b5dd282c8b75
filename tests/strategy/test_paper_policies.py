"""The policies that merge layers: sampled attention, and the pairs they come to."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from krul_sglang.codec.base import KVSpec
from krul_sglang.codec.registry import make_codec
from krul_sglang.quality.forward import ATTENTION_ROWS, attention_rows, history_kv
from krul_sglang.quality.measure import (
    History,
    package_policies,
    selecting_policy,
)
from krul_sglang.similarity.layers import similarity_of_maps
from krul_sglang.strategy.base import Strategy
from krul_sglang.strategy.fixed import fixed_pairs
from krul_sglang.strategy.paper import select_pairs

LAYERS = 8
SPEC = KVSpec(LAYERS, 2, 16, 16, "bfloat16")


def tiny_model(family: str) -> torch.nn.Module:
    config = AutoConfig.for_model(
        family,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=50,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 3  # random weights are too small for attention to matter
    return model.requires_grad_(False)


MODEL = tiny_model("llama")


def history(tokens: int, attention: torch.Tensor | None = None) -> History:
    ids = torch.arange(tokens).mul(7).remainder(50).tolist()
    k, v = (x.bfloat16() for x in history_kv(MODEL, ids))
    return History(
        k, v, 0, lambda: attention_rows(MODEL, ids, k, v) if attention is None else attention
    )


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("tokens", [200, ATTENTION_ROWS, 9])
def test_rows_are_those_of_a_full_forward_pass(family: str, tokens: int) -> None:
    model = tiny_model(family)
    ids = torch.randint(50, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    kept = model.config._attn_implementation
    rows = attention_rows(model, ids, *history_kv(model, ids))
    assert model.config._attn_implementation == kept
    model.set_attn_implementation("eager")
    full = model(torch.tensor([ids]), output_attentions=True).attentions
    expected = torch.cat(full)[:, :, -ATTENTION_ROWS:]
    assert rows.shape == (LAYERS, 4, min(tokens, ATTENTION_ROWS), tokens)
    torch.testing.assert_close(rows, expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:3]))


def test_a_model_that_reports_no_attention_is_refused_and_left_as_it_was() -> None:
    class Silent:
        config = SimpleNamespace(_attn_implementation="sdpa")

        def set_attn_implementation(self, name: str) -> None:
            self.config._attn_implementation = name

        def __call__(self, *_: object, **__: object) -> SimpleNamespace:
            return SimpleNamespace(attentions=None)

    model, x = Silent(), torch.zeros(LAYERS, 10, 2, 16)
    with pytest.raises(ValueError, match="does not report"):
        attention_rows(model, [0] * 10, x, x)
    assert model.config._attn_implementation == "sdpa"


def test_fixed_merges_the_deep_half_and_asks_for_no_attention() -> None:
    run = history(120)
    merge = make_codec("pair_merge", SPEC)

    def refuse() -> torch.Tensor:
        raise AssertionError

    asked = History(run.k, run.v, 0, refuse)
    restored = package_policies(["fixed"], SPEC, None, 0.01)["fixed"](asked)
    pairs = fixed_pairs(LAYERS)
    payload = merge.encode(run, Strategy("pair_merge", pairs=pairs))
    assert restored.stored_bytes == len(payload)
    for layer in range(LAYERS):
        same = torch.equal(restored.k[layer], run.k[layer])
        assert same == (layer < LAYERS // 2)


def test_paper_merges_the_pairs_it_selects() -> None:
    rows = torch.rand(LAYERS, 4, 8, 120, generator=torch.Generator().manual_seed(5))
    rows[..., 0] = 300
    rows[[3, 6]] = rows[[1, 1]]
    rows[4, ..., 60] = 900  # an input-dependent layer
    rows /= rows.sum(-1, keepdim=True)
    run = history(120, rows)
    pairs = select_pairs(similarity_of_maps(rows), len(fixed_pairs(LAYERS)))
    assert pairs != fixed_pairs(LAYERS)
    assert len(pairs) == len(fixed_pairs(LAYERS))
    restored = package_policies(["paper"], SPEC, None, 0.01)["paper"](run)
    changed = {n for n in range(LAYERS) if not torch.equal(restored.k[n], run.k[n])}
    assert changed == {layer for pair in pairs for layer in pair}
    assert 4 not in changed


def test_a_policy_may_use_the_pairs_as_it_likes() -> None:
    seen = []

    def strategy(pairs: tuple[tuple[int, int], ...]) -> Strategy:
        seen.append(pairs)
        return Strategy("pair_merge")

    run = history(100, torch.eye(120)[None, None, :8].expand(LAYERS, 1, 8, 120))
    restored = selecting_policy(make_codec("pair_merge", SPEC), 2, strategy)(run)
    assert torch.equal(restored.k, run.k)
    assert len(seen[0]) == 2


def test_an_unknown_policy_is_refused() -> None:
    for name, why in (
        ("fixd", "did you mean 'fixed'"),
        ("paper@0.01", "takes no budget"),
        ("predictive@0", "above 0"),
    ):
        with pytest.raises(ValueError, match=why):
            package_policies([name], SPEC, None, 0.01)
