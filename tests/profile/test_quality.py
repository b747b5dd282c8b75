"""The measurement itself, on a tiny model: exact is free, crude sharing is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_calibrate import TEXTS, save_model

from krul_sglang.codec.base import KVRun
from krul_sglang.quality.forward import load_model
from krul_sglang.quality.measure import (
    Restored,
    is_held_out,
    measure,
    package_policies,
    read_conversations,
    spec_of,
)


def crude(run: KVRun) -> Restored:
    return Restored(run.k[[0, 0]], run.v[[0, 0]], run.nbytes // 2)


def rounded(run: KVRun) -> Restored:
    return Restored((run.k * 8).round() / 8, (run.v * 8).round() / 8, run.nbytes // 2)


def test_exact_costs_nothing_and_crude_sharing_shows(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    model, tokenizer = load_model(tmp_path)
    file = tmp_path / "c.jsonl"
    rows = [
        {"id": f"{'ab'[i % 2]}/{i}", "messages": [{"role": "user", "content": text}]}
        for i, text in enumerate([*TEXTS, "short"])
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    policies = package_policies(["lossless"], spec_of(model), None, 0.01)
    policies |= {"rounded": rounded, "crude": crude}
    result = measure(model, tokenizer, read_conversations(file), policies, 300, 20)
    assert result["skipped"] == ["b/5"]
    table = result["policies"]
    assert json.loads(json.dumps(table)) == table
    assert table["lossless"]["kl_mean"] == pytest.approx(0, abs=1e-7)
    assert table["lossless"]["top1"] == 1
    assert table["lossless"]["kl_mean"] < table["rounded"]["kl_mean"] < table["crude"]["kl_mean"]
    assert table["crude"]["ratio"] == pytest.approx(2)
    low, high = table["crude"]["kl_ci95"]
    assert low <= table["crude"]["kl_mean"] <= high <= table["crude"]["kl_worst_conversation"]
    assert {row["source"] for row in result["conversations"]["rounded"]} == {"a", "b"}


def test_a_codec_that_refuses_is_replaced_by_lossless(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    spec = spec_of(load_model(tmp_path)[0])
    policy = package_policies(["fixed"], spec, None, 0.01)["fixed"]
    k = torch.full((2, 5, 2, 8), float("inf"), dtype=torch.bfloat16)
    restored = policy(KVRun(k, k, 0))
    assert torch.equal(restored.k, k)


def test_a_line_that_is_no_conversation_is_named(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text('{"id": 1, "messages": []}\n\n{"id": 2}\n')
    with pytest.raises(ValueError, match="line 3"):
        read_conversations(file)


def test_half_of_a_data_set_is_held_out() -> None:
    assert 400 < sum(is_held_out(str(i)) for i in range(1000)) < 600
