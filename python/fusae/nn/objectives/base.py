# SPDX-License-Identifier: Apache-2.0
"""What every training loss takes and gives, and the parts that several of them share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _checks, _fields
from ...codes import SparseCodes
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


class Chosen(NamedTuple):
    """The codes of a batch and what a loss charges for them, their errors apart.

    Attributes:
        codes: with a gradient.
        charge: scalar to add to the loss, with a gradient.
        terms: its terms by name, before their coefficients, detached scalars.
    """

    codes: SparseCodes
    charge: Tensor
    terms: dict[str, Tensor]


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
    spread, apart = _spread(target.to(_checks.accumulator(target.dtype)))
    return torch.where(apart, spread / target.shape[0], 1.0)


def _spread(x: Tensor) -> tuple[Tensor, Tensor]:
    """``Σ ||x - mean x||²`` of the rows of `x` ``[n, d]``, and whether it is more than the rounding of their mean."""
    mean = x.mean(0)
    spread = total((x - mean).square())
    return spread, spread > (16 * torch.finfo(x.dtype).eps) ** 2 * len(x) * mean.detach().square().sum()


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
    spread, apart = _spread(residual)
    used = apart & dead.any()
    # Divided by 1 where unused: a division by 0 would put NaN into the gradients even behind a `where`.
    aux = total((reconstruction.to(error.dtype) - residual).square()) / torch.where(used, spread, 1.0)
    return torch.where(used, aux, 0.0)


def decode_together(coder: SparseCoder, parts: Sequence[SparseCodes]) -> list[Tensor]:
    """``decode(part)`` without `b_dec` of several codes of the same n rows, in one pass: one gradient of `W_dec`, not
    several to add up. Only the last one may be ragged.

    `decode` would add `b_dec` to all of them, so it is left to the caller; in 16 bits that rounds once more.
    """
    if any(part.is_ragged for part in parts[:-1]):
        raise ValueError("only the last of several codes may be ragged: behind its entries there may be unused storage")
    n, device, start, offsets = len(parts[0]), parts[0].device, 0, []
    for part in parts:
        if part.offsets is None:
            width = part.values.shape[1]
            offsets.append(start + width * torch.arange(n, device=device))
            start += n * width
        else:  # last: behind ragged codes there may be storage that is not in use
            offsets.append(start + part.offsets)
    if parts[-1].offsets is None:
        offsets.append(torch.full((1,), start, device=device))
    values = torch.cat([part.values.reshape(-1) for part in parts])
    indices = torch.cat([part.indices.reshape(-1) for part in parts])
    joined = SparseCodes(values, indices, parts[0].m, torch.cat(offsets))
    return list(coder.decode_rows(joined).split(n))


class Fit(NamedTuple):
    """How well codes rebuild their target.

    Attributes:
        loss: scalar ``Σ_g weights[g] · mse[g]``, with a gradient.
        mse: ``[G]`` squared error of every prefix, summed over d, mean over rows, divided by the variance. Detached.
        sse: scalar, ``Σ ||y - ŷ||²`` of the last prefix, which is all of the codes. Detached.
        residual: ``[n, d_out]``, ``y - ŷ``. Detached.
        reconstruction: ``[n, d_out]``, ``ŷ``. Detached.
    """

    loss: Tensor
    mse: Tensor
    sse: Tensor
    residual: Tensor
    reconstruction: Tensor


def fit(
    coder: SparseCoder,
    codes: SparseCodes,
    x: Tensor,
    target: Tensor,
    variance: Tensor | float,
    prefixes: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    nested: str = "latents",
) -> Fit:
    """`fusae.decode_loss` of a coder's codes, per row and divided by `variance`; see there for the last three."""
    wanted = target - F.linear(x, coder.W_skip) if coder.config.skip else target
    out = coder.decode_loss(codes, wanted, prefixes, weights, nested)
    scale = 1 / (len(target) * variance)
    mse = (out.sse * scale).detach()
    return Fit(out.loss * scale, mse, out.sse[-1], out.residual, target.detach() - out.residual.to(target.dtype))


def row_norms(coder: SparseCoder, latents: Tensor) -> Tensor:
    """``[m]`` decoder norms with a gradient, for losses that take those of `latents` (may repeat) only.

    With ``coder.sparse_grad`` the gradient is one of their rows, and the others' norms are not worked out (0).
    """
    if not coder.sparse_grad:
        return coder.norms_of(coder.W_dec)
    touched = latents.long().unique()
    norms = coder.norms_of(F.embedding(touched, coder.W_dec, sparse=True))
    return norms.new_zeros(coder.config.m).index_copy(0, touched, norms)


def wants(coder: SparseCoder, objective: object, selects: Sequence[str]) -> None:
    """Raises `ValueError` where the coder does not select as the objective needs it."""
    if coder.config.select not in selects:
        raise ValueError(
            f"objective {type(objective).__name__} needs a coder with select {' or '.join(map(repr, selects))}, "
            f"got {coder.config.select!r}"
        )
    if coder.config.input_norm != "none":
        raise ValueError(
            f"input_norm is {coder.config.input_norm!r}, and such a coder is for inference; normalise the rows, and "
            "train one without input_norm on them"
        )
