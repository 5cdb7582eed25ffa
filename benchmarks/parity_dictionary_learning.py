# SPDX-License-Identifier: Apache-2.0
"""Recipes of dictionary_learning (https://github.com/saprmarks/dictionary_learning)."""

from __future__ import annotations

import importlib
from typing import Any

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


class _Theirs(Dense):
    """A trainer of the library, and how its parameters are called."""

    name: str  # module and class
    names = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    transposed: tuple[str, ...] = ("W_enc",)  # kept as [d, m]
    dead = 0

    def __init__(self, settings: Settings, start: dict[str, Tensor]) -> None:
        s, (module, name) = settings, self.name.split(".")
        self.trainer = getattr(importlib.import_module(f"dictionary_learning.trainers.{module}"), name)(
            steps=s.steps, activation_dim=s.d, dict_size=s.m, layer=0, lm_name="none", lr=s.lr,
            warmup_steps=s.warmup_steps, decay_start=s.decay_start, device="cpu", **self.more(s),
        )  # fmt: skip
        self.trainer.dead_feature_threshold = s.dead_steps * s.batch_size
        self.module = self.trainer.ae.to(getattr(torch, s.dtype))
        parameters = dict(self.module.named_parameters())
        with torch.no_grad():
            for ours, theirs in self.names.items():
                parameters[theirs].copy_(start[ours].T if ours in self.transposed else start[ours])
            if s.threshold is not None:
                self.module.threshold.fill_(s.threshold)
        self.done = 0

    def more(self, s: Settings) -> dict[str, Any]:
        """What this trainer takes beside."""
        raise NotImplementedError

    def step(self, x: Tensor) -> float:
        self.done += 1
        return self.trainer.update(self.done - 1, x)  # step 0 of the top-k trainers sets b_dec

    @property
    def lr(self) -> float:
        return self.trainer.optimizer.param_groups[0]["lr"]

    @property
    def directions(self) -> Tensor:
        rows = dict(self.module.named_parameters())[self.names["W_dec"]].detach()
        return (rows.T if "W_dec" in self.transposed else rows).contiguous()


class _TopK(_Theirs):
    name = "top_k.TopKTrainer"
    names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "b_dec"}
    transposed = ("W_dec",)

    def more(self, s: Settings) -> dict[str, Any]:
        return {"k": s.k, "auxk_alpha": s.aux}

    @property
    def dead(self) -> int:
        return self.trainer.dead_features


class _BatchTopK(_TopK):
    name = "batch_top_k.BatchTopKTrainer"

    def encode(self, x: Tensor) -> SparseCodes:
        return SparseCodes.from_dense(self.module.encode(x, use_threshold=False))


class _Matryoshka(_BatchTopK):
    name, names, transposed = "matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer", _Theirs.names, _Theirs.transposed

    def more(self, s: Settings) -> dict[str, Any]:
        widths = [b - a for a, b in zip((0, *s.prefixes), s.prefixes, strict=False)]
        return {**super().more(s), "group_fractions": [width / s.m for width in widths]}


class _JumpReLU(_Theirs):
    name = "jumprelu.JumpReluTrainer"

    def more(self, s: Settings) -> dict[str, Any]:
        return {
            "bandwidth": s.bandwidth, "sparsity_penalty": s.sparsity, "sparsity_warmup_steps": s.warmup_steps,
            "target_l0": s.k,
        }  # fmt: skip


class _Standard(_Theirs):
    """The trainers that do not return their loss."""

    name = "standard.StandardTrainerAprilUpdate"
    names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "bias"}
    transposed = ("W_dec",)

    def more(self, s: Settings) -> dict[str, Any]:
        return {"l1_penalty": s.sparsity, "sparsity_warmup_steps": s.warmup_steps}

    def step(self, x: Tensor) -> float:
        with torch.no_grad():
            loss = float(self.trainer.loss(x, step=self.done))
        super().step(x)
        return loss


class _Gated(_Standard):
    name = "gdm.GatedSAETrainer"
    names = {"W_enc": "encoder.weight", "b_enc": "gate_bias", "W_dec": "decoder.weight", "b_dec": "decoder_bias"}


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


class _MatryoshkaOnFusae(_BatchTopKOnFusae):
    def objective(self, aux: float) -> objectives.Objective:
        prefixes = self.settings.prefixes
        # The library weighs every error by 1 / their number, and then takes the mean.
        return objectives.Matryoshka(prefixes, (len(prefixes) ** -2.0,) * len(prefixes), aux)


class _StepOfActive(torch.autograd.Function):
    """Mean L0 of codes as the library trains thresholds by it: its step is of what a JumpReLU has let through, so that
    the window has no lower half (its issue 55), but all zeros where it reaches down to them."""

    @staticmethod
    def forward(ctx, threshold, codes, bandwidth):
        used = codes.values[: int(codes.offsets[-1])], codes.indices[: int(codes.offsets[-1])].long()
        values, latents = (part[used[0] != 0] for part in used)
        ctx.n, ctx.bandwidth = len(codes), bandwidth
        ctx.save_for_backward(threshold, values, latents)
        return threshold.new_tensor(len(values) / len(codes))

    @staticmethod
    def backward(ctx, grad):
        threshold, values, latents = ctx.saved_tensors
        window = ((values - threshold[latents]).abs() < ctx.bandwidth / 2).to(threshold.dtype)
        count = torch.zeros_like(threshold).index_add_(0, latents, window)
        silent = ctx.n - torch.zeros_like(threshold).index_add_(0, latents, torch.ones_like(window))
        count += silent * (threshold.abs() < ctx.bandwidth / 2)
        return -grad * count / ctx.bandwidth / ctx.n, None, None


class _Sparsity(Own):
    """The recipes with a sparsity term."""

    @property
    def lr(self) -> float:
        return _lr(self.settings, self.done)

    def step(self, x: Tensor) -> float:
        moment = objectives.Moment(variance=1.0, ramp=self.settings.ramp(self.done), step=self.done)
        return self.update(self.loss(x, moment))


class _JumpReLUOnFusae(_Sparsity):
    def __init__(self, settings: Settings, start: dict[str, Tensor]) -> None:
        super().__init__(settings, start, unit_decoder=True, beta1=0.0, select="threshold", pre_bias=False)

    def loss(self, x: Tensor, moment: objectives.Moment) -> Tensor:
        s = self.settings
        found = objectives.JumpReLU("l0_mean_squared", 0.0, s.bandwidth)(self.coder, x, x, moment)
        l0 = _StepOfActive.apply(self.coder.threshold, found.codes, s.bandwidth)
        return found.loss + moment.ramp * s.sparsity * (l0 / s.k - 1).square()


class _StandardOnFusae(_Sparsity):
    def __init__(self, settings: Settings, start: dict[str, Tensor]) -> None:
        super().__init__(settings, start, unit_decoder=False, select="relu")

    def loss(self, x: Tensor, moment: objectives.Moment) -> Tensor:
        return objectives.ReLU(self.settings.sparsity)(self.coder, x, x, moment).loss


class _GatedOnFusae(_Sparsity):
    def __init__(self, settings: Settings, start: dict[str, Tensor]) -> None:
        super().__init__(settings, start, unit_decoder=True, clip=False, beta1=0.0, select="relu", gated=True)

    def loss(self, x: Tensor, moment: objectives.Moment) -> Tensor:
        return objectives.Gated(self.settings.sparsity)(self.coder, x, x, moment).loss


class _TopKOnTrainer:
    """`fusae.train.Trainer`, as near to the recipe as its configuration comes, from weights made outside."""

    form = "topk"

    def __init__(self, settings: Settings, start: dict[str, Tensor]) -> None:
        s = settings
        config = TrainConfig(
            form=self.form, m=s.m, k=s.k, d=s.d, batch_size=s.batch_size, tokens=s.steps * s.batch_size, lr=s.lr,
            warmup_steps=s.warmup_steps, warmup_from_zero=True, decay=1 - s.decay_start / s.steps, clip_norm=1.0,
            k_aux=s.k_aux, aux_coefficient=s.aux, dead_window=s.dead_steps * s.batch_size, normalise_loss=False,
            scale_input=False, b_dec_init="zero", dtype=s.dtype, device="cpu",
        )  # fmt: skip
        some_rows = torch.randn(s.batch_size, s.d, dtype=start["W_dec"].dtype)  # batches come from outside
        self.trainer = Trainer(config, some_rows, show=False)
        with_weights(self.trainer.coder, start)

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


def _start_at_zero(settings: Settings, rows: Tensor, first: Tensor) -> dict[str, Tensor]:
    return tied(settings, rows, rows.new_zeros(settings.d))


_UNIT = "the library divides by norm + 1e-6 to project and by norm + eps to renormalise, fusae by the norm"
_TOP_K = (
    INITIAL + "; b_dec from the library's geometric median of the first batch",
    "dead after dead_steps batches instead of 10,000,000 tokens, on both sides",
    _UNIT,
)
_TRAINER = (
    "fusae Trainer only: latents are dead by the batches before this one, fired means value > 0, and a latent that is "
    "dead can be in both selections; initial weights are set from outside"
)
_BATCH = "all are measured with the largest of each batch of 2,048 rows, not with their threshold"
_WARMUP = "the sparsity term rises over as many steps as the learning rate, on both sides"


def _unit_mean_square(x: Tensor) -> float:
    return float(x.double().square().sum(1).mean() ** -0.5)


def _recipe(
    aux: float, start: Any, peer: Any, own: Any, *differences: str, trainer: Any = None, **fields: Any
) -> Recipe:
    contenders = {"fusae": own} | ({} if trainer is None else {"fusae Trainer": trainer})
    return Recipe("dictionary-learning", aux, _unit_mean_square, start, peer, contenders, differences, fields)


RECIPES = {
    "dictionary_learning-topk": _recipe(
        1 / 32, _start, _TopK, _TopKOnFusae,
        *_TOP_K, _TRAINER,
        "rows with fewer than k positive pre-activations: the library fills up with latents of its top-k's choice "
        "among the zeros and counts them as fired; fusae fills up with the largest pre-activations",
        "the library's threshold (for inference without top-k) is not used on either side",
        trainer=_TopKOnTrainer,
    ),
    "dictionary_learning-batch-topk": _recipe(
        1 / 32, _start, _BatchTopK, _BatchTopKOnFusae, *_TOP_K, _TRAINER, _BATCH, trainer=_BatchTopKOnTrainer
    ),
    "dictionary_learning-matryoshka": _recipe(
        1 / 32, _start, _Matryoshka, _MatryoshkaOnFusae, *_TOP_K, _BATCH, "nested dictionaries of 1/4, 1/2 and all of m"
    ),
    "dictionary_learning-jumprelu": _recipe(
        0.0, _start_at_zero, _JumpReLU, _JumpReLUOnFusae,
        INITIAL, _UNIT, _WARMUP,
        "thresholds from 0.1 and a window of 0.1, on both sides (0.001 each in the library, for longer runs)",
        "thresholds below 0 are brought back to 0 by fusae, not by the library",
        "the library's L0 term trains thresholds by active latents alone (its issue 55): done so on both sides",
        sparsity=1.0, bandwidth=0.1, threshold=0.1,
    ),
    "dictionary_learning-relu": _recipe(
        0.0, _start_at_zero, _Standard, _StandardOnFusae, INITIAL, _WARMUP, sparsity=0.1
    ),
    "dictionary_learning-gated": _recipe(
        0.0, _start_at_zero, _Gated, _GatedOnFusae, INITIAL, _WARMUP, sparsity=0.1
    ),
}  # fmt: skip
