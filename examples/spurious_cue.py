# SPDX-License-Identifier: Apache-2.0
"""Ablating a spurious cue: make a biased probe fairer by removing latents from its input, and training nothing.

A probe is to tell business news from politics. In its training articles the business news is all from one agency (TASS)
and the politics from everyone else, so it can as well learn the agency. Articles of *other* topics show how the agency
looks: the latents that differ most there and matter most to the probe are ablated. Accuracy in the worst of the four
groups (topic × agency) says whether the probe still goes by the agency.

    python examples/spurious_cue.py --run runs/demo
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from common import Outcome, Setup, command, interval, logistic, pooled_codes
from torch import Tensor

AGENCY = "tass.com"
TASK = ("business", "politics")


@dataclasses.dataclass(frozen=True)
class Config:
    """`articles` of each group (topic × agency) and of each side of the cue; `per_article` passages of `length` tokens.

    `latents`: how many are ablated; `splits`: of the articles of every group into training and test.
    """

    articles: int = 50
    per_article: int = 3
    length: int = 32
    latents: tuple[int, ...] = (10, 100, 1000)
    splits: int = 10
    seed: int = 0


QUICK = Config(articles=6, per_article=1, length=12, latents=(2, 8), splits=2)


@dataclasses.dataclass
class Passages:
    """Means over the tokens of passages: activations `x` ``[n, d]``, codes `f` ``[n, m]``; the `article` of each."""

    x: Tensor
    f: Tensor
    article: np.ndarray

    def of(self, articles: np.ndarray) -> tuple[Tensor, Tensor]:
        chosen = torch.from_numpy(np.isin(self.article, articles))
        return self.x[chosen], self.f[chosen]


def recipe(setup: Setup, config: Config) -> Outcome:
    """Remove the latents that carry a spurious cue from a probe's input."""
    draw = np.random.default_rng(config.seed)
    groups = {
        (label, agency): collect(setup, config, draw, lambda a, t=topic, g=agency: a.topic == t and is_from(a, g))
        for label, topic in enumerate(TASK)
        for agency in (True, False)
    }
    with_cue, without = (
        collect(setup, config, draw, lambda a, g=agency: a.topic not in TASK and is_from(a, g))
        for agency in (True, False)
    )
    direction = with_cue.x.mean(0) - without.x.mean(0)
    direction /= direction.norm()
    cue = with_cue.f.mean(0) - without.f.mean(0)

    results: dict[str, list[tuple[float, float]]] = {}
    for _ in range(config.splits):
        parts = {group: _halves(passages, draw) for group, passages in groups.items()}
        # Biased: business of the agency, politics of the others. Fair: all four groups, in numbers equal to the biased.
        biased = _probe([(parts[0, True][0], 0), (parts[1, False][0], 1)])
        fair = _probe([(_thin(part[0]), label) for (label, _), part in parts.items()])
        tests = {group: part[1] for group, part in parts.items()}
        towards = biased.weight[0] - biased.weight[1]
        # How far a latent moves the probe's decision between the agency and the others.
        effect = (setup.coder.W_dec @ towards) * cue
        use = (setup.coder.W_dec @ towards).abs() * torch.cat([x[1] for x in tests.values()]).mean(0)

        projected = {group: x - (x @ direction)[:, None] * direction for group, (x, _) in tests.items()}
        found = {
            "probe as trained": _accuracies(biased, {group: x for group, (x, _) in tests.items()}),
            "direction projected out": _accuracies(biased, projected),
        }
        for count in config.latents:
            chosen, used = effect.topk(count).indices, use.topk(count).indices
            for name, latents in (("cue", chosen), ("most used", used)):
                inputs = {group: ablated(setup, *part, latents) for group, part in tests.items()}
                found[f"{count} {name} latents ablated"] = _accuracies(biased, inputs)
        found["probe trained without the bias"] = _accuracies(fair, {group: x for group, (x, _) in tests.items()})
        for name, value in found.items():
            results.setdefault(name, []).append(value)

    rows, numbers = [], {}
    for name, values in results.items():
        worst, mean = (interval([value[i] for value in values]) for i in (0, 1))
        numbers[name] = {"worst": worst[0], "mean": mean[0]}
        rows.append([name, *(f"{v[0]:.3f} ({v[1]:.3f}–{v[2]:.3f})" for v in (worst, mean))])
    best = max((n for n in numbers if "cue latents" in n), key=lambda n: numbers[n]["worst"])
    gap = [a[0] - b[0] for a, b in zip(results[best], results["direction projected out"], strict=True)]
    mean, low, high = interval(gap)
    winner = "no clear winner" if low <= 0 <= high else "the dictionary wins" if mean > 0 else "the baseline wins"
    verdict = (
        f"Worst group, {best} less direction projected out: {mean:+.3f} ({low:+.3f} to {high:+.3f}), {winner}. "
        f"Beside the probe as trained: {numbers[best]['worst'] - numbers['probe as trained']['worst']:+.3f}. (The best "
        f"of {len(config.latents)} numbers of latents, so a little kind to the dictionary.)"
    )
    title = f"Business or politics, means of {config.splits} splits (95 % bootstrap interval over splits)"
    columns = ["input of the probe", "accuracy, worst group", "accuracy, mean of groups"]
    return Outcome(title, columns, rows, verdict, numbers)


def ablated(setup: Setup, x: Tensor, f: Tensor, latents: Tensor) -> Tensor:
    """Mean activations ``[n, d]`` of passages with mean codes `f` without what `latents` write.

    What ``fusae.hook(..., mode="error").ablate(latents)`` leaves at every token, on average: all of it is linear.
    """
    return x - f[:, latents] @ setup.coder.W_dec[latents]


def is_from(article, agency: bool) -> bool:
    return (article.source == AGENCY) == agency


def collect(setup: Setup, config: Config, draw: np.random.Generator, wanted) -> Passages:
    """Passages of so many articles that are `wanted`, in random order."""
    articles = [a for a in setup.articles if wanted(a)]
    chosen = [articles[i].text for i in draw.permutation(len(articles))[: config.articles]]
    ids, article = setup.passages(chosen, config.length, config.per_article)
    rows = setup.rows(ids)
    return Passages(rows.mean(1), pooled_codes(setup, rows), article)


def _halves(passages: Passages, draw: np.random.Generator) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(x, f) of the passages of one half of the articles, and of the other half."""
    articles = draw.permutation(np.unique(passages.article))
    half = len(articles) // 2
    return passages.of(articles[:half]), passages.of(articles[half:])


def _thin(part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return part[0][::2], part[1][::2]


def _probe(parts) -> torch.nn.Linear:
    x = torch.cat([part[0] for part, _ in parts])
    return logistic(x, torch.cat([torch.full((len(part[0]),), label) for part, label in parts]))


def _accuracies(probe, groups: dict) -> tuple[float, float]:
    """Of the worst group, and the mean of the groups."""
    each = [float((probe(x).argmax(1) == label).float().mean()) for (label, _), x in groups.items()]
    return min(each), float(np.mean(each))


if __name__ == "__main__":
    command(recipe, Config(), QUICK)
