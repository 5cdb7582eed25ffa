# SPDX-License-Identifier: Apache-2.0
"""Sparse fine-tuning: teach the model a task with a few latent offsets, everything else frozen.

The task: after a passage of news and "This news is about", the most likely of three words should be its topic. A few
latents, chosen by the gradient of the loss, get a constant offset at the last token; only these numbers are trained.
Beside it: no training; a bias for each word; an offset of all of the activation; LoRA of the later blocks; a linear
probe of the same activation. All act at the last token alone, so that everything before it is run once.

    python examples/sparse_finetuning.py --run runs/demo
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator

import numpy as np
import torch
from common import LastToken, Outcome, Setup, added, command, interval, logistic
from torch import Tensor, nn

import fusae

QUESTION = "\n\nThis news is about"
WORDS = {"business": " business", "politics": " politics", "sport": " sports"}


@dataclasses.dataclass(frozen=True)
class Config:
    """`articles` of each topic, `per_article` passages of `length` tokens each, half of them for training; `latents`:
    how many are trained."""

    articles: int = 60
    per_article: int = 2
    length: int = 28
    latents: tuple[int, ...] = (4, 16, 64)
    steps: int = 30
    batch: int = 48
    splits: int = 3
    seed: int = 0


QUICK = Config(articles=4, per_article=1, length=10, latents=(4,), steps=2, batch=4, splits=2)


def recipe(setup: Setup, config: Config) -> Outcome:
    """Train a sparse vector of latent offsets on a task."""
    draw = np.random.default_rng(config.seed)
    ids, labels, articles = prompts(setup, config, draw)
    last = LastToken(setup, ids)
    words = torch.tensor([setup.first_token(word) for word in WORDS.values()])
    with torch.no_grad(), fusae.hook(setup.model, setup.module, setup.coder, mode="read") as h:
        plain = last()[:, words]
        x = h.input[:, 0]
    scale = float(x.norm(dim=-1).median())

    results: dict[str, list[float]] = {}
    parameters: dict[str, int] = {}
    for split in range(config.splits):
        train, test = halves(articles, draw)
        task = Task(last, labels, words, train, test, config, split)

        def note(name: str, count: int, accuracy: float) -> None:
            parameters[name] = count
            results.setdefault(name, []).append(accuracy)

        def right(logits: Tensor) -> float:
            return float((logits.argmax(1) == labels[test]).float().mean())  # noqa: B023

        note("no training", 0, right(plain[test]))
        bias = torch.zeros(len(words), requires_grad=True)
        fit(lambda: nn.functional.cross_entropy(plain[train] + bias, labels[train]), [bias], 0.1, 200)  # noqa: B023
        note("bias of each word", len(words), right(plain[test] + bias))
        for count in config.latents:
            note(f"offsets of {count} latents", count, tune_latents(setup, task, count, scale))
        offset = torch.zeros(x.shape[1], requires_grad=True)
        tuned = task.tune(lambda v=offset: added(setup, scale * v), [offset], 0.005)
        note("offset of the activation", len(offset), tuned)
        with lora(setup, rank=1, seed=split) as weights:
            tuned = task.tune(contextlib.nullcontext, weights, 0.003)
            note("LoRA, rank 1, later blocks", sum(w.numel() for w in weights), tuned)
        probe = logistic(x[train], labels[train], classes=len(words))
        note("linear probe of the activation", probe.weight.numel() + probe.bias.numel(), right(probe(x[test])))

    numbers, table = {}, []
    for name, values in results.items():
        mean, low, high = interval(values)
        numbers[name] = {"parameters": parameters[name], "accuracy": mean}
        table.append([name, f"{parameters[name]:,}", f"{mean:.3f} ({low:.3f}–{high:.3f})"])
    ours = max((name for name in numbers if name.startswith("offsets of")), key=lambda n: numbers[n]["accuracy"])
    reached = numbers[ours]["accuracy"]
    ahead = {n: v["accuracy"] for n, v in numbers.items() if n != ours and v["accuracy"] > reached}
    verdict = (
        f"Best with the dictionary: {ours} ({reached:.3f}). Baselines ahead of it: "
        f"{', '.join(f'{name} ({value:.3f})' for name, value in ahead.items()) or 'none'}."
    )
    title = f"Topic of {len(ids)} passages, half for training; {config.splits} splits (95 % bootstrap over splits)"
    return Outcome(title, ["what is trained", "parameters", "accuracy"], table, verdict, numbers)


def prompts(setup: Setup, config: Config, draw: np.random.Generator) -> tuple[Tensor, Tensor, np.ndarray]:
    """Ids ``[n, ctx]``, topic ``[n]`` and article ``[n]``."""
    question = torch.tensor(setup.encode(QUESTION))
    ids, labels, articles = [], [], []
    for label, topic in enumerate(WORDS):
        texts = [a.text for a in setup.articles if a.topic == topic]
        chosen = [texts[i] for i in draw.permutation(len(texts))[: config.articles]]
        part, of = setup.passages(chosen, config.length, config.per_article)
        ids.append(torch.cat([part, question.expand(len(part), -1)], 1))
        labels.append(torch.full((len(part),), label))
        articles.append(of + label * config.articles)
    return torch.cat(ids), torch.cat(labels), np.concatenate(articles)


def halves(articles: np.ndarray, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Prompts of one half of the articles, and of the other half."""
    order = draw.permutation(np.unique(articles))
    first = np.isin(articles, order[: len(order) // 2])
    return torch.from_numpy(first.nonzero()[0]), torch.from_numpy((~first).nonzero()[0])


@dataclasses.dataclass
class Task:
    """Cross-entropy over the `words` on the prompts `train`, accuracy on the prompts `test`."""

    last: LastToken
    labels: Tensor
    words: Tensor
    train: Tensor
    test: Tensor
    config: Config
    seed: int

    def loss(self, index: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.last(index)[:, self.words], self.labels[index])

    def tune(self, applied: Callable, weights: list[Tensor], lr: float) -> float:
        """Accuracy with `weights` trained; inside ``applied()`` the model uses them."""
        generator = torch.Generator().manual_seed(self.seed)

        def loss() -> Tensor:
            index = self.train[torch.randperm(len(self.train), generator=generator)[: self.config.batch]]
            with applied():
                return self.loss(index)

        fit(loss, weights, lr, self.config.steps)
        with torch.no_grad(), applied():
            logits = torch.cat([self.last(part)[:, self.words] for part in self.test.split(64)])
        return float((logits.argmax(1) == self.labels[self.test]).float().mean())


def tune_latents(setup: Setup, task: Task, count: int, scale: float) -> float:
    """Accuracy with offsets of the `count` latents on which the loss depends most: the gradient by an offset of every
    latent is the decoder times that by the activation."""
    shift = torch.zeros(setup.coder.config.d, requires_grad=True)
    with added(setup, shift):
        loss = sum(task.loss(part) for part in task.train.split(64))
        (gradient,) = torch.autograd.grad(loss, shift)
    latents = (setup.coder.W_dec @ gradient).abs().topk(count).indices
    offsets = torch.zeros(count, requires_grad=True)

    def applied() -> contextlib.AbstractContextManager:
        return fusae.hook(setup.model, setup.module, setup.coder, mode="error").edit(latents, add=scale * offsets)

    return task.tune(applied, [offsets], 0.03)


def fit(loss: Callable[[], Tensor], weights: list[Tensor], lr: float, steps: int) -> None:
    optimiser = torch.optim.Adam(weights, lr=lr)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - step / steps))
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()


class LoRA(nn.Module):
    """A frozen linear layer and a product of rank r, 0 at first."""

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(rank, base.in_features, generator=generator) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


@contextlib.contextmanager
def lora(setup: Setup, rank: int, seed: int) -> Iterator[list[nn.Parameter]]:
    """Inside, the blocks after the dictionary's have LoRA of their queries and values: its weights."""
    stack, place = setup.module.rsplit(".", 1)
    generator = torch.Generator().manual_seed(seed)
    made = []
    for name, module in list(setup.model.named_modules()):
        found = re.fullmatch(rf"{re.escape(stack)}\.(\d+)\.(.*)\.(q_proj|v_proj)", name)
        if found and int(found[1]) > int(place):
            parent = setup.model.get_submodule(name.rsplit(".", 1)[0])
            setattr(parent, found[3], LoRA(module, rank, generator))
            made.append((parent, found[3], module))
    try:
        yield [w for parent, name, _ in made for w in (getattr(parent, name).a, getattr(parent, name).b)]
    finally:
        for parent, name, module in made:
            setattr(parent, name, module)


if __name__ == "__main__":
    command(recipe, Config(), QUICK)
