# SPDX-License-Identifier: Apache-2.0
"""Latent attacks: how far does a small change of the codes move the model, beside the same change of the activations?

Projected gradient ascent on the loss of the model's own prediction, at the last token of news passages. The change of
the activation has at most the budget's norm, whatever it is made of: any vector; a random subspace of as many
dimensions as there are active latents; the active latents (their values stay at least 0); a few of all latents,
switched on or off.

    python examples/latent_attacks.py --run runs/demo
"""

from __future__ import annotations

import contextlib
import dataclasses
import random

import torch
from common import LastToken, Outcome, Setup, added, command, interval, shown
from torch import Tensor

import fusae


@dataclasses.dataclass(frozen=True)
class Config:
    """`passages` of `length` tokens; `budgets`: shares of the activation's norm; `few`: latents of the last attack."""

    passages: int = 64
    length: int = 24
    budgets: tuple[float, ...] = (0.05, 0.1, 0.2)
    steps: int = 12
    few: int = 4
    seed: int = 0


QUICK = Config(passages=4, length=10, budgets=(0.5,), steps=3)


def recipe(setup: Setup, config: Config) -> Outcome:
    """Projected gradient ascent on codes and on activations within one budget."""
    choose = random.Random(config.seed)
    texts = [a.text for a in setup.articles if a.held_out]
    ids, _ = setup.passages(choose.sample(texts, min(len(texts), config.passages)), config.length)
    last = LastToken(setup, ids)
    with torch.no_grad(), fusae.hook(setup.model, setup.module, setup.coder, mode="read") as h:
        clean = last()
        x, codes = h.input[:, 0], h.codes.to_dense()[:, 0]
    predicted = clean.argmax(1)
    generator = torch.Generator().manual_seed(config.seed)
    subspace = torch.linalg.qr(torch.randn(x.shape[1], setup.coder.config.k, generator=generator))[0].T
    union = (codes > 0).any(0).nonzero().flatten()

    attacks = {
        "activations": Attack(setup, torch.eye(x.shape[1])),
        "random subspace of k dimensions": Attack(setup, subspace),
        "active latents": Attack(setup, setup.coder.W_dec[union], union, codes[:, union], active=True),
        f"any {config.few} latents": Attack(
            setup, setup.coder.W_dec, torch.arange(codes.shape[1]), codes, few=config.few
        ),
    }
    table, numbers, flips = [], {}, {}
    for budget in config.budgets:
        limit = budget * x.norm(dim=-1)
        noise = torch.randn(x.shape, generator=generator)
        noise *= (limit / noise.norm(dim=-1))[:, None]
        with torch.no_grad(), added(setup, noise[:, None]):
            results = {"random direction": (last(), noise, noise)}
        for name, attack in attacks.items():
            results[name] = attack.run(last, predicted, limit, config.steps)
        for name, (logits, change, moved) in results.items():
            flipped = (logits.argmax(1) != predicted).float()
            loss = torch.nn.functional.cross_entropy(logits, predicted, reduction="none")
            flips[name, budget] = flipped
            numbers[f"{name} {budget:g}"] = {"flipped": float(flipped.mean()), "loss": float(loss.mean())}
            table.append([
                name, f"{budget:g}", shown(flipped), f"{loss.mean():.2f}",
                f"{float((change.norm(dim=-1) / x.norm(dim=-1)).mean()):.3f}",
                f"{float((moved.abs() > 1e-6).sum(-1).float().mean()):.0f}",
            ])  # fmt: skip
    middle = config.budgets[len(config.budgets) // 2]
    gaps = {name: interval(flips[name, middle] - flips["activations", middle]) for name in list(attacks)[1:]}
    told = "; ".join(f"{name} {m:+.2f} ({low:+.2f} to {high:+.2f})" for name, (m, low, high) in gaps.items())
    weaker = all(high < 0 for _, _, high in gaps.values())
    verdict = (
        f"Flipped at budget {middle:g}, less those of the attack on activations: {told}. "
        f"{'The baseline wins: an attack on activations is stronger than any through latents. ' if weaker else ''}"
        f"Active latents flip {flips['active latents', middle].mean():.2f}, a random subspace of as many dimensions "
        f"{flips['random subspace of k dimensions', middle].mean():.2f}."
    )
    loss = torch.nn.functional.cross_entropy(clean, predicted).item()
    title = f"{len(ids)} passages, {config.steps} steps; loss of the prediction without an attack: {loss:.2f}"
    columns = ["what is changed", "budget", "predictions flipped", "loss", "norm used", "entries changed"]
    return Outcome(title, columns, table, verdict, numbers)


class Attack:
    """Changes z ``[n, q]`` of the rows of `basis` ``[q, d]``: what is added to the activation is ``z @ basis``.

    With `latents` they are changes of codes ``[n, q]``, made through the dictionary: codes stay at least 0; `active`:
    only those above 0 change; `few`: at most so many of each row do.
    """

    def __init__(
        self, setup: Setup, basis: Tensor, latents: Tensor | None = None, codes: Tensor | None = None,
        active: bool = False, few: int | None = None,
    ) -> None:  # fmt: skip
        self.setup, self.basis, self.latents, self.codes = setup, basis, latents, codes
        self.allowed = codes > 0 if active else None
        self.few, self.chosen = few, None

    def run(self, last: LastToken, predicted: Tensor, limit: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """Logits after the attack, the change of the activation ``[n, d]``, and z."""
        z, self.chosen = torch.zeros(len(predicted), len(self.basis)), None
        step = 2.5 * limit / steps
        for _ in range(steps):
            z.requires_grad_()
            with self.applied(z):
                loss = torch.nn.functional.cross_entropy(last(), predicted, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, z)
            with torch.no_grad():
                z = self.projected(z, gradient, step, limit)
        with torch.no_grad(), self.applied(z):
            return last(), z @ self.basis, z

    def applied(self, z: Tensor) -> contextlib.AbstractContextManager:
        if self.latents is None:
            return added(self.setup, (z @ self.basis)[:, None])
        h = fusae.hook(self.setup.model, self.setup.module, self.setup.coder, mode="error")
        return h.edit(self.latents, add=z[:, None])

    def projected(self, z: Tensor, gradient: Tensor, step: Tensor, limit: Tensor) -> Tensor:
        """A step up the gradient, and back into the budget and what is allowed."""
        if self.allowed is not None:
            gradient = gradient * self.allowed
        if self.few is not None:
            # A latent that is off can only be raised: others are no candidates.
            gain = torch.where((self.codes <= 0) & (z <= 0), gradient.clamp(min=0), gradient)
            if self.chosen is None:
                self.chosen = torch.zeros_like(gain).scatter(1, gain.abs().topk(self.few).indices, 1.0)
            gradient = gain * self.chosen
        length = (gradient @ self.basis).norm(dim=-1).clamp_min(1e-12)
        z = z + gradient * (step / length)[:, None]
        if self.codes is not None:
            z = torch.maximum(z, -self.codes)
        length = (z @ self.basis).norm(dim=-1).clamp_min(1e-12)
        return z * (limit / length).clamp(max=1)[:, None]


if __name__ == "__main__":
    command(recipe, Config(), QUICK)
