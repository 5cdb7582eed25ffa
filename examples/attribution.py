# SPDX-License-Identifier: Apache-2.0
"""Attribution: which latents make the model agree a verb with its subject? And is the quick answer the true one?

"The keys to the cabinet" should be followed by "are": the metric is the logit of the right verb less that of the wrong
one. The indirect effect of a latent is what ablating it takes from the metric: exactly, one forward pass for each
latent; or for all latents and the dictionary's errors at once, from one backward pass, as gradient × activation. The
rank correlation of the two says how far to trust the quick one. Beside it: ranking by activation, by gradient, by the
direct effect on the logits, and gradient × activation of the plain dimensions of the activation. A circuit is what is
left when all but the best nodes are ablated; the best of it are drawn.

    python examples/attribution.py --run runs/demo --out figures
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import torch
from common import SKIP, Outcome, Setup, added, command
from torch import Tensor

import fusae

NOUNS = "key author pilot farmer doctor player student worker driver teacher book car".split()
BETWEEN = ["near", "behind", "with", "beside"]
VERBS = (" is", " are")


@dataclasses.dataclass(frozen=True)
class Config:
    """`prompts` of each number; `top` nodes by the quick effect and `others` at random are ablated exactly; `circuits`:
    how many nodes are kept; `drawn`: of them in the figure `out`/circuit.png."""

    prompts: int = 8
    top: int = 40
    others: int = 20
    circuits: tuple[int, ...] = (10, 40, 160)
    drawn: int = 12
    seed: int = 0
    out: Path = Path(".")


QUICK = Config(prompts=2, top=6, others=4, circuits=(2, 8), drawn=4)


def recipe(setup: Setup, config: Config) -> Outcome:
    """Indirect effects of latents and error nodes by gradient × activation, checked against exact ablation."""
    texts, plural = sentences(config)
    ids = setup.prompts(texts)
    verbs = torch.tensor([setup.first_token(verb) for verb in VERBS])
    right, wrong = verbs[plural], verbs[1 - plural]

    def metric() -> Tensor:
        logits = setup.model(ids, use_cache=False).logits[:, -1]
        return (logits.gather(1, right[:, None]) - logits.gather(1, wrong[:, None])).mean()

    with setup.replay(ids):
        with fusae.hook(setup.model, setup.module, setup.coder, mode="error", requires_grad=True) as h:
            full = metric()
            grads = torch.autograd.grad(full, [h.codes.values, h.error])
            x, codes, error = h.input, h.codes, h.error.detach()
        nodes = Nodes(setup, ids, codes, *grads, error, right, wrong)
        with torch.no_grad():
            checked = Checked(setup, metric, nodes, x, config)
            table, numbers = checked.table()
    figure = draw(setup, config, nodes, ids, texts, checked)
    best = max(numbers, key=lambda name: numbers[name]["spearman"])
    ours = numbers["gradient × activation"]
    ahead = {
        kept: [name for name, other in numbers.items() if other["circuits"][kept] > value]
        for kept, value in ours["circuits"].items()
    }
    told = "; ".join(f"{kept} nodes kept: {', '.join(names) or 'none'}" for kept, names in ahead.items())
    verdict = (
        f"Metric of the model: {full:.2f}. Gradient × activation and exact ablation of latents correlate with "
        f"{ours['spearman']:.2f}; best of the rankings: {best} ({numbers[best]['spearman']:.2f}). Circuits ahead of "
        f"its own, {told}. Without the errors of any token the metric is {checked.without_errors:.2f}. Drawn: {figure}."
    )
    title = f"{len(ids)} prompts; {len(checked.latents)} latents ablated (95 % bootstrap); faithfulness of circuits"
    columns = ["ranking", "Spearman with exact ablation", *(f"{n} nodes kept" for n in config.circuits)]
    return Outcome(title, columns, table, verdict, numbers)


def sentences(config: Config) -> tuple[list[str], Tensor]:
    """Sentences of a subject, a place and a noun of the other number, and whether the subject is plural."""
    choose = random.Random(config.seed)
    texts, plural = [], []
    for number in (0, 1):
        for subject in choose.sample(NOUNS, config.prompts):
            other = choose.choice([noun for noun in NOUNS if noun != subject])
            texts.append(f"The {subject}{'s' * number} {choose.choice(BETWEEN)} the {other}{'s' * (1 - number)}")
            plural.append(number)
    return texts, torch.tensor(plural)


class Nodes:
    """Quick effects of every latent and error, summed over tokens from `SKIP` on and averaged over prompts.

    Attributes: `rankings`: name → ``[m]``; `by_token`: ``[ctx, m]`` gradient × activation; `errors` ``[ctx]``;
    `active`: latents that are on at all.
    """

    def __init__(self, setup, ids, codes, value_grad, error_grad, error, right, wrong) -> None:
        values, indices = codes.values.detach(), codes.indices.long()
        n, ctx = ids.shape
        unembed = setup.model.get_output_embeddings().weight
        direct = setup.coder.W_dec @ (unembed[right] - unembed[wrong]).T  # [m, n]

        def summed(each: Tensor) -> Tensor:
            """``[ctx, m]`` of ``[n, ctx, k]``: the mean over prompts is in the metric already."""
            out = each.new_zeros(ctx, codes.m)
            out.index_put_((torch.arange(ctx)[None, :, None].expand_as(indices), indices), each, accumulate=True)
            out[:SKIP] = 0
            return out

        self.by_token = summed(value_grad * values)
        on = (values > 0).float()
        to_logits = direct.T[torch.arange(n)[:, None, None], indices] / n
        self.rankings = {
            "gradient × activation": self.by_token.sum(0),
            "direct effect on the logits": summed(to_logits * values)[-1],
            "activation": summed(values * setup.coder.decoder_norms()[indices] / n).sum(0),
            "gradient": summed(value_grad.abs() * on).sum(0),
        }
        self.active = summed(on).sum(0).nonzero().flatten()
        self.error, self.errors = error, (error_grad * error).sum((0, 2))
        self.errors[:SKIP] = 0
        self.gradient = error_grad  # by the activation itself: the error is part of it


class Checked:
    """Exact ablations, one forward pass each."""

    def __init__(self, setup: Setup, metric, nodes: Nodes, x: Tensor, config: Config) -> None:
        self.setup, self.metric, self.nodes, self.config = setup, metric, nodes, config
        self.full = float(metric())
        quick = nodes.rankings["gradient × activation"]
        generator = torch.Generator().manual_seed(config.seed)
        order = nodes.active[quick[nodes.active].abs().argsort(descending=True)]
        rest = order[config.top :]
        rest = rest[torch.randperm(len(rest), generator=generator)]
        self.latents = torch.cat([order[: config.top], rest[: config.others]])
        self.exact = torch.tensor([self.full - self.without(latent[None]) for latent in self.latents])
        tokens = range(SKIP, x.shape[1])
        self.error_exact = [self.full - self.without_error(slice(t, t + 1)) for t in tokens]
        self.without_errors = self.without_error(slice(SKIP, None))
        # The same for the dimensions of the activation, held at their mean.
        self.away = x[:, SKIP:] - x[:, SKIP:].mean((0, 1))
        self.dimensions = (nodes.gradient[:, SKIP:] * self.away).sum((0, 1))
        chosen = self.dimensions.abs().argsort(descending=True)[: len(self.latents)]
        self.chosen = chosen
        self.dimensions_exact = torch.tensor([self.full - self.held(d[None]) for d in chosen])

    def without(self, latents: Tensor) -> float:
        """The metric with some latents ablated."""
        with fusae.hook(self.setup.model, self.setup.module, self.setup.coder, mode="error") as h:
            h.ablate(latents, positions=slice(SKIP, None))
            return float(self.metric())

    def without_error(self, tokens: slice) -> float:
        change = torch.zeros_like(self.nodes.error)
        change[:, tokens] = -self.nodes.error[:, tokens]
        with added(self.setup, change[:, SKIP:]):
            return float(self.metric())

    def held(self, dimensions: Tensor) -> float:
        """The metric with some dimensions of the activation at their mean."""
        change = torch.zeros_like(self.away)
        change[..., dimensions] = -self.away[..., dimensions]
        with added(self.setup, change):
            return float(self.metric())

    def table(self) -> tuple[list[list[str]], dict]:
        """Rows, and the numbers of every ranking."""
        generator = torch.Generator().manual_seed(self.config.seed)
        rankings = {**self.nodes.rankings, "at random": torch.rand(self.nodes.by_token.shape[1], generator=generator)}
        active = self.nodes.active
        nothing = self.without(active)
        rows, numbers = [], {}

        def note(name: str, quick: Tensor, exact: Tensor, kept: dict[str, float]) -> None:
            rho, low, high = spearman(quick.numpy(), exact.numpy())
            numbers[name] = {"spearman": rho, "circuits": kept}
            rows.append([name, f"{rho:.2f} [{low:.2f}, {high:.2f}]", *(f"{value:.2f}" for value in kept.values())])

        for name, ranking in rankings.items():
            order, kept = active[ranking[active].argsort(descending=True)], {}
            for n in self.config.circuits:
                left = self.without(order[n:]) if n < len(order) else self.full
                kept[str(n)] = (left - nothing) / (self.full - nothing)
            # These two say how much, not which way: they are held against magnitudes.
            exact = self.exact.abs() if name in ("activation", "gradient") else self.exact
            note(name, ranking[self.latents], exact, kept)
        order, kept = self.dimensions.argsort(descending=True), {}
        none = self.held(order)
        for n in self.config.circuits:
            left = self.held(order[n:]) if n < len(order) else self.full
            kept[str(n)] = (left - none) / (self.full - none)
        note("dimensions, gradient × activation", self.dimensions[self.chosen], self.dimensions_exact, kept)
        pairs = zip(self.nodes.errors[SKIP:].tolist(), self.error_exact, strict=True)
        errors = [f"{quick:+.2f} / {exact:+.2f}" for quick, exact in pairs]
        rows.append(["errors by token, quick / exact", ", ".join(errors), *[""] * len(self.config.circuits)])
        return rows, numbers


def spearman(a: np.ndarray, b: np.ndarray, repeats: int = 500) -> tuple[float, float, float]:
    """Rank correlation and its 95 % bootstrap interval."""
    from scipy.stats import rankdata

    def rho(i) -> float:
        ranks = rankdata(a[i]), rankdata(b[i])
        return float(np.corrcoef(*ranks)[0, 1]) if min(r.std() for r in ranks) > 0 else 0.0

    draw = np.random.default_rng(0)
    drawn = [rho(draw.integers(0, len(a), len(a))) for _ in range(repeats)]
    return rho(np.arange(len(a))), *map(float, np.quantile(drawn, (0.025, 0.975)))


def draw(setup: Setup, config: Config, nodes: Nodes, ids: Tensor, texts: list[str], checked: Checked) -> Path:
    """The circuit as a picture: tokens → latents, where they act → the metric. Red: against the right verb."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    quick = nodes.rankings["gradient × activation"]
    latents = checked.latents[: config.drawn]
    # Token → latent: gradient of the latent's activation by the embedding × the embedding less the mean embedding.
    embed = setup.model.get_input_embeddings()
    embedded = embed(ids).detach().requires_grad_()
    with fusae.hook(setup.model, setup.module, setup.coder, mode="read") as h:
        setup.model(inputs_embeds=embedded, use_cache=False)
        values, indices = h.codes.values[:, SKIP:], h.codes.indices[:, SKIP:]
    edges = []
    for latent in latents:
        total = (values * (indices == latent)).sum()
        (gradient,) = torch.autograd.grad(total, embedded, retain_graph=True)
        edges.append((gradient * (embedded.detach() - embed.weight.mean(0))).sum((0, 2)))
    edges = torch.stack(edges).numpy()  # [latents, ctx]
    edges = edges / np.abs(edges).max(1, keepdims=True).clip(1e-9)

    unembed = setup.model.get_output_embeddings().weight
    promoted = (setup.coder.W_dec[latents] @ unembed.T).topk(3).indices
    labels = [
        f"{int(latent)}: " + ", ".join(repr(setup.tokenizer.decode([int(t)])) for t in row)
        for latent, row in zip(latents, promoted, strict=True)
    ]
    slots = ["start", *(setup.tokenizer.decode([int(t)]).strip() for t in ids[0, 1:])]
    figure, axes = pyplot.subplots(figsize=(11, 0.55 * max(len(latents), len(slots)) + 1.5))
    axes.axis("off")
    left = np.linspace(1, 0, len(slots))
    *middle, bottom = np.linspace(1, 0, len(latents) + 1)
    strongest = float(quick[latents].abs().max())
    box = {"boxstyle": "round", "fc": "white", "ec": "grey"}
    for i, latent in enumerate(latents):
        for t in range(len(slots)):
            if abs(edges[i, t]) > 0.2:
                axes.plot([0, 1], [left[t], middle[i]], color=_colour(edges[i, t]), lw=2 * abs(edges[i, t]), alpha=0.5)
        effect = float(quick[latent])
        axes.plot([1, 2], [middle[i], 0.5], color=_colour(effect), lw=5 * abs(effect) / strongest, alpha=0.7)
        where = slots[int(nodes.by_token[:, latent].abs().argmax())]
        exact = float(checked.exact[i])  # the latents drawn are the first of those ablated
        text = f"{labels[i]}\nat '{where}': {effect:+.2f} (exact {exact:+.2f})"
        axes.text(1, middle[i], text, ha="center", va="center", fontsize=7, bbox=box)
    total = float(nodes.errors.sum())
    axes.plot([1, 2], [bottom, 0.5], color=_colour(total), lw=5 * abs(total) / strongest, alpha=0.7)
    text = f"errors of the dictionary\nat all tokens: {total:+.2f} (exact {checked.full - checked.without_errors:+.2f})"
    axes.text(1, bottom, text, ha="center", va="center", fontsize=7, bbox={**box, "fc": "lightyellow"})
    for t, name in enumerate(slots):
        axes.text(0, left[t], name, ha="right", va="center", fontsize=9)
    axes.text(2, 0.5, f"right − wrong verb\n{checked.full:.2f}", va="center", fontsize=9)
    axes.set_xlim(-0.3, 2.5)
    axes.set_title(f"e.g. “{texts[0]} …”. Latents with the tokens they promote", fontsize=9)
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / "circuit.png"
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
    return path


def _colour(effect: float) -> str:
    return "tab:blue" if effect > 0 else "tab:red"


if __name__ == "__main__":
    command(recipe, Config(), QUICK)
