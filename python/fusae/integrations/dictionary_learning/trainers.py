# SPDX-License-Identifier: Apache-2.0
"""Trainers of dictionary_learning's TopK kinds: loss and update without dense activations, in few passes over weights.

The losses, what they log and the state they keep are the tool's. A trainer whose dictionary was not accelerated runs
the tool's own code.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gated_anneal import GatedAnnealTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.p_anneal import PAnnealTrainer
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import TopKTrainer, geometric_median
from torch import Tensor

from ...codes import SparseCodes
from ...ops import decode, decode_loss, encode_topk
from .._dense import dense_of
from .._optim import clip_grad_norm_, fused_adam
from .._rows import normalise_, remove_parallel_
from .._swap import Adapter, Swapped
from .dictionaries import FastBatchTopK, FastDictionary, FastMatryoshka, FastTopK


class FastTrainer(Swapped):
    """What the accelerated trainers share. A kind adds `_fusae_select` and, for nested losses, `_fusae_errors`."""

    _fusae_dictionary: type[FastDictionary]

    def _fusae_select(self, x: Tensor) -> SparseCodes | None:
        raise NotImplementedError

    def _fusae_ready(self, x: Tensor) -> bool:
        return isinstance(self.ae, self._fusae_dictionary) and x.ndim == 2

    def _fusae_threshold(self, codes: SparseCodes) -> None:
        self.update_threshold(codes.values)

    def _fusae_fired(self, codes: SparseCodes) -> Tensor:
        """``[m]`` bool: what the tool takes for latents that fired."""
        sums = torch.zeros(codes.m, dtype=torch.float32, device=codes.device)
        return sums.index_add_(0, codes.indices, codes.values.detach().float()) > 0

    def _fusae_errors(self, x: Tensor, codes: SparseCodes) -> tuple[Tensor, Tensor, dict[str, float]]:
        """(reconstruction, its loss, what else is logged of it)."""
        x_hat = self.ae._fusae_decode(codes, x.shape[:1])
        return x_hat, (x - x_hat).pow(2).sum(dim=-1).mean(), {}

    def _fusae_auxiliary(self, x: Tensor, residual: Tensor) -> Tensor:
        """The tool's `get_auxiliary_loss`, with an encoder of the dead latents alone for their pre-activations."""
        dead = self.num_tokens_since_fired >= self.dead_feature_threshold
        self.dead_features = int(dead.sum())
        self.pre_norm_auxk_loss = -1
        if not self.dead_features:
            return torch.tensor(0, dtype=residual.dtype, device=residual.device)
        weights = self.ae._fusae_weights()
        rows = dead.nonzero().flatten()
        k_aux = min(self.top_k_aux, self.dead_features)
        centred = self.ae._fusae_centred(x, weights)
        b_enc = None if weights.b_enc is None else weights.b_enc[rows]
        codes = encode_topk(centred, weights.W_enc[rows], b_enc, k_aux)
        codes = SparseCodes(codes.values, rows.int()[codes.indices.long()], dead.shape[0])
        error = (residual.float() - decode(codes, weights.W_dec).float()).pow(2).sum(dim=-1).mean()
        self.pre_norm_auxk_loss = error
        variance = (residual.float() - residual.mean(dim=0).float()).pow(2).sum(dim=-1).mean()
        return (error / variance).nan_to_num(0.0)

    def loss(self, x: Tensor, step: int | None = None, logging: bool = False) -> Any:
        codes = self._fusae_select(x) if self._fusae_ready(x) else None
        if codes is None:
            return super().loss(x, step=step, logging=logging)
        if step > self.threshold_start_step:
            self._fusae_threshold(codes)
        x_hat, l2_loss, more = self._fusae_errors(x, codes)
        self.effective_l0 = self.k
        self.num_tokens_since_fired += x.size(0)
        self.num_tokens_since_fired[self._fusae_fired(codes)] = 0
        auxk_loss = torch.zeros((), dtype=x.dtype, device=x.device)
        if self.auxk_alpha > 0 or not isinstance(self, TopKTrainer):
            auxk_loss = self._fusae_auxiliary(x, (x - x_hat).detach())
        loss = l2_loss + self.auxk_alpha * auxk_loss
        if not logging:
            return loss
        losses = {"l2_loss": l2_loss.item(), "auxk_loss": auxk_loss.item(), "loss": loss.item(), **more}
        return namedtuple("LossLog", ["x", "x_hat", "f", "losses"])(x, x_hat, dense_of(codes, x.shape[:1]), losses)

    def update(self, step: int, x: Tensor) -> Any:
        if not self._fusae_ready(x):
            return super().update(step, x)
        if step == 0:
            median = geometric_median(x) if isinstance(self, TopKTrainer) else self.geometric_median(x)
            self.ae.b_dec.data = median.to(self.ae.b_dec.dtype)
        loss = self.loss(x.to(self.device), step=step)
        loss.backward()
        W_dec, grad = self._fusae_decoder()
        remove_parallel_(grad, W_dec, eps=1e-6)
        clip_grad_norm_(list(self.ae.parameters()), 1.0)
        with fused_adam(self.optimizer):
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        normalise_(self._fusae_decoder()[0], torch.finfo(W_dec.dtype).eps)
        return loss.item()

    def _fusae_decoder(self) -> tuple[Tensor, Tensor | None]:
        """Decoder rows ``[m, d]`` and their gradient, as views."""
        weight = self.ae.decoder.weight
        return weight.data.T, None if weight.grad is None else weight.grad.T


class FastTopKTrainer(FastTrainer):
    _fusae_dictionary = FastTopK

    def _fusae_select(self, x: Tensor) -> SparseCodes | None:
        return self.ae._fusae_codes(x)

    def _fusae_fired(self, codes: SparseCodes) -> Tensor:
        fired = torch.zeros(codes.m, dtype=torch.bool, device=codes.device)
        fired[codes.indices.flatten().long()] = True
        return fired


class FastBatchTopKTrainer(FastTrainer):
    _fusae_dictionary = FastBatchTopK

    def _fusae_select(self, x: Tensor) -> SparseCodes | None:
        return self.ae._fusae_batch(x)


class FastMatryoshkaTrainer(FastBatchTopKTrainer):
    _fusae_dictionary = FastMatryoshka

    def _fusae_decoder(self) -> tuple[Tensor, Tensor | None]:
        return self.ae.W_dec.data, self.ae.W_dec.grad

    def _fusae_errors(self, x: Tensor, codes: SparseCodes) -> tuple[Tensor, Tensor, dict[str, float]]:
        ae, groups, n = self.ae, self.ae.active_groups, max(1, x.shape[0])
        prefixes = [int(end) for end in ae.group_indices[1 : groups + 1]]
        prefixes[-1] = codes.m  # the codes hold nothing of later groups
        factors = [float(w) / n for w in self.group_weights[:groups]]
        out = decode_loss(codes, ae.W_dec, ae.b_dec, x, prefixes, [f / groups for f in factors])
        each = [f * float(s) for f, s in zip(factors, out.sse, strict=True)]
        return x - out.residual, out.loss, {"min_l2_loss": min(each), "max_l2_loss": max(each)}


def _dense_loss(_: Any) -> str:
    return "its loss is of dense activations; its dictionary can run on fusae"


METHODS = ("loss", "get_auxiliary_loss", "update")
ADAPTERS: tuple[Adapter, ...] = (
    Adapter(TopKTrainer, FastTopKTrainer, METHODS),
    Adapter(BatchTopKTrainer, FastBatchTopKTrainer, METHODS),
    Adapter(MatryoshkaBatchTopKTrainer, FastMatryoshkaTrainer, METHODS),
    *(
        Adapter(tool, Swapped, (), _dense_loss)
        for tool in (
            StandardTrainer,
            StandardTrainerAprilUpdate,
            GatedSAETrainer,
            GatedAnnealTrainer,
            PAnnealTrainer,
            JumpReluTrainer,
        )
    ),
)
