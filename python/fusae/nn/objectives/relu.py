# SPDX-License-Identifier: Apache-2.0
"""Training losses of ReLU coders whose sparsity is bought with an L1 penalty: plain ones and gated ones."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from ... import _checks, _fields
from ...codes import SparseCodes
from ...ops import decode_loss, encode_threshold
from ..sums import take, total
from .base import Chosen, CoderLoss, Moment, fit, row_norms, rows, variance_of, wants

if TYPE_CHECKING:
    from ..coder import SparseCoder


@dataclasses.dataclass(frozen=True)
class ReLU:
    """Normalised squared error, plus the L1 norm of the codes weighted with the decoder norms.

    Anthropic, April 2024 update: ``λ Σ_i f_i ||d_i||``, the gradient of which reaches the norms, so that decoder rows
    need no constraint. With ``by_norm=False`` the older ``λ Σ_i f_i`` for decoder rows of unit norm (Bricken et al.
    2023). For a crosscoder (``sites``) the norm is the sum of the sites' norms (Lindsey et al. 2024).

    Attributes:
        sparsity: λ, for rows of unit mean squared norm. dictionary_learning's suites sweep 0.012 to 0.06; Anthropic's 5
            for rows of mean norm √d is 5 / √d here.
        by_norm: weight with the decoder norms.

    ``moment.ramp`` scales λ. For select 'relu'.

    Equivalent to::

        f = torch.relu((x - b_dec) @ W_enc.T + b_enc)
        mse = (y - f @ W_dec - b_dec).square().sum(-1).mean() / variance
        loss = mse + ramp * sparsity * (f * W_dec.norm(dim=1)).sum(-1).mean()
    """

    sparsity: float = 0.04
    by_norm: bool = True

    def __post_init__(self) -> None:
        _fields.number("sparsity", self.sparsity)
        _fields.flag("by_norm", self.by_norm)

    def __call__(self, coder: SparseCoder, x: Tensor, target: Tensor | None, moment: Moment) -> CoderLoss:
        wants(coder, self, ("relu",))
        x, target = rows(coder, x, target)
        codes, charge, terms = self.choose(coder, x, moment)
        found = fit(coder, codes, x, target, variance_of(target, moment.variance))
        return CoderLoss(
            found.loss + charge, found.mse[-1], None, found.sse, codes.detach(), found.reconstruction, terms
        )

    def choose(self, coder: SparseCoder, x: Tensor, moment: Moment) -> Chosen:
        """The codes of the rows `x` ``[n, d]`` and their L1 term."""
        if coder.config.gated:
            raise ValueError("objective ReLU needs a coder that is not gated; use objective Gated")
        codes = coder.encode(x)
        l1 = l1_norm(codes, row_norms(coder, codes.indices) if self.by_norm else None)
        return Chosen(codes, moment.ramp * self.sparsity * l1, {"sparsity": l1.detach()})


@dataclasses.dataclass(frozen=True)
class Gated:
    """Separate gates and magnitudes, of which the gates alone are penalised (Rajamanoharan et al. 2024,
    arXiv:2404.16014).

    Squared error of the codes, plus the L1 norm of the gates' pre-activations, plus the squared error of a
    reconstruction from these through the decoder as it stands (`W_dec`, `b_dec` and `W_skip` detached). Decoder rows
    are meant to be of unit norm.

    Attributes:
        sparsity: λ, for rows of unit mean squared norm. dictionary_learning's suites sweep 0.012 to 0.08.

    ``moment.ramp`` scales λ. For select 'relu' with ``gated``.

    Equivalent to::

        gate = (x - b_dec) @ W_enc.T + b_enc
        f = (gate > 0) * torch.relu(r_mag.exp() * (gate - b_enc) + b_mag)
        mse = (y - f @ W_dec - b_dec).square().sum(-1).mean() / variance
        gate_mse = (y - gate.relu() @ W_dec.detach() - b_dec.detach()).square().sum(-1).mean() / variance
        loss = mse + gate_mse + ramp * sparsity * gate.relu().sum(-1).mean()
    """

    sparsity: float = 0.04

    def __post_init__(self) -> None:
        _fields.number("sparsity", self.sparsity)

    def __call__(self, coder: SparseCoder, x: Tensor, target: Tensor | None, moment: Moment) -> CoderLoss:
        wants(coder, self, ("relu",))
        if not coder.config.gated:
            raise ValueError("objective Gated needs a coder that is gated; use objective ReLU")
        x, target = rows(coder, x, target)
        inputs, bias = coder.encoder_input(x)
        gates = encode_threshold(inputs, coder.W_enc, bias, 0.0, sparse_grad=coder.sparse_grad)
        codes = coder.magnitudes(gates)
        variance = variance_of(target, moment.variance)
        found = fit(coder, codes, x, target, variance)
        frozen = target - F.linear(x, coder.W_skip.detach()) if coder.config.skip else target
        gate_sse = decode_loss(gates, coder.W_dec.detach(), coder.b_dec.detach(), frozen).loss
        gate_mse = gate_sse / len(x) / variance
        l1 = l1_norm(gates)
        loss = found.loss + gate_mse + moment.ramp * self.sparsity * l1
        terms = {"sparsity": l1.detach(), "gate_mse": gate_mse.detach()}
        return CoderLoss(loss, found.mse[-1], None, found.sse, codes.detach(), found.reconstruction, terms)


def l1_norm(codes: SparseCodes, norms: Tensor | None = None) -> Tensor:
    """``Σ_i f_i norms[i]`` of ragged codes with values >= 0, mean over rows; `norms` ``[m]``, None: all 1."""
    values = codes.values.to(_checks.accumulator(codes.dtype))
    if norms is not None:
        values = values * take(norms, codes.indices)
    return total(values[:, None]) / len(codes)
