# SPDX-License-Identifier: Apache-2.0
"""Recipes of SAELens (https://github.com/decoderesearch/SAELens)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from parity_base import INITIAL, Dense, Own, Recipe, Settings, tied
from torch import Tensor

from fusae import SparseCodes, decode, decode_loss
from fusae.nn import DeadLatents, objectives


class _Theirs(Dense):
    """A training SAE of the library, under its trainer."""

    name: str

    def __init__(self, settings: Settings, start: dict[str, Tensor]) -> None:
        import sae_lens
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        s = settings
        shape = getattr(sae_lens, f"{self.name}Config")(d_in=s.d, d_sae=s.m, dtype=s.dtype, **self.more(s))
        self.module = getattr(sae_lens, self.name)(shape)
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

    def more(self, s: Settings) -> dict[str, Any]:
        """Fields of its configuration."""
        return {"k": s.k, "aux_loss_coefficient": s.aux}

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


class _TopK(_Theirs):
    name = "TopKTrainingSAE"


class _BatchTopK(_Theirs):
    name = "BatchTopKTrainingSAE"


class _Matryoshka(_Theirs):
    name = "MatryoshkaBatchTopKTrainingSAE"

    def more(self, s: Settings) -> dict[str, Any]:
        return {**super().more(s), "matryoshka_widths": list(s.prefixes)}


class _JumpReLU(_Theirs):
    name = "JumpReLUTrainingSAE"

    def more(self, s: Settings) -> dict[str, Any]:
        return {
            "jumprelu_init_threshold": s.threshold, "jumprelu_bandwidth": s.bandwidth, "l0_coefficient": s.sparsity,
            "l0_warm_up_steps": s.warmup_steps,
        }  # fmt: skip


class _JumpReLUTanh(_JumpReLU):
    def more(self, s: Settings) -> dict[str, Any]:
        return {
            **super().more(s), "jumprelu_sparsity_loss_mode": "tanh", "jumprelu_ste_to_input": True,
            "pre_act_loss_coefficient": s.aux,
        }  # fmt: skip


class _OnFusae(Own):
    """With the learning rates and the dead latents of the library."""

    def __init__(self, settings: Settings, start: dict[str, Tensor], **shape: Any) -> None:
        super().__init__(settings, start, unit_decoder=False, **shape)
        self.unused = DeadLatents(settings.m, (settings.dead_steps + 1) * settings.batch_size)

    @property
    def lr(self) -> float:
        s, i = self.settings, self.done
        return s.lr * min((i + 1) / s.warmup_steps, s.after_warmup(i))


class _TopKOnFusae(_OnFusae):
    select = "topk"

    def __init__(self, settings: Settings, start: dict[str, Tensor]) -> None:
        # Without activation: the recipe's AuxK takes pre-activations below 0 as they are; ReLU of the rest in `step`.
        super().__init__(settings, start, select=self.select, activation="none", select_by_norm=True)

    def encode(self, x: Tensor) -> SparseCodes:
        return _relu(self.coder.encode(x))

    def step(self, x: Tensor) -> float:
        s, dead = self.settings, self.unused.mask()
        count = self.dead = int(dead.sum())
        if count == 0:
            codes, aux_codes = self.encode(x), None
        else:
            codes, aux_codes = self.coder.encode(x, dead, min(s.k_aux, count))
            codes = _relu(codes)
        loss, error = self.error(codes, x)
        if aux_codes is not None:
            aux_error = decode(aux_codes, self.coder.W_dec, sparse_grad=True) + error
            loss = loss + s.aux * min(count / s.k_aux, 1.0) * aux_error.square().sum(-1).mean()
        self.unused.update(codes)
        return self.update(loss)

    def error(self, codes: SparseCodes, x: Tensor) -> tuple[Tensor, Tensor]:
        """The squared error with a gradient, and what all latents leave ``[n, d]`` without."""
        error = self.decode(codes) - x
        return error.square().sum(-1).mean(), error.detach()


class _BatchTopKOnFusae(_TopKOnFusae):
    select = "batch_topk"


class _MatryoshkaOnFusae(_BatchTopKOnFusae):
    def error(self, codes: SparseCodes, x: Tensor) -> tuple[Tensor, Tensor]:
        c = self.coder
        found = decode_loss(codes, c.W_dec, c.b_dec, x, self.settings.prefixes, sparse_grad=True)
        return found.loss / len(x), -found.residual.detach()


class _JumpReLUOnFusae(_OnFusae):
    def __init__(self, settings: Settings, start: dict[str, Tensor]) -> None:
        super().__init__(settings, start, select="threshold")

    def objective(self) -> objectives.Objective:
        return objectives.JumpReLU("l0", self.settings.sparsity, self.settings.bandwidth)

    def step(self, x: Tensor) -> float:
        dead = self.unused.mask()
        self.dead = int(dead.sum())
        moment = objectives.Moment(dead, variance=1.0, ramp=self.settings.ramp(self.done), step=self.done)
        found = self.objective()(self.coder, x, x, moment)
        self.unused.update(found.codes)
        return self.update(found.loss)


class _JumpReLUTanhOnFusae(_JumpReLUOnFusae):
    def objective(self) -> objectives.Objective:
        s = self.settings
        return objectives.JumpReLU("tanh", s.sparsity, s.bandwidth, True, tanh_scale=4.0, preact_coefficient=s.aux)


def _relu(codes: SparseCodes) -> SparseCodes:
    return dataclasses.replace(codes, values=codes.values.relu())


def _start(settings: Settings, rows: Tensor, first: Tensor) -> dict[str, Tensor]:
    return tied(settings, 0.1 * rows, rows.new_zeros(settings.d))


def _mean_norm(x: Tensor) -> float:
    return x.shape[1] ** 0.5 / float(x.double().norm(dim=1).mean())


_COMMON = (
    INITIAL,
    "activations are scaled once, before training, instead of by the library's estimate from the first batches",
)
_DEAD = "dead after dead_steps batches instead of 1,000, on both sides"
_BATCH = "all are measured with the largest of each batch of 2,048 rows, not with their threshold"
_WARMUP = "the sparsity term rises over as many steps as the learning rate, on both sides"


def _recipe(aux: float, peer: Any, own: Any, *differences: str, **fields: Any) -> Recipe:
    return Recipe("sae-lens", aux, _mean_norm, _start, peer, {"fusae": own}, (*_COMMON, *differences), fields)


RECIPES = {
    "saelens-topk": _recipe(1.0, _TopK, _TopKOnFusae, _DEAD),
    "saelens-batch-topk": _recipe(1.0, _BatchTopK, _BatchTopKOnFusae, _DEAD, _BATCH),
    "saelens-matryoshka": _recipe(
        1.0, _Matryoshka, _MatryoshkaOnFusae, _DEAD, _BATCH, "nested dictionaries of 1/4, 1/2 and all of m"
    ),
    "saelens-jumprelu": _recipe(
        0.0, _JumpReLU, _JumpReLUOnFusae, _WARMUP, "penalty 'step'", sparsity=0.05, bandwidth=0.05, threshold=0.01
    ),
    "saelens-jumprelu-tanh": _recipe(
        3e-6, _JumpReLUTanh, _JumpReLUTanhOnFusae, _DEAD, _WARMUP,
        "Anthropic's penalty 'tanh' of scale 4, straight through to all parameters, with the pre-activation loss",
        sparsity=0.05, bandwidth=2.0, threshold=0.1,
    ),
}  # fmt: skip
