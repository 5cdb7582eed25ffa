# SPDX-License-Identifier: Apache-2.0
"""What the recipes share: the model with its dictionary, labelled text, activations, intervals, tables.

Every recipe is a function ``recipe(setup, config) -> Outcome``; `command` makes a script of it.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import re
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple
from urllib.parse import urlparse

import numpy as np
import torch
import typer
from torch import Tensor, nn

from fusae.data import fetch_demo, is_held_out, load_model
from fusae.data.hooks import Sites, run_to, with_hidden
from fusae.eval.patching import Patcher
from fusae.nn import SparseCoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

START = "<|endoftext|>"
#: Positions at the start of a text whose activations are attention sinks: no dictionary was trained on them.
SKIP = 2


class Article(NamedTuple):
    """A news article. `topic`: of `TOPICS`, by the section of its publisher's site, or ""; `held_out`: the demo's
    dictionary was not trained on it."""

    text: str
    source: str
    topic: str
    held_out: bool = False


# A section is a part of the URL's path. Only articles of sections that say their topic have one.
TOPICS = {
    "business": ("economy", "business", "money", "markets"),
    "politics": ("politics", "uk-politics"),
    "sport": ("sport", "sports", "football"),
    "defence": ("defense",),
}


@dataclasses.dataclass
class Setup:
    """A frozen model in eval mode, the dictionary of one of its modules, and text."""

    model: nn.Module
    tokenizer: Tokenizer
    coder: SparseCoder
    module: str
    articles: list[Article]
    speeches: list[str]

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)
        self.coder.eval().requires_grad_(False)

    @property
    def start(self) -> int:
        return self.tokenizer.token_to_id(START)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def first_token(self, word: str) -> int:
        return self.encode(word)[0]

    def prompts(self, texts: Sequence[str]) -> Tensor:
        """Ids ``[n, length]`` of texts of equal length in tokens, behind the start token."""
        ids = [[self.start, *self.encode(text)] for text in texts]
        if len({len(row) for row in ids}) != 1:
            raise ValueError(f"texts must be of one length in tokens, got {sorted({len(row) for row in ids})}")
        return torch.tensor(ids)

    def passages(self, texts: Sequence[str], length: int, per_text: int = 1) -> tuple[Tensor, np.ndarray]:
        """Up to `per_text` pieces of each text, behind the start token: ids ``[n, length]`` and the text of each."""
        rows, of = [], []
        for i, text in enumerate(texts):
            ids = self.encode(text[: 12 * length * per_text])
            for j in range(min(per_text, len(ids) // (length - 1))):
                rows.append([self.start, *ids[j * (length - 1) : (j + 1) * (length - 1)]])
                of.append(i)
        if not rows:
            raise ValueError(f"texts: none of {len(texts)} has {length - 1} tokens")
        return torch.tensor(rows), np.array(of)

    def rows(self, ids: Tensor, batch: int = 16) -> Tensor:
        """Activations ``[n, length - SKIP, d]`` at the dictionary's module; later blocks are not run."""
        with torch.inference_mode():
            sites = Sites.find(self.model, self.module)
            return torch.cat([run_to(self.model, sites, part)[:, SKIP:].clone() for part in ids.split(batch)]).clone()

    @contextlib.contextmanager
    def replay(self, ids: Tensor) -> Iterator[Tensor]:
        """Inside, forward passes of `ids` start at the dictionary's module: what lies before it is run once, here.

        Gives the activations ``[n, length, d]`` there. Hooks of the module see them as ever.
        """
        patcher = Patcher(self.model, self.module)
        with torch.no_grad(), patcher.recording(ids) as hidden:
            self.model(ids, use_cache=False)
        with patcher.replaced(hidden[0]):
            yield hidden[0]


class Outcome(NamedTuple):
    """What a recipe found: a table, what it says in words, and the numbers behind it."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    verdict: str
    numbers: dict[str, Any]

    def markdown(self) -> str:
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def print(self) -> None:
        from rich.console import Console
        from rich.table import Table

        # A file or a pipe has no width of its own: wide enough for every table here.
        console = Console(highlight=False)
        console = console if console.is_terminal else Console(highlight=False, width=150)

        table = Table(title=self.title)
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
        console.print(self.verdict, markup=False)


def command(recipe: Callable[[Setup, Any], Outcome], full: Any, quick: Any) -> None:
    """Run `recipe` as a script: on the demo's model with the dictionary of ``--run``, and print what it found.

    `full` and `quick` are its settings, dataclasses; those with a field `out` take it from ``--out``.
    """
    def main(
        run: Annotated[Path, typer.Option(help="a finished run of `fusae demo --out RUN`")] = Path("runs/demo"),
        small: Annotated[bool, typer.Option("--quick", help="everything small: to see that it runs")] = False,
        seed: Annotated[int, typer.Option(help="of all that is drawn")] = 0,
        out: Annotated[Path, typer.Option(help="folder for figures")] = Path("."),
        markdown: Annotated[bool, typer.Option("--markdown", help="print the table as Markdown")] = False,
    ) -> None:
        began = time.perf_counter()
        config = dataclasses.replace(quick if small else full, seed=seed)
        if hasattr(config, "out"):
            config = dataclasses.replace(config, out=out)
        torch.manual_seed(seed)
        outcome = recipe(load(run), config)
        if markdown:
            print(f"{outcome.markdown()}\n\n{outcome.verdict}")
        else:
            outcome.print()
        print(f"{time.perf_counter() - began:.0f} s")

    main.__doc__ = (recipe.__doc__ or "").strip()
    typer.run(main)


def load(run: Path) -> Setup:
    """The demo's model and text with the dictionary that `fusae demo` trained into `run`."""
    from fusae.pipeline.stages import read_settings

    if not (run / "coder").is_dir():
        raise SystemExit(f"no dictionary in {run}: train one with `fusae demo --out {run}` (minutes), or give --run")
    files = fetch_demo()
    loaded = load_model(files.model)
    _, data = read_settings(run)
    speeches = [row["text"] for row in _read_csv(files.speeches)]
    return Setup(loaded.model, loaded.tokenizer, SparseCoder.load(run / "coder"), data.module, _articles(files.news),
                 speeches)  # fmt: skip


def _articles(path: Path) -> list[Article]:
    found = {}
    for row in _read_csv(path):
        text = " ".join(row["text"].split())
        if len(text) >= 400:  # shorter ones are captions and errors of the crawl
            url = urlparse(row["article_source_link"])
            found[text] = Article(text, url.netloc.removeprefix("www."), _topic(url.path),
                                  is_held_out(row["text"]))  # fmt: skip
    return list(found.values())


def _topic(path: str) -> str:
    parts = {re.sub(r"-?\d+$", "", part) for part in path.lower().split("/")}
    named = [topic for topic, sections in TOPICS.items() if parts & set(sections)]
    return named[0] if len(named) == 1 else ""


def _read_csv(path: Path) -> Iterator[dict[str, str]]:
    csv.field_size_limit(1 << 30)
    with zipfile.ZipFile(path) as archive, archive.open(archive.namelist()[0]) as file:
        yield from csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline=""))


def pooled_codes(setup: Setup, rows: Tensor) -> Tensor:
    """Mean activation ``[n, m]`` of every latent over the tokens of passages ``[n, length, d]``."""
    codes = setup.coder.encode(rows.flatten(0, 1)).to_ragged()
    used = int(codes.offsets[-1])
    passage = codes.row_ids()[:used] // rows.shape[1]
    sums = rows.new_zeros(len(rows), codes.m)
    sums.index_put_((passage, codes.indices[:used].long()), codes.values[:used], accumulate=True)
    return sums / rows.shape[1]


@contextlib.contextmanager
def added(setup: Setup, vector: Tensor, start: int = SKIP) -> Iterator[None]:
    """Inside, `vector` (``[d]`` or ``[batch, 1, d]``) is added at the dictionary's module, from position `start` on.

    The plain way to steer, and what recipes compare with.
    """

    def hook(_module: nn.Module, _args: tuple, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        first = start if hidden.shape[1] > 1 else 0  # one token: a step after a cache
        shifted = hidden[:, first:] + vector
        return with_hidden(output, torch.cat([hidden[:, :first], shifted], 1))

    handle = setup.model.get_submodule(setup.module).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class LastToken:
    """Repeated passes of the last token of prompts ``[n, length]``: all before it is run once and its keys and values
    kept. For interventions at the last token this is the whole model at the price of one token."""

    def __init__(self, setup: Setup, ids: Tensor, batch: int = 16) -> None:
        from transformers import DynamicCache

        self._make, self.model, self.ids = DynamicCache, setup.model, ids
        kept = []
        with torch.no_grad():
            for part in ids.split(batch):
                cache = DynamicCache()
                self.model.model(part[:, :-1], past_key_values=cache, use_cache=True)
                kept.append([(layer.keys, layer.values) for layer in cache.layers])
        layers = zip(*kept, strict=True)
        self.cached = [tuple(torch.cat(parts) for parts in zip(*layer, strict=True)) for layer in layers]

    def __call__(self, index: Tensor | slice = slice(None)) -> Tensor:
        """Logits ``[n, vocabulary]`` after the last token of the prompts of `index`."""
        cache = self._make()
        for layer, (keys, values) in enumerate(self.cached):
            cache.update(keys[index], values[index], layer)
        return self.model(self.ids[index][:, -1:], past_key_values=cache, use_cache=True).logits[:, -1].float()


# --- numbers ------------------------------------------------------------------------------------------------------


def interval(values: Any, repeats: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of `values` ``[n]`` and the 95 % bootstrap interval of it."""
    values = np.asarray(values, dtype=np.float64)
    draws = values[np.random.default_rng(seed).integers(0, len(values), (repeats, len(values)))].mean(1)
    return float(values.mean()), *map(float, np.quantile(draws, (0.025, 0.975)))


def shown(values: Any, form: str = ".2f") -> str:
    """``mean [low, high]``"""
    mean, low, high = interval(values)
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def auroc(negative: np.ndarray, positive: np.ndarray) -> float:
    """How often a positive one scores above a negative one; ties count half."""
    difference = np.sign(positive[:, None] - negative)
    return float((difference.mean() + 1) / 2)


def logistic(x: Tensor, y: Tensor, l2: float = 1e-2, classes: int = 2) -> Callable[[Tensor], Tensor]:
    """A linear probe of rows ``[n, d]`` and labels ``[n]``: maps rows to logits ``[n, classes]``.

    Its attributes `weight` ``[classes, d]`` and `bias` are for plain rows; it is fitted to standardised ones.
    """
    mean, scale = x.mean(0), x.std(0) + 1e-6
    rows = (x - mean) / scale
    layer = nn.Linear(x.shape[1], classes)
    nn.init.zeros_(layer.weight)
    optimiser = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(layer(rows), y) + l2 * layer.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    with torch.no_grad():
        layer.bias -= layer.weight @ (mean / scale)
        layer.weight /= scale
    return layer.requires_grad_(False)
