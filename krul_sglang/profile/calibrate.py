"""Calibration: from a model's directory to its profile.

Four passes over some twenty sequences of 900 tokens: sampled KV and gradients of what
the model itself expects next, and of their being quoted; what each layer's errors really cost,
by a rough fit; the fit; and the measured divergence of the finished codec on sequences that the
fit did not see, which maps a quality budget to a step.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from krul_sglang.codec.guard import quarters
from krul_sglang.codec.predictive import ROUNDING
from krul_sglang.profile.base import Profile, ProfileError
from krul_sglang.profile.conversations import chat_ids, generate_conversations, technical_texts
from krul_sglang.profile.file import fingerprint, save_profile
from krul_sglang.profile.fit import Samples, fit
from krul_sglang.profile.importance import kv_gradients, quotations
from krul_sglang.profile.rope import Rope, rope_of
from krul_sglang.profile.sensitivity import corrections, layer_costs
from krul_sglang.profile.threads import Threads
from krul_sglang.profile.trial import Trial, heads_of
from krul_sglang.quality.forward import attention_rows, history_kv, load_model
from krul_sglang.similarity.estimate import codes_of_maps
from krul_sglang.similarity.levels import levels_of
from krul_sglang.strategy.base import SINKS

HISTORY = 800
CONTINUATION = 100
FITTED = 18
DRAWS = 1
"""Of gradients from each sequence, of its going on and of its being quoted. Two took twice as long
and were no better, though their nominal step was not the same."""
CUTS = (350, 500, 650, HISTORY)
"""Where a held-out sequence is continued from what was restored. Divergence hardly depends on
how much that is, but it falls with the distance from it: so many short continuations."""
HELD_CHATS, HELD_PROSE = 4, 2
ASKED, ASKED_CUTS, ASKED_NEXT = 4, (500,), 40
"""Fitted sequences on which each layer alone is restored, where they are continued then, and by
how many tokens."""
GENERATED, ANSWER = 64, 140
"""Conversations that the model is asked for, and the longest answer in tokens."""
NOMINAL_KL = 0.0026
"""The step the maps are fitted at: what the metric predicts on the samples, about a
third of what unseen text shows."""
AIM = 0.0025
"""Mean KL that the nominal step should show on held-out text, before the margin: about what the
default budget buys, or finer."""
REFITS = 5
CURVE = (0.3, 0.6, 1.2, 2.4)
"""Measured points, in nominal steps."""
MARGIN = 1.75
"""What nine of ten conversations stay below, against the mean of held-out calibration text,
which is also that of people's: SmolLM2-135M, 60 chats, plays and programs: 1.55 times."""

Text = str | Sequence[dict[str, str]]
Progress = Callable[[str, float], None]


def calibrate(
    model_dir: str | Path,
    texts: Sequence[Text] | None,
    out: str | Path | None,
    progress: Progress | None = None,
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
) -> Profile:
    """Measure the model in ``model_dir`` and write its profile to ``out`` (if given).

    texts: prose, or conversations as message lists; None lets the model generate its
        own. At least about 3,000 tokens. progress: called with a stage and the share
        of the whole that is done. Raises :class:`ProfileError` where the model or the
        texts do not serve.
    """
    with Threads() as threads:

        def tell(stage: str, share: float) -> None:
            threads.adapt()
            if progress is not None:
                progress(stage, share)

        profile = _calibrate(model_dir, texts, tell, tp_rank, tp_size)
    if out is not None:
        save_profile(profile, out)
    return profile


def _calibrate(
    model_dir: str | Path,
    texts: Sequence[Text] | None,
    tell: Progress,
    tp_rank: int,
    tp_size: int,
) -> Profile:
    marks = fingerprint(model_dir, tp_rank, tp_size)
    config = json.loads((Path(model_dir) / "config.json").read_text())
    try:
        model_rope, serving_rope = rope_of(config, "transformers"), rope_of(config, "sglang")
    except ValueError as error:
        raise ProfileError(f"{model_dir}: {error}") from error
    model, tokenizer = load_model(model_dir)
    if texts is None:
        chats = generate_conversations(
            model, tokenizer, GENERATED, ANSWER, lambda done: tell("generating", 0.3 * done)
        )
        texts = [*chats, *technical_texts(8)]
    fitted, held, others = _sequences(tokenizer, texts)
    samples = []
    generator = torch.Generator().manual_seed(0)
    for index, ids in enumerate(fitted):
        samples.append(_sample(model, ids, model_rope, generator, tp_rank, tp_size))
        tell("sampling", 0.3 + 0.35 * (index + 1) / len(fitted))
    layers, dim = samples[0].x.shape[0], samples[0].x.shape[2]
    # What uniform noise of one step would cost; two corrections follow.
    step = (24 * 6 * NOMINAL_KL / (HISTORY * layers * dim)) ** 0.5
    rough, expected = fit(samples[::4], step, ROUNDING)
    step *= (NOMINAL_KL / expected) ** (1 / 1.5)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    v_head_dim = (dim - samples[0].keys) * head_dim // samples[0].keys
    shape = (samples[0].keys // head_dim, head_dim, v_head_dim)
    asked = [Trial(model, ids, tp_rank, shape[0], ASKED_CUTS, ASKED_NEXT) for ids in fitted[:ASKED]]
    draft = Profile(*shape, model_rope, rough, (), marks)
    costs = layer_costs(asked, draft, step, lambda done: tell("asking layers", 0.65 + 0.1 * done))
    trials, compared = (
        [Trial(model, ids, tp_rank, shape[0], CUTS, CONTINUATION) for ids in part]
        for part in (held, others)
    )
    for attempt in range(REFITS):
        tell("fitting", 0.75 + 0.1 * attempt / REFITS)
        maps, _ = fit(samples, step, ROUNDING, corrections(costs))
        draft = Profile(*shape, model_rope, maps, (), marks)
        kl = trials[0].kl(draft, step)
        if trials[0].kl(draft, step * CURVE[0]) > 0.6 * kl:
            step /= 4  # so coarse that nothing is stored and finer means nothing
        elif 0.4 < kl / AIM < 2.5:
            break
        else:
            # The metric holds for small errors; where it was far off, what was
            # measured leads, a limited distance at a time.
            step *= min(max((AIM / kl) ** (1 / 1.5), 1 / 16), 4.0)
    del samples
    curve, novelty = _measure_curve(
        draft, trials, compared, step, lambda done: tell("measuring", 0.85 + 0.15 * done)
    )
    return dataclasses.replace(draft, rope=serving_rope, curve=curve, novelty=novelty)


def _sequences(
    tokenizer: Any, texts: Sequence[Text]
) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Sequences of equal length, texts end to end: to fit on, held out to measure the
    divergence of, and held out to compare others with.

    Divergence is measured on conversations where there are any: their next tokens are
    about as uncertain as people's, those of reference texts are not.
    """
    length = HISTORY + CONTINUATION
    streams: dict[bool, list[list[int]]] = {True: [], False: []}
    rest: dict[bool, list[int]] = {True: [], False: []}
    for text in texts:
        prose = isinstance(text, str)
        if isinstance(text, str):
            ids = list(tokenizer(text, truncation=True, max_length=2 * length)["input_ids"])
        else:
            ids = chat_ids(tokenizer, text, answer=False)
        rest[prose] += ids
        while len(rest[prose]) >= length:
            streams[prose].append(rest[prose][:length])
            rest[prose] = rest[prose][length:]
    reference, chats = streams[True], streams[False]
    found = len(reference) + len(chats)
    if found < 3:
        raise ProfileError(
            f"{found} sequences of {length} tokens in the calibration texts, 3 are needed"
        )
    # Every third, so that both parts see every kind of conversation.
    held = chats[1::3][:HELD_CHATS] or reference[1::3][:HELD_CHATS]
    others = reference[1::3][:HELD_PROSE] if chats else []
    taken = {id(ids) for ids in (*held, *others)}
    pairs = zip_longest(chats, reference)  # both kinds are among the first
    left = [ids for pair in pairs for ids in pair if ids is not None and id(ids) not in taken]
    return left[:FITTED], held or left[-1:], others


def _sample(
    model: Any, ids: Sequence[int], rope: Rope, generator: torch.Generator, rank: int, size: int
) -> Samples:
    k, v = history_kv(model, ids[:HISTORY])
    tables = rope.tables(0, HISTORY)

    def join(k: torch.Tensor, v: torch.Tensor, undo: Callable[..., torch.Tensor]) -> torch.Tensor:
        k, v = heads_of(k, rank, size), heads_of(v, rank, size)
        k = torch.stack([undo(layer, tables) for layer in k])
        return torch.cat([k.flatten(2), v.flatten(2)], 2)[:, SINKS:]

    # The gradient of a rotated vector rotates back with it; a scale would multiply it.
    plain = Rope(rope.inv_freq, 1.0)

    def draw(following: Sequence[int]) -> torch.Tensor:
        gk, gv = kv_gradients(model, k, v, following, generator)
        return join(gk * rope.scale, gv, plain.undo).bfloat16()

    going_on = [draw(ids[HISTORY:]) for _ in range(DRAWS)]
    quoted = [draw(quotations(ids[SINKS:HISTORY], generator)) for _ in range(DRAWS)]
    keys = heads_of(k, rank, size)[0, 0].numel()
    codes = _attention(model, ids[:HISTORY], k, v, rank, size)
    levels = None if codes is None else levels_of(codes)[:, SINKS:]
    return Samples(join(k, v, rope.undo), torch.stack(going_on), torch.stack(quoted), keys, levels)


def _attention(
    model: Any, ids: Sequence[int], k: torch.Tensor, v: torch.Tensor, rank: int, size: int
) -> torch.Tensor | None:
    """Codes ``[layers, tokens]`` of the attention that the rank's heads paid at the end of
    ``ids``; None where the model does not report it."""
    try:
        rows = attention_rows(model, ids, k, v)
    except ValueError:
        return None
    heads = rows.shape[1] // size
    return codes_of_maps(rows[:, rank * heads : (rank + 1) * heads], SINKS)


def _measure_curve(
    profile: Profile,
    trials: Sequence[Trial],
    others: Sequence[Trial],
    step: float,
    tell: Callable[[float], None],
) -> tuple[list[tuple[float, float, float]], list[float]]:
    """The profile's ``curve`` and ``novelty``; KL from ``trials``, the rest from both."""
    curve: list[tuple[float, float, float]] = []
    # Ranks are restored together and their errors add.
    margin = MARGIN * max(1, int(profile.fingerprint.get("tp_size", "1")))
    for done, factor in enumerate(CURVE):
        costs = [trial.cost(profile, step * factor) for trial in trials]
        seen = [measured for _, measured in costs]
        seen += [other.measured(profile, step * factor) for other in others]
        kl = max(1e-9, margin * _mean([kl for kl, _ in costs]))
        error = max(1e-30, _mean([measured.error for measured in seen]))
        if curve:
            # Small errors cost their square; neighbouring points also differ by noise.
            below, last_kl, last_error = curve[-1]
            finer = step * factor / below
            kl = min(max(kl, last_kl * finer), last_kl * finer**4)
            error = max(error, last_error * finer**0.1)
        curve.append((step * factor, kl, error))
        tell((done + 1) / len(CURVE))
    by_trial = [quarters(measured.novelty) for measured in seen]
    return curve, [max(1e-6, _mean(column)) for column in zip(*by_trial, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
