# SPDX-License-Identifier: Apache-2.0
"""Anomaly detection: does a dictionary notice text unlike what it was trained on, better than simple statistics do?

Scores of a passage, higher for stranger: the share of the activations that the dictionary does not explain, how many
latents it spreads a token over, how rare these are; beside Mahalanobis distance, what as many principal components
leave over, and the model's own perplexity. AUROC against news that neither the dictionary nor a statistic has seen.

    python examples/anomaly_detection.py --run runs/demo
"""

from __future__ import annotations

import argparse
import codecs
import dataclasses
import inspect
import random

import numpy as np
import torch
from common import SKIP, Outcome, Setup, auroc, command
from torch import Tensor

import fusae


@dataclasses.dataclass(frozen=True)
class Config:
    """`fit` passages for the statistics, `test` of each kind, of `length` tokens."""

    fit: int = 200
    test: int = 100
    length: int = 32
    seed: int = 0


QUICK = Config(fit=24, test=8, length=16)
OURS = ("unexplained share", "latents in use", "rarity of latents")
OTHERS = ("Mahalanobis", "PCA, k components", "perplexity")


def recipe(setup: Setup, config: Config) -> Outcome:
    """Reconstruction error and sparsity as out-of-distribution scores."""
    choose = random.Random(config.seed)
    news = [a.text for a in setup.articles if not a.held_out]
    unseen = [a.text for a in setup.articles if a.held_out]
    fit, _ = setup.passages(choose.sample(news, min(len(news), config.fit)), config.length)
    fitted = Statistics(setup, setup.rows(fit))

    normal, _ = setup.passages(choose.sample(unseen, min(len(unseen), config.test)), config.length)
    foreign = strange_text(setup, unseen, config, choose)
    negative = scores(setup, fitted, normal)
    found = {kind: drawn(negative, scores(setup, fitted, ids)) for kind, ids in foreign.items()}
    found["mean"] = {name: np.mean([each[name] for each in found.values()], 0) for name in (*OURS, *OTHERS)}
    numbers = {kind: {name: float(value[0]) for name, value in each.items()} for kind, each in found.items()}
    rows = [[kind, *(_shown(value) for value in each.values())] for kind, each in found.items()]
    mean = numbers["mean"]
    ours, other = (max(names, key=lambda name: mean[name]) for names in (OURS, OTHERS))
    gap = found["mean"][ours] - found["mean"][other]
    low, high = np.quantile(gap[1:], (0.025, 0.975))
    winner = "no clear winner" if low <= 0 <= high else "the dictionary wins" if gap[0] > 0 else "the baseline wins"
    ahead = {
        kind: max(OTHERS, key=row.get)
        for kind, row in numbers.items()
        if max(map(row.get, OTHERS)) > max(map(row.get, OURS))
    }
    verdict = (
        f"Best score of the dictionary on average: {ours} ({mean[ours]:.2f}); best baseline: {other} "
        f"({mean[other]:.2f}); difference {gap[0]:+.3f} ({low:+.3f} to {high:+.3f}), {winner}. A baseline is ahead of "
        f"every score of the dictionary on: {', '.join(f'{kind} ({name})' for kind, name in ahead.items()) or 'none'}."
    )
    title = f"AUROC against {len(normal)} unseen news passages of {config.length} tokens (95 % bootstrap interval)"
    return Outcome(title, ["unlike news", *OURS, *OTHERS], rows, verdict, numbers)


def strange_text(setup: Setup, unseen: list[str], config: Config, choose: random.Random) -> dict[str, Tensor]:
    """Passages that are no news, from near to far."""
    code = [inspect.getsource(module) for module in (argparse, dataclasses, inspect, random, codecs)]
    lines = [line for source in code for line in _pieces(source, 12 * config.length)]
    news, _ = setup.passages(choose.sample(unseen, min(len(unseen), config.test)), config.length)
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.stack([torch.randperm(config.length - 1, generator=generator) for _ in news]) + 1
    texts = {
        "speeches": setup.speeches,
        "upper case": [text.upper() for text in unseen],
        "Python code": lines,
        "rot13": [codecs.encode(text, "rot13") for text in unseen],
    }
    found = {}
    for kind, these in texts.items():
        these = [text for text in these if len(text) > 6 * config.length]
        found[kind], _ = setup.passages(choose.sample(these, min(len(these), config.test)), config.length)
    found["shuffled tokens"] = torch.cat([news[:, :1], news.gather(1, order)], 1)
    return found


def _pieces(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text) - size, size)]


class Statistics:
    """Of the rows ``[n, length, d]`` of normal text: mean, covariance, principal components, density of latents."""

    def __init__(self, setup: Setup, rows: Tensor) -> None:
        rows = _without_outliers(rows)
        self.mean, centred = rows.mean(0), rows - rows.mean(0)
        values, vectors = torch.linalg.eigh((centred.T @ centred / len(rows)).double())
        self.inverse = (vectors / (values + 1e-3 * values.mean())) @ vectors.T
        self.components = vectors[:, -setup.coder.config.k :].float()
        codes = setup.coder.encode(rows)
        fired = torch.bincount(codes.indices[codes.values > 0].flatten().long(), minlength=codes.m)
        self.log_density = ((fired + 1) / (len(rows) + 1)).log()


@torch.no_grad()
def scores(setup: Setup, fitted: Statistics, ids: Tensor) -> dict[str, np.ndarray]:
    """Scores ``[n]`` of passages ``[n, length]``, means over their tokens."""
    found: dict[str, list[Tensor]] = {}
    with fusae.hook(setup.model, setup.module, setup.coder, mode="read") as h:
        for part in ids.split(8):
            logits = setup.model(part, use_cache=False).logits[:, :-1].float()
            x, error, values, indices = (t[:, SKIP:] for t in (h.input, h.error, h.codes.values, h.codes.indices))
            centred = x - fitted.mean
            shares = values / values.sum(-1, keepdim=True).clamp_min(1e-9)
            left = centred - centred @ fitted.components @ fitted.components.T
            each = {
                "unexplained share": error.square().sum(-1) / centred.square().sum(-1),
                # A top-k dictionary always has k active; how evenly they are differs (the entropy of their shares).
                "latents in use": -(shares * shares.clamp_min(1e-9).log()).sum(-1),
                "rarity of latents": -(shares * fitted.log_density[indices.long()]).sum(-1),
                "Mahalanobis": ((centred.double() @ fitted.inverse) * centred).sum(-1).sqrt(),
                "PCA, k components": left.square().sum(-1) / centred.square().sum(-1),
                "perplexity": torch.nn.functional.cross_entropy(
                    logits.transpose(1, 2), part[:, 1:], reduction="none"
                ),
            }
            for name, value in each.items():
                found.setdefault(name, []).append(value.mean(1))
    return {name: torch.cat(values).double().numpy() for name, values in found.items()}


def _without_outliers(rows: Tensor) -> Tensor:
    flat = rows.flatten(0, 1)
    norms = flat.norm(dim=-1)
    return flat[norms < 10 * norms.median()]


def drawn(
    negative: dict[str, np.ndarray], positive: dict[str, np.ndarray], repeats: int = 300
) -> dict[str, np.ndarray]:
    """Of every score its AUROC, then those of `repeats` bootstrap samples of passages, the same for all scores."""
    draw = np.random.default_rng(0)
    n, p = len(negative["perplexity"]), len(positive["perplexity"])
    samples = [(np.arange(n), np.arange(p))]
    samples += [(draw.integers(0, n, n), draw.integers(0, p, p)) for _ in range(repeats)]
    return {name: np.array([auroc(negative[name][i], positive[name][j]) for i, j in samples]) for name in negative}


def _shown(values: np.ndarray) -> str:
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return f"{values[0]:.2f} ({low:.2f}–{high:.2f})"


if __name__ == "__main__":
    command(recipe, Config(), QUICK)
