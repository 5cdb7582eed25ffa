# SPDX-License-Identifier: Apache-2.0
"""Both sides of a comparison of training runs: the other library's own trainer, and its recipe on fusae's ops.

A contender takes batches one by one (`step`) and is a dictionary at any time (`encode`, `decode`). Of the other
libraries nothing is copied: their classes are imported and driven as their own training loops drive them. The recipes
are in a file for each library; `RECIPES` of parity.py has them all.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from fusae import SparseCodes
from fusae.nn import SparseCoder, SparseCoderConfig, init_thresholds_
from fusae.optim import Adam

#: a difference that every recipe has
INITIAL = "both start from weights made by fusae, in the form of the recipe (the library would draw its own)"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What both sides are told.

    `lr` rises over `warmup_steps` and falls linearly to 0 from step `decay_start` on (steps from 0). A latent is dead
    after `dead_steps` batches without firing, by the rule of the library. `aux`: weight of the AuxK term. Of the forms
    that have one: `sparsity`, the weight of their sparsity term, rises as `lr` does; `bandwidth` and `threshold`, width
    of the window and initial threshold of a JumpReLU.
    """

    d: int
    m: int
    k: int
    steps: int
    batch_size: int
    lr: float
    warmup_steps: int
    decay_start: int
    dead_steps: int
    aux: float
    dtype: str = "float32"
    sparsity: float | None = None
    bandwidth: float | None = None
    threshold: float | None = None

    @property
    def k_aux(self) -> int:
        """d / 2, in all recipes here."""
        return self.d // 2

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Widths of the nested dictionaries, in all recipes here."""
        return self.m // 4, self.m // 2, self.m

    def ramp(self, i: int) -> float:
        """Share of the sparsity weight at step `i` (from 0), in all recipes here."""
        return min(1.0, i / self.warmup_steps)

    def told(self) -> dict[str, Any]:
        """The fields that the recipe uses."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def after_warmup(self, i: int) -> float:
        """Share of the learning rate at step `i` (from 0), once it has risen."""
        return min(1.0, (self.steps - i) / (self.steps - self.decay_start))


class Contender(Protocol):
    dead: int  #: latents that were dead, and so in the AuxK term, at the last step

    def step(self, x: Tensor) -> float:
        """Train on a batch ``[n, d]``; the loss before the update."""

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""

    def encode(self, x: Tensor) -> SparseCodes: ...

    def decode(self, codes: SparseCodes) -> Tensor: ...

    @property
    def directions(self) -> Tensor:
        """Decoder rows ``[m, d]``."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A library's way to train, and the contenders that follow it.

    Attributes:
        package: the library on PyPI.
        aux: its weight of the AuxK term.
        scale: what it multiplies inputs ``[n, d]`` by before training.
        start: (settings, unit rows ``[m, d]``, first batch) -> initial weights by the names of `SparseCoder`.
        peer: (settings, initial weights) -> the library's own trainer.
        own: the same on fusae, by name.
        differences: where the two sides are not the same, in words.
        fields: what it sets in `Settings`, where nothing else is asked for.
    """

    package: str
    aux: float
    scale: Callable[[Tensor], float]
    start: Callable[[Settings, Tensor, Tensor], dict[str, Tensor]]
    peer: Callable[[Settings, dict[str, Tensor]], Contender]
    own: dict[str, Callable[[Settings, dict[str, Tensor]], Contender]]
    differences: tuple[str, ...]
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def version(self) -> str:
        return importlib.metadata.version(self.package)


class Dense:
    """A library's module that encodes to a dense ``[n, m]``."""

    module: Any

    def encode(self, x: Tensor) -> SparseCodes:
        return SparseCodes.from_dense(self.module.encode(x))

    def decode(self, codes: SparseCodes) -> Tensor:
        return self.module.decode(codes.to_dense())


class Own:
    """A `SparseCoder` trained by a loop of its own, with the selection and the options of `shape`."""

    dead = 0

    def __init__(
        self,
        settings: Settings,
        start: dict[str, Tensor],
        unit_decoder: bool,
        clip: bool = True,
        beta1: float = 0.9,
        **shape: Any,
    ) -> None:
        s = self.settings = settings
        k_aux = 0 if shape.get("select") in ("relu", "threshold") else s.k_aux
        config = SparseCoderConfig(s.d, s.m, s.k, k_aux=k_aux, dtype=s.dtype, **shape)
        self.coder = with_weights(SparseCoder(config, sparse_grad=True), start)
        if s.threshold is not None:
            init_thresholds_(self.coder, s.threshold)
        rest = [p for name, p in self.coder.named_parameters() if name != "W_dec"]
        groups = [
            {"params": rest},
            {"params": [self.coder.W_dec], "project": unit_decoder, "renormalise": unit_decoder},
        ]
        self.optimizer = Adam(groups, settings.lr, (beta1, 0.999))
        self.clip, self.done = clip, 0

    def update(self, loss: Tensor) -> float:
        """Gradients (projected where the decoder has unit rows), clipped to norm 1, Adam, unit rows, thresholds."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        loss.backward()
        if self.clip:
            self.optimizer.clip_grad_norm_(1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.coder.clamp_()
        self.done += 1
        return float(loss.detach())

    @property
    def directions(self) -> Tensor:
        return self.coder.W_dec.detach()

    def encode(self, x: Tensor) -> SparseCodes:
        return self.coder.encode(x)

    def decode(self, codes: SparseCodes) -> Tensor:
        return self.coder.decode(codes)


def with_weights(coder: SparseCoder, weights: dict[str, Tensor]) -> SparseCoder:
    with torch.no_grad():
        for name, weight in weights.items():
            getattr(coder, name).copy_(weight)
    return coder


def tied(settings: Settings, rows: Tensor, b_dec: Tensor) -> dict[str, Tensor]:
    return {"W_enc": rows, "b_enc": rows.new_zeros(settings.m), "W_dec": rows, "b_dec": b_dec}
