# SPDX-License-Identifier: Apache-2.0
"""`adam_rows_`: one Adam step of a matrix of latent rows, dense-exact or masked, in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, _dispatch


def _fake(
    param, exp_avg, exp_avg_sq, grad, rows, lr, beta1, beta2, eps, weight_decay, step, decoupled, masked, project,
    renormalise, backend=None,
):  # fmt: skip
    return None


_op = _dispatch.define(
    "adam_rows_(Tensor(a!) param, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor grad, Tensor? rows, float lr, "
    "float beta1, float beta2, float eps, float weight_decay, int step, bool decoupled, bool masked, bool project, "
    "bool renormalise, *, str? backend=None) -> ()",
    _fake,
)


@_dispatch.public("adam_rows_")
def adam_rows_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: int,
    decoupled: bool = False,
    masked: bool = False,
    project: bool = False,
    renormalise: bool = False,
    backend: str | None = None,
) -> None:
    """One Adam step of `param` and its moments, in place.

    Args:
        param: ``[m, d]`` parameter, contiguous; float32, bfloat16, float16 or float64.
        exp_avg, exp_avg_sq: ``[m, d]`` moments, contiguous; float32 (float64 for a float64 parameter).
        grad: ``[m, d]`` dense, or a ``torch.sparse_coo`` tensor over rows (coalesced first if it is not). Rows outside
            ``[0, m)``, or unordered ones under the mark of a coalesced gradient, raise an IndexError.
        lr, betas, eps, weight_decay: as in ``torch.optim.Adam``.
        step: number of this step, from 1 (bias correction).
        decoupled: weight decay as in AdamW rather than added to the gradient.
        masked: ``torch.optim.SparseAdam`` semantics: rows without an entry in the sparse `grad` keep parameter and
            moments. Needs a sparse `grad` and no weight decay. Without `masked`, a sparse `grad` means zero elsewhere:
            every row is updated, exactly as dense Adam would.
        project: first remove from every row's gradient its component along the row (decoder rows of fixed norm).
        renormalise: last, scale every updated row to unit length. A row of length zero stays.
        backend: run on this backend or raise (default: the first that can).

    Equivalent to: ``torch.optim.Adam`` / ``AdamW`` / ``SparseAdam`` on the projected gradient, then
    ``param /= param.norm(dim=1, keepdim=True)``.
    """
    _checks.floating("param", param)
    if param.ndim != 2 or not param.is_contiguous():
        raise ValueError(f"param must be a contiguous [m, d] matrix, got {list(param.shape)}, strides {param.stride()}")
    state_dtype = _checks.accumulator(param.dtype)
    for name, state in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _checks.dense(name, state)
        if state.shape != param.shape or not state.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous and have shape {list(param.shape)} like param, "
                f"got {list(state.shape)}, strides {state.stride()}"
            )
        if state.dtype != state_dtype:
            raise TypeError(f"{name} must be {state_dtype}, got {state.dtype}")
        _checks.like(name, state, "param", param, dtype=False)
    if param is exp_avg or param is exp_avg_sq or exp_avg is exp_avg_sq:
        raise ValueError("param, exp_avg and exp_avg_sq must be three tensors, got the same one twice")
    _checks.tensor("grad", grad)
    if grad.shape != param.shape:
        raise ValueError(f"grad must have shape {list(param.shape)} like param, got {list(grad.shape)}")
    _checks.like("grad", grad, "param", param)
    if grad.layout not in (torch.strided, torch.sparse_coo):
        raise ValueError(f"grad must be dense or torch.sparse_coo, got {grad.layout}")
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        _checks.number(name, value)
    if isinstance(step, bool) or not isinstance(step, int) or step < 1:
        raise ValueError(f"step must be an int >= 1, got {step!r}")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas must be two numbers (beta1, beta2), got {betas!r}")
    for name, value in zip(("beta1", "beta2"), betas, strict=True):
        _checks.number(name, value, 0.0, 1.0)
    rows = None
    if grad.layout == torch.sparse_coo:
        if grad.sparse_dim() != 1:
            raise ValueError(f"a sparse grad must be sparse over rows only (sparse_dim 1), got {grad.sparse_dim()}")
        grad = _checks.row_gradient(grad)
        rows, grad = grad.indices()[0], grad.values()
    elif masked:
        raise ValueError("masked=True needs a sparse_coo grad: a dense one does not say which rows were touched")
    if masked and weight_decay:
        raise ValueError(f"weight_decay must be 0 with masked=True (SparseAdam has none), got {weight_decay}")
    _op(
        param, exp_avg, exp_avg_sq, grad, rows, lr, *betas, eps, weight_decay, step, decoupled, masked, project,
        renormalise, backend=_dispatch.requested(backend),
    )  # fmt: skip
