# SPDX-License-Identifier: Apache-2.0
"""The dictionary as a bottleneck: which abilities of the model pass through its k latents, and which do not?

The activations of a layer are replaced, at every token but the first two, by what the dictionary makes of them; beside
it as many principal components, four times as many, and the mean. Loss recovered is one number; here it is taken apart:
next tokens of news, copying a random sequence, agreement, who was given something, capitals, sums.

    python examples/bottleneck.py --run runs/demo
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable

import torch
from common import SKIP, Outcome, Setup, command, interval, shown
from torch import Tensor

import fusae
from fusae.eval.patching import Patcher

NOUNS = "key author pilot farmer doctor player student worker driver teacher book car".split()
NAMES = ["Mary", "John", "Tom", "James", "Anna", "Paul", "Sarah", "Peter", "Jack", "Lisa"]
CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Russia": "Moscow",
    "China": "Beijing", "England": "London", "Egypt": "Cairo", "Greece": "Athens", "Austria": "Vienna",
    "Cuba": "Havana", "Portugal": "Lisbon", "Ireland": "Dublin", "Poland": "Warsaw", "Sweden": "Stockholm",
    "Thailand": "Bangkok", "Peru": "Lima", "Kenya": "Nairobi", "Iran": "Tehran", "Iraq": "Baghdad", "Canada": "Ottawa",
    "Turkey": "Ankara", "Norway": "Oslo",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """`news` passages of `length` tokens; `repeated` random sequences; `items` of the other tasks; `fit` passages for
    mean and components."""

    news: int = 24
    length: int = 64
    repeated: int = 16
    items: int = 24
    fit: int = 150
    seed: int = 0


QUICK = Config(news=2, length=12, repeated=2, items=4, fit=8)


@dataclasses.dataclass
class Task:
    """`ids` ``[n, ctx]``, padded on the right (which no token before it sees), and ``score(logits) -> [n]``."""

    ids: Tensor
    score: Callable[[Tensor], Tensor]


def recipe(setup: Setup, config: Config) -> Outcome:
    """Behaviour kept and lost when the reconstruction replaces the layer, task by task."""
    choose = random.Random(config.seed)
    texts = [a.text for a in setup.articles if not a.held_out]
    fit, _ = setup.passages(choose.sample(texts, min(len(texts), config.fit)), 32 if config.fit > 8 else config.length)
    rows = setup.rows(fit).flatten(0, 1)
    limit = 10 * rows.norm(dim=-1).median()
    rows = rows[rows.norm(dim=-1) < limit]
    mean = rows.mean(0)
    vectors = torch.linalg.svd(rows - mean, full_matrices=False).Vh
    k = setup.coder.config.k

    def components(count: int) -> Callable[[Tensor], Tensor]:
        kept = vectors[:count]
        return lambda x: mean + (x - mean) @ kept.T @ kept

    ways = {
        "dictionary": lambda x: setup.coder(x.flatten(0, 1)).view_as(x),
        f"{k} components": components(k),
        f"{4 * k} components": components(4 * k),
        "mean": lambda x: mean.expand_as(x),
    }
    table, numbers = [], {}
    for name, task in tasks(setup, config, choose).items():
        found = measured(setup, task, ways, limit)
        scores = {way: value.double().numpy() for way, value in found.items()}
        numbers[name] = {way: float(value.mean()) for way, value in scores.items()}
        kept = _kept(numbers[name])
        lost, low, high = interval(scores["dictionary"] - scores["the model itself"])
        row = [shown(value) if way == "the model itself" else f"{value.mean():.2f}" for way, value in scores.items()]
        table.append([name, *row, f"{lost:+.2f} [{low:+.2f}, {high:+.2f}]", f"{kept:.0%}" if kept == kept else "–"])
        numbers[name]["kept"] = kept
    shares = {name: row["kept"] for name, row in numbers.items() if row["kept"] == row["kept"]}
    order = sorted(shares, key=shares.get)
    rival = {way: [n for n, row in numbers.items() if row[way] > row["dictionary"]] for way in list(ways)[1:]}
    told = "; ".join(f"{way}: {', '.join(names)}" for way, names in rival.items() if names)
    ends = [f"{name} ({shares[name]:.0%})" for name in (order[0], order[-1])] if order else ["none", "none"]
    verdict = (
        f"Least kept: {ends[0]}; most kept: {ends[1]}. "
        + (f"Baselines ahead of the dictionary: {told}." if told else "No baseline is ahead of the dictionary.")
    )
    title = "Score with the layer replaced (higher is better; accuracies but for the loss)"
    columns = ["task", "the model itself", *ways, "every token", "dictionary − model", "kept of model − mean"]
    return Outcome(title, columns, table, verdict, numbers)


def _kept(row: dict[str, float]) -> float:
    gap = row["the model itself"] - row["mean"]
    return (row["dictionary"] - row["mean"]) / gap if gap > 0.05 else float("nan")


@torch.no_grad()
def measured(setup: Setup, task: Task, ways: dict[str, Callable], limit: Tensor) -> dict[str, Tensor]:
    """Scores ``[n]`` of a task: the model's own, and with each way of replacing the layer."""
    found: dict[str, list[Tensor]] = {}
    patcher = Patcher(setup.model, setup.module)
    for part in task.ids.split(16):

        def note(name: str, at: Tensor = part) -> None:
            found.setdefault(name, []).append(setup.model(at, use_cache=False).logits)

        with patcher.recording(part) as hidden:
            note("the model itself")
        x = hidden[0]
        untouched = x.norm(dim=-1, keepdim=True) > limit
        untouched[:, :SKIP] = True
        for name, way in ways.items():
            with patcher.replaced(torch.where(untouched, x, way(x))):
                note(name)
        # Attention sinks too, which no dictionary was trained on.
        with patcher.replaced(x), fusae.hook(setup.model, setup.module, setup.coder, mode="replace"):
            note("every token")
    return {name: task.score(torch.cat(logits).float()) for name, logits in found.items()}


def tasks(setup: Setup, config: Config, choose: random.Random) -> dict[str, Task]:
    unseen = [a.text for a in setup.articles if a.held_out]
    news, _ = setup.passages(choose.sample(unseen, min(len(unseen), config.news)), config.length)
    ordinary = torch.tensor(sorted({i for text in unseen[:40] for i in setup.encode(text[:400])} - {setup.start}))
    generator = torch.Generator().manual_seed(config.seed)
    half = ordinary[torch.randint(len(ordinary), (config.repeated, 16), generator=generator)]
    repeated = torch.cat([torch.full((len(half), 1), setup.start), half, half], 1)
    numbers = [(noun, other, n) for noun, other in itertools.permutations(NOUNS, 2) for n in (0, 1)]
    agreement = [
        (f"The {noun}{'s' * n} near the {other}{'s' * (1 - n)}", (" is", " are")[n], (" are", " is")[n])
        for noun, other, n in choose.sample(numbers, config.items)
    ]
    given = [
        (f"When {a} and {b} went to the shop, {b} gave a drink to", f" {a}", f" {b}")
        for a, b in choose.sample(list(itertools.permutations(NAMES, 2)), config.items)
    ]
    countries = choose.sample(list(CAPITALS), min(config.items, len(CAPITALS)))
    capitals = [
        (f"The capital of {c} is the city of", f" {CAPITALS[c]}", f" {CAPITALS[countries[i - 1]]}")
        for i, c in enumerate(countries)
    ]
    sums = [(a, b) for a in range(1, 9) for b in range(1, 9) if a + b < 10]
    sums = choose.sample(sums, min(config.items, len(sums)))
    added = [(f"1 + 1 = 2\n2 + 3 = 5\n4 + 2 = 6\n{a} + {b} = ", str(a + b)) for a, b in sums]

    def right(ids: Tensor, start: int) -> Callable[[Tensor], Tensor]:
        return lambda logits: (logits[:, start:-1].argmax(-1) == ids[:, start + 1 :]).float().mean(1)

    return {
        "news, next token": Task(news, right(news, SKIP)),
        "news, − loss (nats)": Task(news, lambda logits: -_loss(logits[:, SKIP:-1], news[:, SKIP + 1 :])),
        "a random sequence again": Task(repeated, right(repeated, 17)),
        "agreement: is, are": _pairs(setup, agreement),
        "who was given a drink": _pairs(setup, given),
        "capitals": _pairs(setup, capitals),
        "sums of digits": _digits(setup, added),
    }


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)


def _padded(setup: Setup, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Ids ``[n, longest]`` and the place of the last token of each."""
    ids = [torch.tensor([setup.start, *setup.encode(text)]) for text in texts]
    last = torch.tensor([len(row) - 1 for row in ids])
    return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=setup.start), last


def _pairs(setup: Setup, items: list[tuple[str, str, str]]) -> Task:
    """Is the right word's first token more likely than the wrong one's?"""
    ids, last = _padded(setup, [text for text, _, _ in items])
    right, wrong = (torch.tensor([setup.first_token(item[i]) for item in items]) for i in (1, 2))

    def score(logits: Tensor) -> Tensor:
        row = torch.arange(len(logits))
        return (logits[row, last, right] > logits[row, last, wrong]).float()

    return Task(ids, score)


def _digits(setup: Setup, items: list[tuple[str, str]]) -> Task:
    """Is the right digit the most likely of the ten?"""
    ids, last = _padded(setup, [text for text, _ in items])
    digits = torch.tensor([setup.first_token(str(digit)) for digit in range(10)])
    right = torch.tensor([int(answer) for _, answer in items])
    return Task(ids, lambda logits: (logits[torch.arange(len(logits)), last][:, digits].argmax(1) == right).float())


if __name__ == "__main__":
    command(recipe, Config(), QUICK)
