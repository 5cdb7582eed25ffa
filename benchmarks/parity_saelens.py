# SPDX-License-Identifier: Apache-2.0
"""Recipes of SAELens (https://github.com/decoderesearch/SAELens)."""

from __future__ import annotations

import dataclasses

import torch
from parity_base import INITIAL, Dense, Own, Recipe, Settings, tied
from torch import Tensor

from fusae import SparseCodes, decode
from fusae.nn import DeadLatents


class _TopK(Dense):
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


class _TopKOnFusae(Own):
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


def _start(settings: Settings, rows: Tensor, first: Tensor) -> dict[str, Tensor]:
    return tied(settings, 0.1 * rows, rows.new_zeros(settings.d))


RECIPES = {
    "saelens-topk": Recipe(
        "sae-lens",
        1.0,
        lambda x: x.shape[1] ** 0.5 / float(x.double().norm(dim=1).mean()),
        _start,
        _TopK,
        {"fusae": _TopKOnFusae},
        (
            INITIAL,
            "dead after dead_steps batches instead of 1,000, on both sides",
            "activations are scaled once, before training, instead of by the library's estimate from the first batches",
        ),
    ),
}  # fmt: skip
