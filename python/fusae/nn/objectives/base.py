# SPDX-License-Identifier: Apache-2.0
"""What every training loss takes and gives, and the parts that several of them share."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ... import _checks, _fields
from ...codes import SparseCodes
from ...ops import decode
from ..sums import total

if TYPE_CHECKING:
    from ..coder import SparseCoder


@dataclasses.dataclass(frozen=True, eq=False)
class CoderLoss:
    """The loss of a batch and what the trainer counts. All on the device of the input; nothing has been read back.

    Attributes:
        loss: scalar to minimise.
        mse: reconstruction error, summed over d, mean over rows, divided by the variance of the data. Detached.
        aux: AuxK term before its coefficient (detached), or None where no dead latents were given.
        sse: ``Σ ||y - ŷ||²`` over the batch (detached): the numerator of the FVU.
        codes: the main codes, detached; what has a value other than 0 has fired.
        reconstruction: ``[n, d_out]``, detached.
        terms: further terms of the loss by name, before their coefficients, detached scalars.
    """

    loss: Tensor
    mse: Tensor
    aux: Tensor | None
    sse: Tensor
    codes: SparseCodes
    reconstruction: Tensor
    terms: dict[str, Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Moment:
    """Where a run stands, as far as a loss asks for it.

    Attributes:
        dead: bool ``[m]``, the latents that have not fired for long; None: nothing can be dead yet.
        k_aux: latents in the AuxK selection; None: ``config.k_aux`` of the coder.
        variance: mean squared distance of the targets from their mean, by which squared errors are divided, above 0 (a
            tensor is not looked at); None: that of the batch.
        ramp: share of the sparsity coefficient in force, 0 to 1 (its warm-up).
        step: steps taken before this one.
    """

    dead: Tensor | None = None
    k_aux: int | None = None
    variance: Tensor | float | None = None
    ramp: float = 1.0
    step: int = 0


class Objective(Protocol):
    """A training loss: ``objective(coder, x [n, d], target [n, d_out], moment) -> CoderLoss``."""

    def __call__(self, coder: SparseCoder, x: Tensor, target: Tensor, moment: Moment) -> CoderLoss: ...


def rows(coder: SparseCoder, x: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
    """`x` ``[n, d]`` and `target` ``[n, d_out]`` (None: x), checked."""
    coder.check_input(x)
    x = x.reshape(-1, coder.config.d)
    if x.shape[0] == 0:
        raise ValueError(f"x must have at least one row, got shape {list(x.shape)}")
    if target is None:
        if coder.config.output_width != coder.config.d:
            raise ValueError(f"target must be given: the coder turns width {coder.config.d} into another")
        return x, x
    target = target.reshape(-1, target.shape[-1])
    if target.shape != (x.shape[0], coder.config.output_width):
        wanted = f"[..., {coder.config.output_width}], one row for each of x"
        raise ValueError(f"target must have shape {wanted}, got {list(target.shape)}")
    return x, target


def variance_of(target: Tensor, given: Tensor | float | None) -> Tensor | float:
    """The variance to divide by: as given, or that of the rows of `target` ``[n, d]``; 1 where they are all alike."""
    if given is not None:
        if not isinstance(given, Tensor):
            _fields.number("variance", given, above=True)
        return given
    target = target.to(_checks.accumulator(target.dtype))
    variance = total((target - target.mean(0)).square()) / target.shape[0]
    return torch.where(variance > 0, variance, 1.0)


def aux_loss(error: Tensor, reconstruction: Tensor, dead: Tensor) -> Tensor:
    """AuxK (Gao et al. 2024, arXiv:2406.04093): how badly dead latents rebuild what the others leave.

    Args:
        error: ``[n, d]`` detached, reconstruction minus target.
        reconstruction: ``[n, d]`` of the dead latents' codes, without `b_dec`.
        dead: bool ``[m]``.

    Returns:
        ``Σ ||e - ê||² / Σ ||e - mean e||²`` with ``e = -error``; 0 where nothing is dead or all residuals are alike.
    """
    residual = -error
    spread = total((residual - residual.mean(0)).square())
    used = (spread > 0) & dead.any()
    # Divided by 1 where unused: a division by 0 would put NaN into the gradients even behind a `where`.
    aux = total((reconstruction.to(error.dtype) - residual).square()) / torch.where(used, spread, 1.0)
    return torch.where(used, aux, 0.0)


def decode_both(coder: SparseCoder, codes: SparseCodes, aux: SparseCodes) -> tuple[Tensor, Tensor]:
    """``(decode(codes), decode(aux) without b_dec)`` of codes and AuxK codes ``[n, k_aux]`` in one pass: one gradient
    of `W_dec`, not two to add up.

    `decode` would add `b_dec` to the rows of both, so it is added after; in 16 bits that rounds once more.
    """
    n, width, device = len(codes), aux.values.shape[1], codes.device
    # The auxiliary rows come first: behind ragged codes there may be storage that is not in use.
    first = torch.arange(n, device=device) * width
    if codes.offsets is None:
        rest = torch.arange(n + 1, device=device) * codes.values.shape[1]
    else:
        rest = codes.offsets
    values = torch.cat([aux.values.reshape(-1), codes.values.reshape(-1)])
    indices = torch.cat([aux.indices.reshape(-1), codes.indices.reshape(-1)])
    both = SparseCodes(values, indices, codes.m, torch.cat([first, rest + n * width]))
    extra, main = decode(both, coder.W_dec, sparse_grad=coder.sparse_grad).split(n)
    return main + coder.b_dec, extra
