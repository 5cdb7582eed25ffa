# SPDX-License-Identifier: Apache-2.0
"""Steering: make the model write about a topic by raising a latent, beside adding the mean-difference direction.

For a topic, the latent is the one whose mean activation tells passages of the topic from passages of other topics best
(AUROC); the direction is the difference of their mean activations. Both are added at every token at equal strength
(norm of what is added, as a share of the median norm of the activations). Effect: how often a bag-of-words classifier,
which knows nothing of the model, takes the continuation for the topic. Cost: the perplexity of the continuation to the
model without steering.

    python examples/steering.py --run runs/demo
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch
from common import SKIP, TOPICS, Outcome, Setup, added, command, interval, pooled_codes, shown
from torch import Tensor

import fusae


@dataclasses.dataclass(frozen=True)
class Config:
    """`fit` passages of each topic, of `length` tokens, to choose latents and directions; `prompts` openings of
    `opening` tokens, each continued by `new` tokens; `strengths`: shares of the median norm."""

    fit: int = 40
    length: int = 32
    prompts: int = 16
    opening: int = 8
    new: int = 20
    strengths: tuple[float, ...] = (0.1, 0.2, 0.4)
    topics: tuple[str, ...] = ("business", "sport", "defence")
    seed: int = 0


QUICK = Config(fit=4, length=10, prompts=2, opening=4, new=4, strengths=(0.5,), topics=("sport",))

OURS = ("latent, added", "latent, clamped", "5 latents, added")
BASELINE = "mean difference, added"


def recipe(setup: Setup, config: Config) -> Outcome:
    """Raise or clamp a latent while generating; add the mean difference at equal strength."""
    choose = random.Random(config.seed)
    texts = {t: [a.text for a in setup.articles if a.topic == t and not a.held_out] for t in TOPICS}
    classifier = Words(texts)
    rows, codes = {}, {}
    for topic, these in texts.items():
        ids, _ = setup.passages(choose.sample(these, min(len(these), config.fit)), config.length)
        rows[topic] = setup.rows(ids)
        codes[topic] = pooled_codes(setup, rows[topic])
    median = torch.cat(list(rows.values())).norm(dim=-1).median()
    openings = [a.text for a in setup.articles if not a.topic and a.held_out]
    prompts, _ = setup.passages(choose.sample(openings, min(len(openings), config.prompts)), config.opening)

    found: dict[tuple[str, float], list[tuple[Tensor, Tensor]]] = {}
    plain = continued(setup, prompts, config)
    latents = {}
    for topic in config.topics:
        others = [t for t in texts if t != topic]
        direction = rows[topic].mean((0, 1)) - torch.cat([rows[t] for t in others]).mean((0, 1))
        order = aurocs(torch.cat([codes[t] for t in others]), codes[topic]).argsort(descending=True)
        latents[topic] = int(order[0])
        anything = order[torch.randint(len(order), (1,), generator=torch.Generator().manual_seed(config.seed))]
        found.setdefault(("not steered", 0.0), []).append(judged(setup, classifier, topic, prompts, plain))
        for strength in config.strengths:
            norm = strength * median
            for name, how in {
                OURS[0]: raised(setup, order[:1], norm),
                OURS[1]: clamped(setup, order[:1], norm),
                OURS[2]: raised(setup, order[:5], norm),
                "random latent, added": raised(setup, anything, norm),
                BASELINE: added(setup, norm * direction / direction.norm()),
            }.items():
                with how:
                    ids = continued(setup, prompts, config)
                found.setdefault((name, strength), []).append(judged(setup, classifier, topic, prompts, ids))

    table, numbers = [], {}
    for (name, strength), parts in found.items():
        hits, losses = (torch.cat([part[i] for part in parts]).numpy() for i in (0, 1))
        numbers[f"{name} {strength:g}"] = {"topic": float(hits.mean()), "perplexity": float(np.exp(losses.mean()))}
        cost = ", ".join(f"{np.exp(v):.1f}" for v in interval(losses)[1:])
        table.append([name, f"{strength:g}", shown(hits), f"{np.exp(losses.mean()):.1f} [{cost}]"])
    verdict = _verdict(numbers, found)
    right = classifier.accuracy({t: [a.text for a in setup.articles if a.topic == t and a.held_out] for t in TOPICS})
    verdict += f" The classifier is right about {right:.0%} of held-out articles (their first 200 characters)."
    verdict += f" Latents: {', '.join(f'{latent} ({topic})' for topic, latent in latents.items())}."
    title = f"Topics {', '.join(config.topics)}; {len(prompts)} openings each, {config.new} new tokens (95 % bootstrap)"
    return Outcome(title, ["steering", "strength", "taken for the topic", "perplexity"], table, verdict, numbers)


def _verdict(numbers: dict, found: dict) -> str:
    """Which method has most of the topic among the settings that at most double the perplexity."""
    limit = 2 * numbers["not steered 0"]["perplexity"]
    best = {}
    for name, strength in found:
        entry = numbers[f"{name} {strength:g}"]
        if entry["perplexity"] <= limit and entry["topic"] > best.get(name, (-1.0, 0))[0]:
            best[name] = (entry["topic"], strength)
    told = "; ".join(f"{name} {topic:.2f}" for name, (topic, _) in sorted(best.items(), key=lambda b: -b[1][0]))
    ours = max((best[name][0] for name in OURS if name in best), default=0.0)
    base = best.get(BASELINE, (0.0, 0))[0]
    winner = "the mean difference wins" if base > ours else "a latent wins" if ours > base else "they tie"
    return f"Most topic at no more than twice the perplexity: {told}. So {winner}."


@contextlib.contextmanager
def raised(setup: Setup, latents: Tensor, norm: Tensor) -> Iterator[None]:
    """Equal values added to `latents` at every token, so that what is added has the norm `norm`."""
    amount = norm / setup.coder.W_dec[latents].sum(0).norm()
    with fusae.hook(setup.model, setup.module, setup.coder, mode="error") as h:
        h.edit(latents, add=float(amount), positions=slice(SKIP, None))
        yield


@contextlib.contextmanager
def clamped(setup: Setup, latents: Tensor, norm: Tensor) -> Iterator[None]:
    """One latent held at the value that gives its decoder row the norm `norm`."""
    amount = norm / setup.coder.W_dec[latents].sum(0).norm()
    with fusae.hook(setup.model, setup.module, setup.coder, mode="error") as h:
        h.edit(latents, value=float(amount), positions=slice(SKIP, None))
        yield


def continued(setup: Setup, prompts: Tensor, config: Config) -> Tensor:
    """Sampled continuations: ids ``[n, opening + new]``. The same random numbers at every call."""
    torch.manual_seed(config.seed)
    with torch.no_grad():
        return setup.model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_p=0.9, max_new_tokens=config.new,
            min_new_tokens=config.new, eos_token_id=setup.start, pad_token_id=setup.start,
        )  # fmt: skip


@torch.no_grad()
def judged(setup: Setup, classifier: Words, topic: str, prompts: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of every continuation: whether it is taken for `topic`, and its loss in nats a token without steering."""
    start = prompts.shape[1]
    hits = [classifier.topic(setup.tokenizer.decode(row[start:].tolist())) == topic for row in ids]
    logits = setup.model(ids, use_cache=False).logits[:, start - 1 : -1].float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, start:], reduction="none")
    return torch.tensor(hits, dtype=torch.float32), losses.mean(1)


def aurocs(negative: Tensor, positive: Tensor) -> Tensor:
    """``[m]``: how often a positive row ``[p, m]`` is above a negative one ``[n, m]``, for every column."""
    above = sum((row > negative).float().mean(0) + (row == negative).float().mean(0) / 2 for row in positive)
    return above / len(positive)


class Words:
    """A naive Bayes classifier of topics by words."""

    def __init__(self, texts: dict[str, list[str]]) -> None:
        counts = {topic: Counter(word for text in these for word in self.words(text)) for topic, these in texts.items()}
        known = set().union(*counts.values())
        self.log = {
            topic: {word: np.log((count[word] + 1) / (count.total() + len(known))) for word in known}
            for topic, count in counts.items()
        }

    @staticmethod
    def words(text: str) -> list[str]:
        return re.findall(r"[a-z]+", text.lower())

    def topic(self, text: str) -> str:
        words = self.words(text)
        return max(self.log, key=lambda topic: sum(self.log[topic].get(word, 0.0) for word in words))

    def accuracy(self, texts: dict[str, list[str]]) -> float:
        right = [self.topic(text[:200]) == topic for topic, these in texts.items() for text in these]
        return float(np.mean(right)) if right else float("nan")


if __name__ == "__main__":
    command(recipe, Config(), QUICK)
