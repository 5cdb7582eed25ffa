# SPDX-License-Identifier: Apache-2.0
"""What a hook does with the hidden states of one forward pass."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..codes import SparseCodes
from ..nn import SparseCoder
from ..nn.input_norm import InputNorm
from ..ops import decode
from .edits import Edits, rows_of_entries
from .places import Call

if TYPE_CHECKING:
    from .attached import Hook


@dataclasses.dataclass
class Last:
    """What a forward pass held.

    Attributes:
        x, y, codes: as in `fusae.hook`; codes before edits.
        rest, columns, edits: the edited codes, as `Edits.apply` gives them; None without edits.
        reconstruction, error: None where nobody needed them.
    """

    x: Tensor
    y: Tensor
    codes: SparseCodes
    rest: SparseCodes | None = None
    columns: Tensor | None = None
    edits: Edits | None = None
    reconstruction: Tensor | None = None
    error: Tensor | None = None


def forward(hook: Hook, x: Tensor, y: Tensor, call: Call, edits: Edits) -> tuple[Tensor, Last]:
    """Encode x ``[..., d]``: what the model goes on with instead of y (y itself if nothing changed), and the rest."""
    coder, config = hook.coder, hook.coder.config
    if coder.training and config.select == "batch_topk":
        raise ValueError("coder is in training mode, where a batch top-k depends on the batch; call coder.eval()")
    lead = call.lead_of(x.shape[:-1])
    used = call.used(lead)
    codes = _encoded(coder, x, used)
    graph = torch.is_grad_enabled() and (
        hook.requires_grad or x.requires_grad or y.requires_grad or codes.values.requires_grad or edits.needs_grad
    )
    shown = _shown(codes, x.shape[:-1], graph and hook.requires_grad)
    # What a later module changes in place is not what was here. A graph goes through the tensor itself.
    kept = x if x.requires_grad else x.clone()
    last = Last(kept, kept if y is x else y if y.requires_grad else y.clone(), shown)
    if hook.mode == "read" or (hook.mode == "error" and not graph and not len(edits)):
        return y, last

    before = after = (shown.flatten(), None)
    if len(edits):
        row = rows_of_entries(before[0])
        before = edits.split(before[0], row)
        after = edits.apply(*before, row, lead, lambda positions: call.chosen(positions, lead, x.device))
        last.rest, last.columns, last.edits = *after, edits
    if hook.mode == "replace":
        new = _written(coder, *after, edits, x).reshape(y.shape).to(y.dtype)
        return new if used is None else torch.where(used.view(*lead, 1).reshape(*y.shape[:-1], 1), new, y), last
    with torch.no_grad():
        out = y.clone() if not len(edits) else _added(y, _change(coder, before, after, edits, x))
    if graph:
        # Here the error follows the encoder; a derivative by the codes that are shown holds it.
        last.reconstruction = decoded(coder, codes, x).reshape(y.shape)
        error = y - last.reconstruction
        if hook.detach_error:
            error = error.detach()
        if hook.requires_grad and not error.requires_grad:
            error = error.detach().requires_grad_()
        last.error = error
        out = _Sum.apply(out, _written(coder, *after, edits, x).reshape(y.shape), error)
    return out, last


class _Sum(torch.autograd.Function):
    """``decoded + error`` whose value is known: `out`, which rounds less."""

    @staticmethod
    def forward(out, decoded, error):
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.dtypes = inputs[1].dtype, inputs[2].dtype

    @staticmethod
    def backward(ctx, grad):
        return None, *(grad.to(dtype) for dtype in ctx.dtypes)


def decoded(coder: SparseCoder, codes: SparseCodes, x: Tensor) -> Tensor:
    """The output ``[..., d_out]`` for codes of x ``[..., d]``, which may be of another dtype than the coder."""
    y = coder.decode(codes.flatten(), _rows(coder, x))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _rows(coder: SparseCoder, x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(coder.W_enc.dtype)


def _encoded(coder: SparseCoder, x: Tensor, used: Tensor | None) -> SparseCodes:
    """Codes of the rows of x, those of rows that are not used with values 0."""
    codes = coder.encode(_rows(coder, x))
    if used is None:
        return codes
    row = rows_of_entries(codes).clamp(max=max(used.shape[0] - 1, 0))  # storage that is not in use is 0 already
    return SparseCodes(torch.where(used[row], codes.values, 0.0), codes.indices, codes.m, codes.offsets)


def _shown(codes: SparseCodes, lead: torch.Size, leaf: bool) -> SparseCodes:
    """The codes with the leading dimensions of x, their values a node of the graph of their own."""
    values, indices = codes.values, codes.indices
    if codes.offsets is None:
        values, indices = (part.reshape(*lead, part.shape[-1]) for part in (values, indices))
    values = values.view_as(values)
    if leaf and not values.requires_grad:
        values = values.detach().requires_grad_()
    return SparseCodes(values, indices, codes.m, codes.offsets)


def _written(coder: SparseCoder, rest: SparseCodes, columns: Tensor | None, edits: Edits, x: Tensor) -> Tensor:
    """The output for edited codes."""
    y = decoded(coder, rest, x)
    return y if not edits.columns else y + _alone(coder, edits.as_codes(columns, rest.m), x).reshape(y.shape)


def _alone(coder: SparseCoder, codes: SparseCodes, x: Tensor) -> Tensor:
    """What some latents add to the output ``[n, d_out]``: no bias, no skip connection."""
    y = decode(codes, coder.W_dec, sparse_grad=coder.sparse_grad)
    scale = InputNorm.of(coder.config, _rows(coder, x)).scale
    return y if scale is None else (y * scale).to(y.dtype)


def _change(coder: SparseCoder, before: tuple, after: tuple, edits: Edits, x: Tensor) -> Tensor:
    """What edits change in the output ``[n, d_out]``."""
    changes = []
    (old, old_columns), (new, new_columns) = before, after
    if edits.columns:
        changes.append(edits.as_codes(new_columns - old_columns, new.m))
    if new is not old:
        changes.append(SparseCodes(new.values - old.values, new.indices, new.m, new.offsets))
    return sum(_alone(coder, codes, x) for codes in changes)


def _added(y: Tensor, change: Tensor) -> Tensor:
    """Their sum in the dtype of y, rounded once."""
    return (y + change.reshape(y.shape)).to(y.dtype)
