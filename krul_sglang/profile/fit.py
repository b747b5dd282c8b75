"""From sampled KV and its importance to the maps of a profile.

Each layer is regressed on the *rebuilt* layer below (closed loop: what the decoder
will have), the prediction is cut to the rank that shows at the step in use, and the
residual gets its principal axes (KLT) in the importance metric. In that metric a
unit of error costs the same everywhere, so one step serves all coefficients and the
sensitivities of the layers need no table of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from krul_sglang.profile.base import LayerMaps

SHRINK = 1.0
"""Weight of the isotropic part of a metric, against its sampled mean eigenvalue."""
QUOTING = 4.0
"""What the divergence of a quotation counts against that of text that goes on. At equal bytes,
1 and 4 leave 0.55 and 0.42 of the divergence of questions about something long ago and cost 1.03
and 1.19 times that of text that goes on (16 conversations, 12 texts); 16 is no better than 4."""
RIDGE = 3e-3
NOISE = 0.2
"""Error of the layer below that every direction must bear, in steps."""
RANK_FLOOR = 0.35
"""Predicted components whose deviation is below this share of a step are cut."""
FINEST = 0.28
"""Coefficients below this share of the finest step (a quarter of the nominal) are cut."""


@dataclass(frozen=True)
class Samples:
    """x: ``[layers, tokens, dim]`` pre-RoPE K beside V; g: gradients ``[draws, layers,
    tokens, dim]`` in the same coordinates, of the text going on; quoted: of its being quoted;
    keys: how many of ``dim`` are K; levels: ``[layers, tokens]`` attention levels, None where
    the model does not report attention."""

    x: torch.Tensor
    g: torch.Tensor
    quoted: torch.Tensor
    keys: int
    levels: torch.Tensor | None = None


def metrics(samples: Sequence[Samples], layer: int) -> torch.Tensor:
    """Importance ``[dim, dim]`` float64 of one layer, K and V apart; units nats a token: the
    mean of what it is to the text going on and :data:`QUOTING` times what it is to its being
    quoted."""
    going_on = _fisher([sample.g[:, layer] for sample in samples], samples[0].keys)
    quoted = _fisher([sample.quoted[:, layer] for sample in samples], samples[0].keys)
    return (going_on + QUOTING * quoted) / 2


def _fisher(gradients: Sequence[torch.Tensor], keys: int) -> torch.Tensor:
    """Covariance ``[dim, dim]`` float64 of gradients ``[draws, tokens, dim]``, K and V apart."""
    dim = gradients[0].shape[-1]
    out = torch.zeros(dim, dim, dtype=torch.float64)
    for own in gradients:
        g = own.reshape(-1, dim).float()
        for part in (slice(0, keys), slice(keys, dim)):
            out[part, part] += (g[:, part].T @ g[:, part]).double()
    return out / sum(own[..., 0].numel() for own in gradients)


def _root(metric: torch.Tensor, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Square root of the shrunken metric and its inverse, both float64."""
    root, inverse = torch.zeros_like(metric), torch.zeros_like(metric)
    for part in (slice(0, keys), slice(keys, len(metric))):
        block = metric[part, part]
        level = block.diagonal().mean().clamp_min(1e-30)
        block = block + SHRINK * level * torch.eye(len(block), dtype=block.dtype)
        values, axes = torch.linalg.eigh(block)
        root[part, part] = axes * values.sqrt() @ axes.T
        inverse[part, part] = axes * values.rsqrt() @ axes.T
    return root, inverse


def _axes(covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard deviations, falling, and principal axes in columns."""
    values, axes = torch.linalg.eigh(covariance)
    return values.flip(0).clamp_min(0).sqrt(), axes.flip(1)


def _regress(
    below: torch.Tensor, x: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Centred ridge regression: ``[dim, dim]`` map and ``[dim]`` bias, float64.

    noise: covariance ``[dim, dim]`` that ``below`` may hold beside what it holds here.
        At a finer step, or for unlike text, it has components in directions that
        were never coded in the samples; without this a map may amplify them.
    """
    mean_b, mean_x = below.mean(0), x.mean(0)
    r = below - mean_b
    gram = (r.T @ r).double()
    gram += torch.diag(RIDGE * gram.diagonal().clamp_min(1e-12)) + len(x) * noise
    weights = torch.linalg.solve(gram, (r.T @ (x - mean_x)).double())
    return weights, mean_x.double() - mean_b.double() @ weights


def _token_weights(
    samples: Sequence[Samples], layer: int, inverse: torch.Tensor, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Linear guesses of a token's log importance: from its K and V, ``[dim + 1]``, and from
    those and its attention levels, ``[dim + 3]``."""
    energy = torch.cat(
        [(s.g[:, layer].float() @ inverse.T).square().sum(-1).mean(0) for s in samples]
    )
    y = (energy + 1e-3 * energy.mean() + 1e-30).log()
    y = y - y.mean()
    token = _linear(x, y)
    if samples[0].levels is None:
        return token, torch.cat([token[:-1], torch.zeros(2), token[-1:]])
    levels = torch.cat(
        [torch.stack([s.levels[layer], s.levels.mean(0)]) for s in samples if s.levels is not None],
        1,
    )
    return token, _linear(torch.cat([x, levels.T], 1), y)


def _linear(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Ridge weights of ``x``'s columns, and a constant, for centred ``y``."""
    mean = x.mean(0)
    r = x - mean
    gram = (r.T @ r).double()
    gram += torch.diag(0.1 * gram.diagonal().clamp_min(1e-12))
    weights = torch.linalg.solve(gram, (r.T @ y[:, None]).double())[:, 0].float()
    return torch.cat([weights, -(mean @ weights)[None]])


def fit(
    samples: Sequence[Samples],
    step: float,
    rounding: float,
    corrections: Sequence[float] | None = None,
) -> tuple[list[LayerMaps], float]:
    """Maps of all layers at a nominal ``step``, and the mean KL (nats) that the metric
    predicts for it on the samples themselves, a history of their length being restored.

    rounding: what is added before truncation when quantizing (0.5 = nearest). corrections: what
    each layer's metric is multiplied with (:mod:`.sensitivity`).
    """
    layers, _, dim = samples[0].x.shape
    history = sum(s.x.shape[1] for s in samples) / len(samples)
    out: list[LayerMaps] = []
    kl = 0.0
    rebuilt: torch.Tensor | None = None
    unroot = torch.zeros(dim, dim, dtype=torch.float64)
    for layer in range(layers):
        x = torch.cat([s.x[layer] for s in samples]).float()
        metric = metrics(samples, layer)
        if corrections is not None:
            metric *= corrections[layer]
        # What a unit of error in the metric of the layer below is in its coordinates.
        noise = (NOISE * step) ** 2 * unroot @ unroot if layer else None
        root, unroot = _root(metric, samples[0].keys)
        if rebuilt is None or noise is None:
            bias = x.mean(0).double()
            down, up = torch.zeros(dim, 0), torch.zeros(0, dim)
        else:
            weights, bias = _regress(rebuilt, x, noise)
            spread = rebuilt - rebuilt.mean(0)
            seen = weights @ root
            deviation, axes = _axes(seen.T @ ((spread.T @ spread).double() / len(x)) @ seen)
            axes = axes[:, : max(1, int((deviation > RANK_FLOOR * step).sum()))]
            down, up = (seen @ axes).float(), (axes.T @ unroot).float()
            # What the cut components added on average goes into the bias.
            full = rebuilt.mean(0).double() @ weights
            bias = bias + full - (rebuilt.mean(0) @ down @ up).double()
        predicted = bias.float() + (rebuilt @ down @ up if rebuilt is not None else 0)
        y = (x - predicted) @ root.float()
        sigma, axes = _axes((y.T @ y).double() / len(y))
        keep = max(1, int((sigma > FINEST * step / 4).sum()))
        forward = (root @ axes[:, :keep]).float()
        inverse = (axes[:, :keep].T @ unroot).float()
        coefficients = (x - predicted) @ forward / step
        whole = coefficients.sign() * (coefficients.abs() + rounding).floor()
        rebuilt = predicted + whole @ inverse * step
        error = rebuilt - x
        kl += 0.5 * history * float(((error @ metric.float()) * error).sum(1).mean())
        kept = sigma[:keep].float()
        guesses = _token_weights(samples, layer, inverse, x)
        out.append(LayerMaps(bias.float(), down, up, forward, inverse, kept, *guesses))
    return out, kl
