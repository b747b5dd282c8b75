"""A conversation's detail: segments of every kind, against what went into them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from small_profile import LAYERS, PROFILE, make_run, spec_of

from krul_sglang.codec.layout import FACTORS
from krul_sglang.codec.lossless import LosslessCodec
from krul_sglang.codec.pair_merge import PairMergeCodec
from krul_sglang.codec.predictive import PredictiveCodec
from krul_sglang.inspection.detail import detail, pieces_of, summary
from krul_sglang.similarity.layers import LayerSimilarity
from krul_sglang.store.memory import MemoryStore
from krul_sglang.store.slots import slot_runs
from krul_sglang.strategy.base import EXACT, Strategy

SPEC = spec_of("float32")
STEP = 0.1


class Unguarded(PredictiveCodec):
    """One step for all, whatever is dropped."""

    def encode(self, run, strategy: Strategy) -> bytes:
        return self.encode_at(run, strategy, STEP)[0]


@pytest.fixture
def store():
    codecs = {
        "lossless": LosslessCodec(SPEC),
        "pair_merge": PairMergeCodec(SPEC),
        "predictive": Unguarded(SPEC, PROFILE),
    }
    made = MemoryStore(SPEC, 1 << 26, codecs.__getitem__, "lossless")
    yield made
    made.close()


def classes_of(tokens: int, seed: int) -> np.ndarray:
    """uint8 ``[layers, tokens]``."""
    return np.random.default_rng(seed).integers(0, 4, (LAYERS, tokens), np.uint8)


def attention_of(tokens: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    common = rng.normal(80, 20, tokens)
    rows = [common + rng.normal(0, 20, tokens) for _ in range(0, LAYERS, 2)]
    return np.repeat(rows, 2, 0)[:LAYERS].clip(0, 255).astype(np.uint8)


def stage(store, tokens: int, start: int, strategy: Strategy = EXACT) -> torch.Tensor:
    run = make_run(tokens, start + 1, "float32", start)
    return store.stage(run, strategy, exact=strategy is EXACT)[1]


def lossy(tokens: int, seed: int, **kwargs) -> Strategy:
    return Strategy(
        "predictive",
        0.01,
        classes_of(tokens, seed).tobytes(),
        attention=attention_of(tokens, seed).tobytes(),
        **kwargs,
    )


@pytest.fixture
def conversation(store) -> list[torch.Tensor]:
    """Slot ids of an exact opening and two lossy segments, sealed."""
    ids = [
        stage(store, 20, 0),
        stage(store, 60, 20, lossy(60, 1)),
        stage(store, 40, 80, lossy(40, 2, shared=(3,))),
    ]
    assert store.wait_sealed(20)
    return ids


def detailed(store, ids: list[torch.Tensor]) -> dict:
    pieces = pieces_of(store, slot_runs(torch.cat(ids)))
    body = {**summary(pieces), **detail(store, pieces)}
    assert json.loads(json.dumps(body)) == body
    return body


def test_segments_say_what_their_records_say(store, conversation) -> None:
    body = detailed(store, conversation)
    rows = body["segments"]
    assert [(row["start"], row["tokens"]) for row in rows] == [(0, 20), (20, 60), (80, 40)]
    assert [row["codec"] for row in rows] == ["lossless", "predictive", "predictive"]
    assert [row["exact"] for row in rows] == [True, False, False]
    assert [row["step"] for row in rows] == [None, STEP, STEP]
    assert body["codecs"] == ["lossless", "predictive"]
    assert body["stored_bytes"] == sum(row["stored_bytes"] for row in rows)
    assert body["stored_bytes"] == store.totals()["stored_bytes"]
    assert body["raw_bytes"] == store.totals()["raw_bytes"] == 120 * SPEC.token_bytes


def test_layers_add_up_and_average(store, conversation) -> None:
    body = detailed(store, conversation)
    layers = body["layers"]
    total = sum(layer["stored_bytes"] for layer in layers) + body["header_bytes"]
    assert total == body["stored_bytes"]
    assert [layer["references"] for layer in layers] == [[], [0], [1], [2], [3]]
    assert [layer["dropped"] for layer in layers] == [0, 0, 0, 0.4, 0]
    classes = np.concatenate([classes_of(60, 1), classes_of(40, 2)], 1)
    assert body["class_factors"] == list(FACTORS)
    assert body["classed_tokens"] == 100
    for layer, own in zip(layers, classes, strict=True):
        assert layer["classes"] == [pytest.approx((own == c).mean(), abs=1e-4) for c in range(4)]
        steps = [math.log(STEP * FACTORS[c]) for c in own]
        assert layer["step"] == pytest.approx(math.exp(sum(steps) / len(steps)))
    errors = [
        [layer.error for layer in store.open(store.get(int(ids[0]) >> 24)).describe().layers]
        for ids in conversation[1:]
    ]
    for n, layer in enumerate(layers):
        assert layer["error"] == pytest.approx(0.6 * errors[0][n] + 0.4 * errors[1][n])


def test_similarity_is_that_of_both_segments_tokens(store, conversation) -> None:
    found = detailed(store, conversation)["similarity"]
    codes = np.concatenate([attention_of(60, 1), attention_of(40, 2)], 1)[::2]
    assert (found["measure"], found["tokens"], found["layers"]) == ("correlation", 100, [0, 2, 4])
    np.testing.assert_allclose(found["matrix"], np.corrcoef(codes), atol=2e-4)


def test_the_papers_distances_are_shown_as_they_were_measured(store) -> None:
    x = torch.randn(LAYERS, 3, generator=torch.Generator().manual_seed(0)).double()
    similarity = LayerSimilarity(torch.zeros(LAYERS).double(), torch.cdist(x, x))
    strategy = Strategy("pair_merge", pairs=((1, 3),), similarity=similarity)
    ids = stage(store, 50, 10, strategy)
    assert store.wait_sealed(20)
    body = detailed(store, [ids])
    assert body["similarity"]["measure"] == "distance"
    np.testing.assert_allclose(body["similarity"]["matrix"], similarity.distance, atol=1e-4)
    assert [layer["references"] for layer in body["layers"]] == [[], [3], [], [1], []]
    assert {layer["classes"] for layer in body["layers"]} == {None}
    assert {layer["step"] for layer in body["layers"]} == {None}
    assert body["class_factors"] == []


def test_nothing_measured_is_said(store) -> None:
    ids = stage(store, 50, 10)
    assert store.wait_sealed(20)
    assert detailed(store, [ids])["similarity"] is None
    assert detailed(store, [torch.empty(0, dtype=torch.int64)])["segments"] == []


def test_a_branch_has_its_part_of_a_segment(store, conversation) -> None:
    """Tokens 15 to 50: a node of the tree ends in the middle of a segment."""
    body = detailed(store, [conversation[0][15:], conversation[1][:30]])
    rows = body["segments"]
    assert [(row["start"], row["tokens"]) for row in rows] == [(15, 5), (20, 30)]
    whole = store.get(int(conversation[1][0]) >> 24)
    assert rows[1]["stored_bytes"] == round(whole.stored_bytes / 2)
    total = sum(layer["stored_bytes"] for layer in body["layers"]) + body["header_bytes"]
    assert total == body["stored_bytes"]
    assert body["classed_tokens"] == 30


def test_a_segment_that_the_tree_divided_is_one_again(store, conversation) -> None:
    whole = detailed(store, conversation)
    parts = [*conversation[0].split(7), *conversation[1].split(13), conversation[2]]
    assert detailed(store, parts) == whole


def test_what_waits_is_not_lost_is_not_damaged_is_told_apart(store, conversation) -> None:
    damaged, lost = (store.get(int(ids[0]) >> 24) for ids in conversation[:2])
    damaged.payload = damaged.payload[:-1]
    store.mark_lost(lost.id)
    store._encoder._seal = lambda segment: None  # the encoder is busy elsewhere
    ids = stage(store, 30, 120, lossy(30, 3))
    body = detailed(store, [*conversation, ids])
    states = [row["state"] for row in body["segments"]]
    assert states == ["damaged", "lost", "sealed", "staged"]
    assert (body["waiting_tokens"], body["lost_tokens"]) == (30, 60)
    assert body["classed_tokens"] == 40
