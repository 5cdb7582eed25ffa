# SPDX-License-Identifier: Apache-2.0
"""The training losses of cross-layer transcoders: those of a coder, over all layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ...codes import SparseCodes
from ...ops import decode
from ..join import add_up, join_codes
from ..sums import total
from .base import CoderLoss, Moment, aux_loss, decode_together, variance_of, wants
from .jumprelu import JumpReLU
from .relu import ReLU
from .topk import BatchTopK, TopK

if TYPE_CHECKING:
    from ..coder import SparseCoder
    from ..cross_layer import CrossLayerTranscoder

_SELECTS = {TopK: ("topk",), BatchTopK: ("batch_topk",), ReLU: ("relu",), JumpReLU: ("threshold",)}


class _Layer(NamedTuple):
    """What the latents of one layer write ``[n, (L-s)·d_out]``, those of the AuxK selection, and what they cost."""

    codes: SparseCodes
    output: Tensor
    aux: Tensor | None
    charge: Tensor | float
    terms: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class CrossLayer:
    """The loss of `TopK`, `BatchTopK`, `ReLU` or `JumpReLU` for a `fusae.nn.CrossLayerTranscoder`: sums over layers.

    The squared error of every target layer is divided by the variance of that layer and the quotients are summed (not
    meaned), so that L is the error of the mean targets; so are the AuxK terms of the targets, where each one's residual
    is rebuilt by the dead latents of all layers up to it. Penalties are summed over the layers of the latents, each
    with the layer's own L0; the decoder norm of a latent is the sum of its norms at all targets. Reference: Ameisen et
    al. 2025, "Circuit Tracing", who train a JumpReLU with the penalty 'tanh' (there the norm of the whole row).

    Attributes:
        form: `TopK` without Multi-TopK, `BatchTopK`, `ReLU`, or `JumpReLU` without prefixes; with the penalty 'tanh'
            its `sparsity` and `tanh_scale` must be given, as ``JumpReLU.anthropic(d_out)`` does.

    Called with `x` ``[n, L, d]`` or ``[n, L·d]``, `target` likewise of width d_out (None: `x`), and a `Moment` whose
    `dead` is ``[L·m]`` and whose `variance` is one for every target layer (a sequence or ``[L]``), or one for all. The
    `codes` of its `CoderLoss` are over all L·m latents, `reconstruction` is ``[n, L·d_out]``, `sse` is over all
    targets, undivided; `terms` has the divided error of every target layer as ``mse_layer_0`` and so on.

    Equivalent to, with ``f[s]`` ``[n, m]`` the dense codes of layer s and ``W_dec[s]`` ``[m, L - s, d_out]``::

        y_hat = [sum(f[s] @ W_dec[s][:, t - s] for s in range(t + 1)) + b_dec[t] for t in range(L)]
        mse = sum((y[:, t] - y_hat[t]).square().sum(-1).mean() / variance[t] for t in range(L))
        loss = mse + sum(penalty(f[s]) for s in range(L))
    """

    form: TopK | BatchTopK | ReLU | JumpReLU = TopK()

    def __post_init__(self) -> None:
        form = self.form
        if type(form) not in _SELECTS:
            wanted = ", ".join(kind.__name__ for kind in _SELECTS)
            raise TypeError(f"form must be an objective of {wanted}, got {type(form).__name__}")
        if getattr(form, "multi_topk", 0) or getattr(form, "prefixes", None):
            raise ValueError(f"form must be without multi_topk and prefixes over several layers, got {form}")
        if isinstance(form, JumpReLU) and form.penalty == "tanh" and None in (form.sparsity, form.tanh_scale):
            raise ValueError("form must have sparsity and tanh_scale with penalty 'tanh', as JumpReLU.anthropic(d_out)")

    def __call__(self, coder: CrossLayerTranscoder, x: Tensor, target: Tensor | None, moment: Moment) -> CoderLoss:
        for source in coder.sources:
            wants(source, self.form, _SELECTS[type(self.form)])
        config = coder.config
        x, target = _rows(coder, x, target)
        bias = coder.b_dec.reshape(-1)
        if isinstance(self.form, (ReLU, JumpReLU)):
            layers = [
                self._penalised(source, x[:, s], dataclasses.replace(moment, dead=dead), bias if s == 0 else None)
                for s, (source, dead) in enumerate(zip(coder.sources, coder.by_layer(moment.dead), strict=True))
            ]
        else:
            found = coder.select(x, moment.dead, moment.k_aux)
            layers = [
                self._selected(source, *selected, moment, bias if s == 0 else None)
                for s, (source, selected) in enumerate(zip(coder.sources, found, strict=True))
            ]
        y = coder.add_skip(add_up([layer.output for layer in layers]), x)
        error = y - target.to(y.dtype)
        variances = _variances(target, moment.variance, config.layers)
        errors = error.split(config.target_width, 1)
        sse = [total(part.square()) for part in errors]
        mse = [part / len(x) / variance for part, variance in zip(sse, variances, strict=True)]
        whole = torch.stack(mse).sum()
        loss, aux = whole, None
        if layers[0].aux is not None:
            rebuilt = add_up([layer.aux for layer in layers]).split(config.target_width, 1)
            aux = torch.stack([
                aux_loss(part.detach(), again, moment.dead[: (t + 1) * config.m])
                for t, (part, again) in enumerate(zip(errors, rebuilt, strict=True))
            ]).sum()  # fmt: skip
            loss = loss + self.form.aux_coefficient * aux
        for layer in layers:
            loss = loss + layer.charge
        terms = {name: torch.stack([layer.terms[name] for layer in layers]).sum() for name in layers[0].terms}
        terms |= {f"mse_layer_{t}": value.detach() for t, value in enumerate(mse)}
        return CoderLoss(
            loss,
            whole.detach(),
            None if aux is None else aux.detach(),
            torch.stack(sse).sum().detach(),
            join_codes([layer.codes.detach() for layer in layers]),
            y.detach().to(x.dtype),
            terms,
        )

    def _penalised(self, source: SparseCoder, x: Tensor, moment: Moment, bias: Tensor | None) -> _Layer:
        codes, charge, terms = self.form.choose(source, x, moment)
        return _Layer(codes, _decode(source, codes, bias), None, charge, terms)

    def _selected(
        self,
        source: SparseCoder,
        codes: SparseCodes,
        smallest: Tensor | None,
        aux: SparseCodes | None,
        moment: Moment,
        bias: Tensor | None,
    ) -> _Layer:
        if smallest is not None:
            source.update_threshold_(smallest, self.form.threshold_decay, moment.step)
        if aux is None:
            return _Layer(codes, _decode(source, codes, bias), None, 0.0, {})
        aux_output, output = decode_together(source, [aux, codes])
        return _Layer(codes, output if bias is None else output + bias, aux_output, 0.0, {})


def _decode(source: SparseCoder, codes: SparseCodes, bias: Tensor | None) -> Tensor:
    return decode(codes, source.W_dec, bias, sparse_grad=source.sparse_grad)


def _rows(coder: CrossLayerTranscoder, x: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
    """`x` ``[n, L, d]`` and `target` ``[n, L·d_out]``, checked."""
    config = coder.config
    x = coder.layered(x).reshape(-1, config.layers, config.d)
    if x.shape[0] == 0:
        raise ValueError(f"x must have at least one row, got shape {list(x.shape)}")
    if target is None:
        if config.output_width != config.input_width:
            raise ValueError(f"target must be given: the coder turns width {config.d} into another")
        target = x
    if target.numel() != len(x) * config.output_width or target.shape[-1] not in (
        config.output_width,
        config.target_width,
    ):
        wanted = f"[n, {config.layers}, {config.target_width}] or [n, {config.output_width}], one row for each of x"
        raise ValueError(f"target must have shape {wanted}, got {list(target.shape)}")
    return x, target.reshape(len(x), config.output_width)


def _variances(target: Tensor, given: Tensor | float | Sequence[float] | None, layers: int) -> Sequence[Tensor | float]:
    """One for each layer of `target` ``[n, L·d_out]``."""
    if given is None or isinstance(given, (int, float)) or (isinstance(given, Tensor) and given.ndim == 0):
        given = [given] * layers
    if len(given) != layers:
        raise ValueError(f"variance must be one for each of {layers} layers, or one for all, got {len(given)}")
    parts = target.split(target.shape[1] // layers, 1)
    return [variance_of(part, value) for part, value in zip(parts, given, strict=True)]
