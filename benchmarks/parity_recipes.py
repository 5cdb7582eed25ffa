# SPDX-License-Identifier: Apache-2.0
"""Both sides of a comparison of training runs: the other library's own trainer, and its recipe on fusae's ops.

A contender takes batches one by one (`step`) and is a dictionary at any time (`encode`, `decode`). Of the other
libraries nothing is copied: their classes are imported and driven as their own training loops drive them.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from fusae import SparseCodes, decode
from fusae.nn import DeadLatents, SparseCoder, SparseCoderConfig
from fusae.optim import Adam
from fusae.train import TrainConfig, Trainer


@dataclasses.dataclass(frozen=True)
class Settings:
    """What both sides are told.

    `lr` rises over `warmup_steps` and falls linearly to 0 from step `decay_start` on (steps from 0). A latent is dead
    after `dead_steps` batches without firing, by the rule of the library. `aux`: weight of the AuxK term.
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

    @property
    def k_aux(self) -> int:
        """d / 2, in all recipes here."""
        return self.d // 2

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
    """

    package: str
    aux: float
    scale: Callable[[Tensor], float]
    start: Callable[[Settings, Tensor, Tensor], dict[str, Tensor]]
    peer: Callable[[Settings, dict[str, Tensor]], Contender]
    own: dict[str, Callable[[Settings, dict[str, Tensor]], Contender]]
    differences: tuple[str, ...]

    @property
    def version(self) -> str:
        return importlib.metadata.version(self.package)


class _Dense:
    """A library's module that encodes to a dense ``[n, m]``."""

    module: Any

    def encode(self, x: Tensor) -> SparseCodes:
        return SparseCodes.from_dense(self.module.encode(x))

    def decode(self, codes: SparseCodes) -> Tensor:
        return self.module.decode(codes.to_dense())


class _Own:
    """A `SparseCoder` trained by a loop of its own."""

    def __init__(self, settings: Settings, start: dict[str, Tensor], unit_decoder: bool, **shape: Any) -> None:
        s = self.settings = settings
        config = SparseCoderConfig(s.d, s.m, s.k, k_aux=s.k_aux, dtype=s.dtype, **shape)
        self.coder = _with_weights(SparseCoder(config, seed=None, sparse_grad=True), start)
        c = self.coder
        groups = [
            {"params": [c.W_enc, c.b_enc, c.b_dec]},
            {"params": [c.W_dec], "project": unit_decoder, "renormalise": unit_decoder},
        ]
        self.optimizer = Adam(groups, settings.lr)
        self.done = 0

    def update(self, loss: Tensor) -> float:
        """Gradients (projected where the decoder has unit rows), clipped to norm 1, Adam, unit rows."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        loss.backward()
        self.optimizer.clip_grad_norm_(1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        return float(loss.detach())

    @property
    def directions(self) -> Tensor:
        return self.coder.W_dec.detach()

    def encode(self, x: Tensor) -> SparseCodes:
        return self.coder.encode(x)

    def decode(self, codes: SparseCodes) -> Tensor:
        return self.coder.decode(codes)


def _with_weights(coder: SparseCoder, weights: dict[str, Tensor]) -> SparseCoder:
    with torch.no_grad():
        for name, weight in weights.items():
            getattr(coder, name).copy_(weight)
    return coder


def _tied(settings: Settings, rows: Tensor, b_dec: Tensor) -> dict[str, Tensor]:
    return {"W_enc": rows, "b_enc": rows.new_zeros(settings.m), "W_dec": rows, "b_dec": b_dec}


# --- dictionary_learning --------------------------------------------------------------------------------------------


def _dictionary_learning_lr(settings: Settings, i: int) -> float:
    """At step `i` from 0; the first step of a warm-up has learning rate 0."""
    s = settings
    return s.lr * (i / s.warmup_steps if i < s.warmup_steps else s.after_warmup(i))


class _DictionaryLearningTopK(_Dense):
    def __init__(self, settings: Settings, start: dict[str, Tensor]) -> None:
        from dictionary_learning.trainers.top_k import TopKTrainer

        s = settings
        self.trainer = TopKTrainer(
            s.steps, s.d, s.m, s.k, layer=0, lm_name="none", lr=s.lr, auxk_alpha=s.aux, warmup_steps=s.warmup_steps,
            decay_start=s.decay_start, device="cpu",
        )  # fmt: skip
        self.trainer.dead_feature_threshold = s.dead_steps * s.batch_size
        self.module = self.trainer.ae.to(getattr(torch, s.dtype))
        with torch.no_grad():
            self.module.encoder.weight.copy_(start["W_enc"])
            self.module.decoder.weight.copy_(start["W_dec"].T)
        self.done = 0

    def step(self, x: Tensor) -> float:
        self.done += 1
        return self.trainer.update(self.done - 1, x)  # step 0 sets b_dec

    @property
    def dead(self) -> int:
        return self.trainer.dead_features

    @property
    def lr(self) -> float:
        return self.trainer.optimizer.param_groups[0]["lr"]

    @property
    def directions(self) -> Tensor:
        return self.module.decoder.weight.detach().T.contiguous()


class _DictionaryLearningTopKOnFusae(_Own):
    def __init__(self, settings: Settings, start: dict[str, Tensor]) -> None:
        super().__init__(settings, start, unit_decoder=True)
        self.unused = torch.zeros(settings.m, dtype=torch.int64)

    @property
    def lr(self) -> float:
        return _dictionary_learning_lr(self.settings, self.done)

    def step(self, x: Tensor) -> float:
        s = self.settings
        # The recipe counts this batch before it asks which latents are dead, and counts selection, whatever the value.
        with torch.no_grad():
            selected = self.coder.encode(x).indices.long().reshape(-1)
        self.unused += len(x)
        self.unused[selected] = 0
        dead = self.unused >= s.dead_steps * s.batch_size
        self.dead = int(dead.sum())
        masked = {"dead": dead, "k_aux": min(s.k_aux, self.dead)} if self.dead else {}
        return self.update(self.coder.loss(x, **masked, aux_coefficient=s.aux, variance=1.0).loss)


class _DelayedWarmup(TrainConfig):
    """The schedule of dictionary_learning: a step behind `TrainConfig`'s while it rises, the same where it falls."""

    def lr_at(self, step: int) -> float:
        settings = Settings(
            self.d, self.m, self.k, self.steps, self.batch_size, self.lr, self.warmup_steps,
            round(self.steps * (1 - self.decay)), 1, 0.0,
        )  # fmt: skip
        return _dictionary_learning_lr(settings, step - 1)


class _DictionaryLearningTopKOnTrainer:
    """`fusae.train.Trainer`, as near to the recipe as its configuration comes; what is set from outside is below."""

    def __init__(self, settings: Settings, start: dict[str, Tensor]) -> None:
        s = settings
        config = _DelayedWarmup(
            m=s.m, k=s.k, d=s.d, batch_size=s.batch_size, tokens=s.steps * s.batch_size, lr=s.lr,
            warmup_steps=s.warmup_steps, decay=1 - s.decay_start / s.steps, clip_norm=1.0, k_aux=s.k_aux,
            aux_coefficient=s.aux, dead_window=s.dead_steps * s.batch_size, scale_input=False, b_dec_init="zero",
            dtype=s.dtype, device="cpu",
        )  # fmt: skip
        some_rows = torch.randn(s.batch_size, s.d, dtype=start["W_dec"].dtype)  # batches come from outside
        self.trainer = Trainer(config, some_rows, show=False)
        _with_weights(self.trainer.coder, start)
        self.trainer.scaling.variance = 1.0  # the squared error of this recipe is not normalised

    def step(self, x: Tensor) -> float:
        self.dead = int(self.trainer.dead.mask().sum())
        return float(self.trainer.train_step(x).loss.detach())

    @property
    def lr(self) -> float:
        return self.trainer.config.lr_at(self.trainer.step + 1)

    @property
    def directions(self) -> Tensor:
        return self.trainer.coder.W_dec.detach()

    def encode(self, x: Tensor) -> SparseCodes:
        return self.trainer.coder.encode(x)

    def decode(self, codes: SparseCodes) -> Tensor:
        return self.trainer.coder.decode(codes)


def _dictionary_learning_start(settings: Settings, rows: Tensor, first: Tensor) -> dict[str, Tensor]:
    from dictionary_learning.trainers.top_k import geometric_median

    return _tied(settings, rows, geometric_median(first))


# --- SAELens --------------------------------------------------------------------------------------------------------


class _SAELensTopK(_Dense):
    def __init__(self, settings: Settings, start: dict[str, Tensor]) -> None:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        s = settings
        shape = TopKTrainingSAEConfig(d_in=s.d, d_sae=s.m, k=s.k, dtype=s.dtype, aux_loss_coefficient=s.aux)
        self.module = TopKTrainingSAE(shape)
        config = SAETrainerConfig(
            total_training_samples=s.steps * s.batch_size, train_batch_size_samples=s.batch_size, lr=s.lr,
            lr_end=s.lr / 10, lr_warm_up_steps=s.warmup_steps, lr_decay_steps=s.steps - s.decay_start,
            dead_feature_window=s.dead_steps,
        )  # fmt: skip
        self.trainer = SAETrainer(config, self.module, data_provider=iter(()))
        with torch.no_grad():
            for name in ("b_enc", "W_dec", "b_dec"):
                getattr(self.module, name).copy_(start[name])
            self.module.W_enc.copy_(start["W_enc"].T)

    def step(self, x: Tensor) -> float:
        self.dead = int(self.trainer.dead_neurons.sum())
        output = self.trainer.step(x)
        self.trainer.n_training_steps += 1  # as `SAETrainer.fit` does
        return float(output.loss.detach())

    @property
    def lr(self) -> float:
        return self.trainer.optimizer.param_groups[0]["lr"]

    @property
    def directions(self) -> Tensor:
        return self.module.W_dec.detach()


class _SAELensTopKOnFusae(_Own):
    def __init__(self, settings: Settings, start: dict[str, Tensor]) -> None:
        # Without activation: the recipe's AuxK takes pre-activations below 0 as they are; ReLU of the rest in `step`.
        super().__init__(settings, start, unit_decoder=False, activation="none", select_by_norm=True)
        self.unused = DeadLatents(settings.m, (settings.dead_steps + 1) * settings.batch_size)

    @property
    def lr(self) -> float:
        s, i = self.settings, self.done
        return s.lr * min((i + 1) / s.warmup_steps, s.after_warmup(i))

    def encode(self, x: Tensor) -> SparseCodes:
        return _relu(self.coder.encode(x))

    def step(self, x: Tensor) -> float:
        s, dead = self.settings, self.unused.mask()
        count = self.dead = int(dead.sum())
        if count == 0:
            codes = self.encode(x)
            loss = (self.decode(codes) - x).square().sum(-1).mean()
        else:
            codes, aux_codes = self.coder.encode(x, dead, min(s.k_aux, count))
            codes = _relu(codes)
            error = self.decode(codes) - x
            aux_error = decode(aux_codes, self.coder.W_dec, sparse_grad=True) + error.detach()
            aux = min(count / s.k_aux, 1.0) * aux_error.square().sum(-1).mean()
            loss = error.square().sum(-1).mean() + s.aux * aux
        self.unused.update(codes)
        return self.update(loss)


def _relu(codes: SparseCodes) -> SparseCodes:
    return dataclasses.replace(codes, values=codes.values.relu())


def _saelens_start(settings: Settings, rows: Tensor, first: Tensor) -> dict[str, Tensor]:
    return _tied(settings, 0.1 * rows, rows.new_zeros(settings.d))


_INITIAL = "both start from weights made by fusae, in the form of the recipe (the library would draw its own)"

RECIPES = {
    "dictionary_learning-topk": Recipe(
        "dictionary-learning",
        1 / 32,
        lambda x: float(x.double().square().sum(1).mean() ** -0.5),
        _dictionary_learning_start,
        _DictionaryLearningTopK,
        {"fusae": _DictionaryLearningTopKOnFusae, "fusae Trainer": _DictionaryLearningTopKOnTrainer},
        (
            _INITIAL + "; b_dec from the library's geometric median of the first batch",
            "dead after dead_steps batches instead of 10,000,000 tokens, on both sides",
            "rows with fewer than k positive pre-activations: the library fills up with latents of its top-k's choice "
            "among the zeros and counts them as fired; fusae fills up with the largest pre-activations",
            "the library divides by norm + 1e-6 to project and by norm + eps to renormalise, fusae by the norm",
            "the library's threshold (for inference without top-k) is not used on either side",
            "fusae Trainer only: latents are dead by the batches before this one, fired means value > 0, and a latent "
            "that is dead can be in both selections; squared error not normalised, initial weights and the later "
            "warm-up are set from outside",
        ),
    ),
    "saelens-topk": Recipe(
        "sae-lens",
        1.0,
        lambda x: x.shape[1] ** 0.5 / float(x.double().norm(dim=1).mean()),
        _saelens_start,
        _SAELensTopK,
        {"fusae": _SAELensTopKOnFusae},
        (
            _INITIAL,
            "dead after dead_steps batches instead of 1,000, on both sides",
            "inputs are scaled once, before training, instead of by the library's estimate from the first batches",
        ),
    ),
}  # fmt: skip
