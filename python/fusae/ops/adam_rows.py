# SPDX-License-Identifier: Apache-2.0
"""`adam_rows_`: one Adam step of a matrix of latent rows, dense-exact or masked, in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, _dispatch


def _fake(
    param, exp_avg, exp_avg_sq, grad, rows, lr, beta1, beta2, eps, weight_decay, step, decoupled, masked, project,
    renormalise, last_step=None, master=None, seed=None, first_row=0, backend=None,
):  # fmt: skip
    return None


# Elements of a row of 8-bit moments that share an exponent.
_BLOCK = 256


def moment_width(d: int, dtype: torch.dtype) -> int:
    """Columns of a moment of rows of width `d`: in 8 bits, a code for each element and an exponent for each 256."""
    return d + -(-d // _BLOCK) if dtype == torch.uint8 else d


_op = _dispatch.define(
    "adam_rows_(Tensor(a!) param, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor grad, Tensor? rows, float lr, "
    "float beta1, float beta2, float eps, float weight_decay, int step, bool decoupled, bool masked, bool project, "
    "bool renormalise, Tensor(d!)? last_step=None, Tensor(e!)? master=None, int? seed=None, int first_row=0, *, "
    "str? backend=None) -> ()",
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
    last_step: Tensor | None = None,
    master: Tensor | None = None,
    seed: int | None = None,
    first_row: int = 0,
    backend: str | None = None,
) -> None:
    """One Adam step of `param` and its moments, in place.

    Args:
        param: ``[m, d]`` parameter, contiguous; float32, bfloat16, float16 or float64.
        exp_avg, exp_avg_sq: ``[m, d]`` moments, contiguous, all 0 at the start; float32 (float64 for a float64
            parameter), or in fewer bits: bfloat16, or uint8 ``[m, d + ceil(d / 256)]``, a row of which holds a code for
            every element and then an exponent for every 256 of them. `exp_avg` may be empty (``[0]``) where
            ``betas[0]`` is 0.
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
        last_step: int32 ``[m]``, 0 at the start; with it the step is lazy: rows without an entry in the sparse `grad`
            are left alone, and the decay of their second moment is made up for when they next have one. Equals dense
            Adam to rounding, as with ``betas[0] == 0`` (required) such a row does not move; with `renormalise`, where
            rows have unit length from the start. No weight decay, which would move it.
        master: float32 ``[m, d]``: what is updated, of which a 16-bit `param` becomes the rounded copy.
        seed: of stochastic rounding: needed by moments in fewer bits; with it, a bfloat16 `param` without a master is
            rounded so too. The bits are a function of seed, `step`, row and column alone.
        first_row: number of the first row in the whole matrix, where `param` is a part of it. For `seed` alone.
        backend: run on this backend or raise (default: the first that can).

    8-bit codes have 3 bits of mantissa; the first moment reaches down to 2**-17 of the largest of its 256 neighbours,
    the second to 2**-33, and no further down: one above 0 never becomes 0. A block that holds a value which is not
    finite is read as NaN.

    Equivalent to: ``torch.optim.Adam`` / ``AdamW`` / ``SparseAdam`` on the projected gradient, then
    ``param /= param.norm(dim=1, keepdim=True)``.
    """
    _checks.floating("param", param)
    if param.ndim != 2 or not param.is_contiguous():
        raise ValueError(f"param must be a contiguous [m, d] matrix, got {list(param.shape)}, strides {param.stride()}")
    for name, state in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _check_moment(name, state, param, seed)
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
    if exp_avg.numel() == 0 and param.numel() and betas[0]:
        raise ValueError(f"exp_avg may be empty only where betas[0] is 0, got {betas[0]}")
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
    if last_step is not None:
        _check_lazy(last_step, param, rows, betas[0], weight_decay, masked)
    if master is not None:
        _check_master(master, param)
    _check_seed(seed, first_row, param, master)
    _op(
        param, exp_avg, exp_avg_sq, grad, rows, lr, *betas, eps, weight_decay, step, decoupled, masked, project,
        renormalise, last_step, master, seed, first_row, backend=_dispatch.requested(backend),
    )  # fmt: skip


def _check_moment(name: str, state: Tensor, param: Tensor, seed: int | None) -> None:
    _checks.dense(name, state)
    _checks.like(name, state, "param", param, dtype=False)
    wide = _checks.accumulator(param.dtype)
    narrow = () if wide == torch.float64 else (torch.bfloat16, torch.uint8)
    if state.dtype not in (wide, *narrow):
        others = ", bfloat16 or uint8" if narrow else ""
        raise TypeError(f"{name} must be {str(wide)[6:]}{others} for a {param.dtype} parameter, got {state.dtype}")
    if name == "exp_avg" and state.shape == (0,):
        return
    shape = [param.shape[0], moment_width(param.shape[1], state.dtype)]
    if list(state.shape) != shape or not state.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous and have shape {shape} for {state.dtype} and a parameter "
            f"{list(param.shape)}, got {list(state.shape)}, strides {state.stride()}"
        )
    if state.dtype in narrow and seed is None:
        raise ValueError(f"seed must be given: {name} in {state.dtype} is rounded stochastically")


def _check_lazy(
    last_step: Tensor, param: Tensor, rows: Tensor | None, beta1: float, weight_decay: float, masked: bool
) -> None:
    _checks.dense("last_step", last_step)
    _checks.like("last_step", last_step, "param", param, dtype=False)
    if last_step.shape != param.shape[:1] or last_step.dtype != torch.int32 or not last_step.is_contiguous():
        raise ValueError(
            f"last_step must be a contiguous int32 [{param.shape[0]}], got {last_step.dtype} {list(last_step.shape)}"
        )
    if rows is None:
        raise ValueError("last_step needs a sparse_coo grad: a dense one does not say which rows were touched")
    if masked:
        raise ValueError("masked must be False with last_step: a lazy step is dense Adam's, a masked one is not")
    if beta1:
        raise ValueError(
            f"betas[0] must be 0 with last_step, got {beta1}: with momentum a row moves on without a gradient"
        )
    if weight_decay:
        raise ValueError(
            f"weight_decay must be 0 with last_step, got {weight_decay}: it moves rows without a gradient"
        )


def _check_master(master: Tensor, param: Tensor) -> None:
    _checks.dense("master", master)
    _checks.like("master", master, "param", param, dtype=False)
    if param.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"master is for a bfloat16 or float16 parameter, got {param.dtype}")
    if master.dtype != torch.float32 or master.shape != param.shape or not master.is_contiguous():
        raise ValueError(
            f"master must be a contiguous float32 {list(param.shape)} like param, "
            f"got {master.dtype} {list(master.shape)}"
        )


def _check_seed(seed: int | None, first_row: int, param: Tensor, master: Tensor | None) -> None:
    if seed is not None:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seed must be an int in [0, 2**63), got {seed!r}")
        if param.dtype == torch.float16 and master is None:
            raise TypeError("seed: a float16 parameter is rounded to nearest alone; give it a master, or take bfloat16")
    if isinstance(first_row, bool) or not isinstance(first_row, int) or first_row < 0:
        raise ValueError(f"first_row must be an int >= 0, got {first_row!r}")
