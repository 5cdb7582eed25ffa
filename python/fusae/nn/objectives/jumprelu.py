# SPDX-License-Identifier: Apache-2.0
"""The training loss of JumpReLU coders: a threshold per latent is trained."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _fields
from ...codes import SparseCodes
from ...ops import decode, encode_threshold
from ..sums import take, total
from .base import Chosen, CoderLoss, Moment, fit, row_norms, rows, variance_of, wants
from .nested import check_prefixes, nested_terms

if TYPE_CHECKING:
    from ..coder import SparseCoder

PENALTIES = ("l0", "l0_squared", "l0_mean_squared", "tanh")


@dataclasses.dataclass(frozen=True)
class JumpReLU:
    """Normalised squared error, plus a penalty of how many latents are active; thresholds are trained directly.

    With pre-activations p and thresholds θ, ``f_i = p_i`` where ``p_i > θ_i``. The step counts as a ramp of width
    `bandwidth` in the backward pass: see `fusae.encode_threshold`. For select 'threshold' (not by norm);
    ``coder.clamp_()`` belongs after every step of the optimiser.

    Attributes:
        penalty: with L0 the number of active latents of a row, and k the coder's ``config.k``:
            'l0': ``λ L0`` (Rajamanoharan et al. 2024, arXiv:2407.14435; Gemma Scope);
            'l0_squared': ``λ (2 / k) (L0 - k)²`` of every row (Gemma Scope 2);
            'l0_mean_squared': ``λ (mean L0 / k - 1)²`` of the batch (dictionary_learning, SAEBench);
            'tanh': ``λ Σ_i tanh(c f_i ||d_i||)``, the gradient of which reaches the decoder norms (Anthropic, January
            2025 update).
        sparsity: λ, for rows of unit mean squared norm. None: 1e-3 for 'l0' and 'l0_squared' (a starting point: the
            papers sweep it), 1 for 'l0_mean_squared' (dictionary_learning), 10 / d for 'tanh' (Anthropic's 10).
        bandwidth: of the window, in units of pre-activations; 0.001 is DeepMind's for rows of unit mean
            squared norm (`anthropic` has 2 / √d).
        straight_through: let the window's gradient reach encoder and input too (Anthropic), not the thresholds alone.
        tanh_scale: c. None: 4 √d (Anthropic's 4).
        preact_coefficient: λ_P of ``λ_P Σ_i ReLU(θ_i - p_i) ||d_i||`` over dead latents, which draws them back
            (Anthropic; over the dead alone as in SAELens). Its gradient does not depend on the window.
        prefixes, weights: nested dictionaries, as in `Matryoshka` (Gemma Scope 2); None: the whole alone.

    ``moment.ramp`` scales λ. Anthropic's numbers are for rows of mean norm √d; `anthropic` turns them to rows of unit
    mean squared norm. Initial thresholds: `fusae.nn.init_thresholds_`, 0.001 (Gemma Scope) or 0.1 / √d (Anthropic).

    Equivalent to, with ``step`` of the window as its derivative::

        p = (x - b_dec) @ W_enc.T + b_enc
        f, l0 = p * step(p - threshold), step(p - threshold).sum(-1)
        mse = (y - f @ W_dec - b_dec).square().sum(-1).mean() / variance
        preact = (torch.relu(threshold - p) * W_dec.norm(dim=1))[:, dead].sum(-1).mean()
        loss = mse + ramp * sparsity * l0.mean() + preact_coefficient * preact
    """

    penalty: str = "l0"
    sparsity: float | None = None
    bandwidth: float = 0.001
    straight_through: bool = False
    tanh_scale: float | None = None
    preact_coefficient: float = 0.0
    prefixes: tuple[int, ...] | None = None
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _fields.choice("penalty", self.penalty, PENALTIES)
        if self.sparsity is not None:
            _fields.number("sparsity", self.sparsity)
        _fields.number("bandwidth", self.bandwidth, above=True)
        _fields.flag("straight_through", self.straight_through)
        if self.tanh_scale is not None:
            _fields.number("tanh_scale", self.tanh_scale, above=True)
        _fields.number("preact_coefficient", self.preact_coefficient)
        if self.prefixes is not None:
            check_prefixes(self)
        elif self.weights is not None:
            raise ValueError(f"weights are of prefixes, which were not given, got {self.weights!r}")

    @classmethod
    def anthropic(cls, d: int) -> JumpReLU:
        """The January 2025 recipe for rows of width `d` and of unit mean squared norm.

        Published for mean norm √d: λ 10 (rising over the whole run), c 4, bandwidth 2, λ_P 3e-6, thresholds from 0.1.
        """
        root = _fields.whole("d", d, 1) ** 0.5
        return cls("tanh", 10 / d, 2 / root, True, 4 * root, 3e-6 / root)

    def __call__(self, coder: SparseCoder, x: Tensor, target: Tensor | None, moment: Moment) -> CoderLoss:
        wants(coder, self, ("threshold",))
        x, target = rows(coder, x, target)
        codes, charge, terms = self.choose(coder, x, moment)
        found = fit(coder, codes, x, target, variance_of(target, moment.variance), self.prefixes, self.weights)
        if self.prefixes:
            terms |= nested_terms(self.prefixes, found.mse)
        return CoderLoss(
            found.loss + charge, found.mse[-1], None, found.sse, codes.detach(), found.reconstruction, terms
        )

    def choose(self, coder: SparseCoder, x: Tensor, moment: Moment) -> Chosen:
        """The codes of the rows `x` ``[n, d]``, with those in the window below a threshold, and their penalties."""
        if coder.config.select_by_norm:
            raise ValueError("objective JumpReLU needs a coder without select_by_norm; call coder.fold_norms_() first")
        inputs, bias = coder.encoder_input(x)
        codes, l0 = encode_threshold(
            inputs, coder.W_enc, bias, coder.threshold, bandwidth=self.bandwidth,
            straight_through=self.straight_through, sparse_grad=coder.sparse_grad,
        )  # fmt: skip
        revive = self.preact_coefficient > 0 and moment.dead is not None
        norms = None
        if revive or self.penalty == "tanh":
            touched = [codes.indices] if self.penalty == "tanh" else []
            if revive and coder.sparse_grad:
                touched.append(moment.dead.nonzero()[:, 0])
            norms = row_norms(coder, torch.cat(touched) if touched else moment.dead)
        sparsity = self._penalty(coder, codes, l0, norms)
        charge, terms = moment.ramp * self._sparsity(coder) * sparsity, {"sparsity": sparsity.detach()}
        if revive:
            preact = preact_loss(coder, inputs, bias, codes, moment.dead, norms)
            charge, terms["preact"] = charge + self.preact_coefficient * preact, preact.detach()
        return Chosen(codes, charge, terms)

    def _sparsity(self, coder: SparseCoder) -> float:
        if self.sparsity is not None:
            return self.sparsity
        return {"l0_mean_squared": 1.0, "tanh": 10 / coder.config.output_width}.get(self.penalty, 1e-3)

    def _penalty(self, coder: SparseCoder, codes: SparseCodes, l0: Tensor, norms: Tensor | None) -> Tensor:
        """Mean over rows, before λ."""
        k = coder.config.k
        if self.penalty == "l0":
            return total(l0[:, None]) / len(codes)
        if self.penalty == "l0_squared":
            return total((l0 - k).square()[:, None]) * (2 / k) / len(codes)
        if self.penalty == "l0_mean_squared":
            return (total(l0[:, None]) / len(codes) / k - 1).square()
        scale = 4 * coder.config.output_width**0.5 if self.tanh_scale is None else self.tanh_scale
        lengths = codes.values.to(norms.dtype) * take(norms, codes.indices)
        return total(torch.tanh(scale * lengths)[:, None]) / len(codes)


def preact_loss(
    coder: SparseCoder, inputs: Tensor, bias: Tensor, codes: SparseCodes, dead: Tensor, norms: Tensor
) -> Tensor:
    """``Σ_i ReLU(θ_i - p_i) ||d_i||`` over the latents that are `dead`, mean over rows; no ``[n, dead]``.

    ``ReLU(θ - p) = (θ - p) + ReLU(p - θ)``. The first term is linear in the input, so that its mean over the rows takes
    the mean input; the second one is of latents that fire in this batch after all, which are among the codes.
    """
    acc, n = norms.dtype, len(codes)
    weight = torch.where(dead, norms, 0.0)
    mean = inputs.mean(0, dtype=acc).to(inputs.dtype)
    if coder.sparse_grad:
        latents = dead.nonzero()[:, 0]
        pre = F.linear(F.embedding(latents, coder.W_enc, sparse=True), mean).to(acc) + bias[latents]
        silent = (weight[latents] * (coder.threshold[latents] - pre)).sum()
    else:
        pre = F.linear(coder.W_enc, mean).to(acc) + bias
        # Masked before the product: 0 · Inf of a live latent would be NaN.
        silent = (weight * (coder.threshold - pre.masked_fill(~dead, 0.0))).sum()
    # Σ_e a_e p_e of the entries in use, with p_e = <W_enc[i_e], x_e> + b: the rows of Σ_e a_e W_enc[i_e] times x.
    share = torch.where(codes.values != 0, take(weight, codes.indices), 0.0)
    fired = SparseCodes(share.to(codes.dtype), codes.indices, codes.m, codes.offsets)
    pull = decode(fired, coder.W_enc, sparse_grad=coder.sparse_grad)
    over = total(pull.to(acc) * inputs.to(acc)) + total((share * take(bias - coder.threshold, codes.indices))[:, None])
    return silent + over / n
