# SPDX-License-Identifier: Apache-2.0
"""Recipes of dictionary_learning (https://github.com/saprmarks/dictionary_learning)."""

from __future__ import annotations

import torch
from parity_base import INITIAL, Dense, Own, Recipe, Settings, tied, with_weights
from torch import Tensor

from fusae import SparseCodes
from fusae.nn import objectives
from fusae.train import TrainConfig, Trainer


def _lr(settings: Settings, i: int) -> float:
    """At step `i` from 0; the first step of a warm-up has learning rate 0."""
    s = settings
    return s.lr * (i / s.warmup_steps if i < s.warmup_steps else s.after_warmup(i))


class _TopK(Dense):
    name = "TopKTrainer"

    def __init__(self, settings: Settings, start: dict[str, Tensor]) -> None:
        from dictionary_learning import trainers

        s = settings
        self.trainer = getattr(trainers, self.name)(
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


class _BatchTopK(_TopK):
    name = "BatchTopKTrainer"

    def encode(self, x: Tensor) -> SparseCodes:
        return SparseCodes.from_dense(self.module.encode(x, use_threshold=False))


class _TopKOnFusae(Own):
    select, objective = "topk", objectives.TopK

    def __init__(self, settings: Settings, start: dict[str, Tensor]) -> None:
        super().__init__(settings, start, unit_decoder=True, select=self.select)
        self.unused = torch.zeros(settings.m, dtype=torch.int64)

    @property
    def lr(self) -> float:
        return _lr(self.settings, self.done)

    def step(self, x: Tensor) -> float:
        s = self.settings
        # The recipe counts this batch before it asks which latents are dead.
        with torch.no_grad():
            fired = self.fired(self.coder.encode(x))
        self.unused += len(x)
        self.unused[fired.long().reshape(-1)] = 0
        dead = self.unused >= s.dead_steps * s.batch_size
        self.dead = int(dead.sum())
        masked = {"dead": dead, "k_aux": min(s.k_aux, self.dead)} if self.dead else {}
        moment = objectives.Moment(**masked, variance=1.0, step=self.done)
        return self.update(self.objective(s.aux)(self.coder, x, x, moment).loss)

    def fired(self, codes: SparseCodes) -> Tensor:
        return codes.indices  # what was selected, whatever the value


class _BatchTopKOnFusae(_TopKOnFusae):
    select, objective = "batch_topk", objectives.BatchTopK

    def fired(self, codes: SparseCodes) -> Tensor:
        return codes.indices[: int(codes.offsets[-1])][codes.values[: int(codes.offsets[-1])] > 0]


class _DelayedWarmup(TrainConfig):
    """The schedule of dictionary_learning: a step behind `TrainConfig`'s while it rises, the same where it falls."""

    def lr_at(self, step: int) -> float:
        settings = Settings(
            self.d, self.m, self.k, self.steps, self.batch_size, self.lr, self.warmup_steps,
            round(self.steps * (1 - self.decay)), 1, 0.0,
        )  # fmt: skip
        return _lr(settings, step - 1)


class _TopKOnTrainer:
    """`fusae.train.Trainer`, as near to the recipe as its configuration comes; what is set from outside is below."""

    form = "topk"

    def __init__(self, settings: Settings, start: dict[str, Tensor]) -> None:
        s = settings
        config = _DelayedWarmup(
            form=self.form, m=s.m, k=s.k, d=s.d, batch_size=s.batch_size, tokens=s.steps * s.batch_size, lr=s.lr,
            warmup_steps=s.warmup_steps, decay=1 - s.decay_start / s.steps, clip_norm=1.0, k_aux=s.k_aux,
            aux_coefficient=s.aux, dead_window=s.dead_steps * s.batch_size, scale_input=False, b_dec_init="zero",
            dtype=s.dtype, device="cpu",
        )  # fmt: skip
        some_rows = torch.randn(s.batch_size, s.d, dtype=start["W_dec"].dtype)  # batches come from outside
        self.trainer = Trainer(config, some_rows, show=False)
        with_weights(self.trainer.coder, start)
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


class _BatchTopKOnTrainer(_TopKOnTrainer):
    form = "batch_topk"


def _start(settings: Settings, rows: Tensor, first: Tensor) -> dict[str, Tensor]:
    from dictionary_learning.trainers.top_k import geometric_median

    return tied(settings, rows, geometric_median(first))


_DIFFERENCES = (
    INITIAL + "; b_dec from the library's geometric median of the first batch",
    "dead after dead_steps batches instead of 10,000,000 tokens, on both sides",
    "the library divides by norm + 1e-6 to project and by norm + eps to renormalise, fusae by the norm",
    "fusae Trainer only: latents are dead by the batches before this one, fired means value > 0, and a latent that is "
    "dead can be in both selections; squared error not normalised, initial weights and the later warm-up are set from "
    "outside",
)


def _unit_mean_square(x: Tensor) -> float:
    return float(x.double().square().sum(1).mean() ** -0.5)


RECIPES = {
    "dictionary_learning-topk": Recipe(
        "dictionary-learning",
        1 / 32,
        _unit_mean_square,
        _start,
        _TopK,
        {"fusae": _TopKOnFusae, "fusae Trainer": _TopKOnTrainer},
        (
            *_DIFFERENCES,
            "rows with fewer than k positive pre-activations: the library fills up with latents of its top-k's choice "
            "among the zeros and counts them as fired; fusae fills up with the largest pre-activations",
            "the library's threshold (for inference without top-k) is not used on either side",
        ),
    ),
    "dictionary_learning-batch-topk": Recipe(
        "dictionary-learning",
        1 / 32,
        _unit_mean_square,
        _start,
        _BatchTopK,
        {"fusae": _BatchTopKOnFusae, "fusae Trainer": _BatchTopKOnTrainer},
        (
            *_DIFFERENCES,
            "all are measured with the largest of each batch of 2,048 rows, not with their threshold",
        ),
    ),
}
