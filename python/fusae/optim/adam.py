# SPDX-License-Identifier: Apache-2.0
"""Adam over matrices of latent rows, on `fusae.adam_rows_`: one pass over memory per matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import _checks, _fields
from ..ops import adam_rows_

_FLAGS = ("decoupled", "masked", "project", "renormalise")
_MOMENTS = ("exp_avg", "exp_avg_sq")
# Rows looked at together in the gradient norm: bounds its scratch memory.
_CHUNK = 4096


class Adam(torch.optim.Optimizer):
    """Adam, AdamW and SparseAdam over ``[m, d]`` matrices (row = latent) and small vectors.

    Args:
        params: parameters or groups of them; each ``[m, d]`` contiguous or ``[l]``; float32, bfloat16, float16 or
            float64. Gradients may be dense, or ``torch.sparse_coo`` over rows (``sparse_grad=True`` of the ops).
        lr, betas, eps, weight_decay: as in ``torch.optim.Adam``. `lr` is a plain number; torch's schedulers work.
        decoupled: weight decay as in AdamW rather than added to the gradient.
        masked: ``torch.optim.SparseAdam`` semantics: rows without an entry in the sparse gradient keep parameter and
            moments. Without it a sparse gradient is zero elsewhere, and the step equals dense Adam's to rounding.
        project: remove from every row's gradient its component along the row (decoder rows of fixed norm).
        renormalise: scale every updated row to unit length after the step.
        backend: run on this backend or raise (default: the first that can).

    Every option may differ from group to group. Vectors go through the same formula; they are never masked, projected
    or renormalised. The moments are float32 (float64 for a float64 parameter) whatever the dtype of the parameter.

    Raises:
        ValueError, TypeError: an option or a parameter that cannot work, naming it, on construction.

    Equivalent to: ``torch.optim.Adam`` (``AdamW``, ``SparseAdam``) on the projected gradients, then
    ``W /= W.norm(dim=1, keepdim=True)`` where `renormalise` is set.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled: bool = False,
        masked: bool = False,
        project: bool = False,
        renormalise: bool = False,
        backend: str | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decoupled": decoupled,
            "masked": masked, "project": project, "renormalise": renormalise, "backend": backend,
        }  # fmt: skip
        # Checked here too: a bad default must not hide behind groups that each override it.
        _check_options(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group: ``{"params": ..., option: value, ...}``; options not given take the defaults."""
        unknown = set(param_group) - set(self.defaults) - {"params", "param_names", "initial_lr"}
        if unknown:
            raise ValueError(
                f"param_group has unknown options {sorted(unknown)}; options are {', '.join(self.defaults)}"
            )
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            for param in self.param_groups[-1]["params"]:
                _check_param(param)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient. `closure` recomputes the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "decoupled", "backend")}
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state_of(param)
                # Counted only when the update went through: a raised step leaves the state as it was.
                options["step"] = state["step"] + 1
                if param.ndim == 2:
                    flags = {name: group[name] for name in ("masked", "project", "renormalise")}
                    adam_rows_(param, state["exp_avg"], state["exp_avg_sq"], param.grad, **options, **flags)
                else:
                    grad = param.grad.to_dense() if param.grad.layout == torch.sparse_coo else param.grad
                    row = [t.view(1, -1) for t in (param, state["exp_avg"], state["exp_avg_sq"])]
                    adam_rows_(*row, grad.reshape(1, -1), **options)
                state["step"] += 1
        return loss

    def state_of(self, param: Tensor) -> dict[str, Any]:
        """``step``, ``exp_avg`` and ``exp_avg_sq`` of a parameter; made, all 0, where it has none yet."""
        state = self.state[param]
        if not state:
            dtype = _checks.accumulator(param.dtype)
            state["step"] = 0
            for name in _MOMENTS:
                state[name] = torch.zeros(param.shape, dtype=dtype, device=param.device)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict()`. The moments keep their precision (torch would cast them to the parameter's dtype).

        Raises:
            ValueError, TypeError: it is of another optimiser, of other groups or of other shapes; nothing has changed.
        """
        for i, group in enumerate(state_dict["param_groups"]):
            if absent := [name for name in self.defaults if name not in group]:
                raise ValueError(
                    f"state_dict: group {i} lacks {', '.join(absent)}; it is not of a fusae.optim.Adam, and no other "
                    "optimiser's can be loaded"
                )
            _check_options(group)
        saved = state_dict["state"]
        order = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        pairs = [(i, param) for i, param in zip(order, params, strict=False) if i in saved]  # lengths: torch checks
        for index, param in pairs:
            _check_state(index, saved[index], param)
        super().load_state_dict(state_dict)
        for index, param in pairs:
            dtype = _checks.accumulator(param.dtype)
            moments = {name: saved[index][name].to(param.device, dtype, copy=True) for name in _MOMENTS}
            self.state[param] = {"step": int(saved[index]["step"]), **moments}

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their joint Euclidean norm is at most `max_norm`. Never reads from the device.

        Sparse gradients are taken as they are (``torch.nn.utils.clip_grad_norm_`` refuses them). Where a group
        projects, the norm is that of the projected gradient: the order is project, clip, step.

        Returns:
            The norm before clipping, a scalar on the device of the gradients. As with torch's function, a NaN norm
            makes all gradients NaN; an infinite one makes infinite values NaN and all others 0.
        """
        _fields.number("max_norm", max_norm, above=True)
        squares, grads = [], []
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param.grad.layout == torch.sparse_coo:
                    param.grad = _checks.row_gradient(param.grad)
                    rows, grad = param.grad.indices()[0], param.grad.values()
                else:
                    rows, grad = None, param.grad
                grads.append(grad)
                project = group["project"] and param.ndim == 2
                squares.append(_square_norm(grad, rows, param if project else None))
        if not squares:
            return torch.zeros(())
        norm = torch.stack([s.to(squares[0].device) for s in squares]).sum().sqrt()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(scale.to(grad.device, grad.dtype))
        return norm


def _square_norm(grad: Tensor, rows: Tensor | None, param: Tensor | None) -> Tensor:
    """Squared norm of a gradient, of its part orthogonal to the rows of `param` where that is given."""
    acc = _checks.accumulator(grad.dtype)
    if param is None:
        return torch.linalg.vector_norm(grad, dtype=acc).square()
    total = torch.zeros((), dtype=acc, device=grad.device)
    for start in range(0, grad.shape[0], _CHUNK):
        part = slice(start, start + _CHUNK)
        g, w = grad[part].to(acc), param[part if rows is None else rows[part]].to(acc)
        along, length2 = (g * w).sum(-1, keepdim=True), w.square().sum(-1, keepdim=True)
        total += (g - torch.where(length2 > 0, along / length2, 0.0) * w).square().sum(-1).sum()
    return total


def _check_options(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        _fields.number(name, group[name])
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas must be a pair of numbers, got {betas!r}")
    for i, beta in enumerate(betas):
        _fields.number(f"betas[{i}]", beta, 0.0, 1.0)
    for name in _FLAGS:
        _fields.flag(name, group[name])
    if group["masked"] and group["weight_decay"]:
        raise ValueError(f"weight_decay must be 0 with masked=True (SparseAdam has none), got {group['weight_decay']}")


def _check_state(index: int, state: dict[str, Any], param: Tensor) -> None:
    if absent := [name for name in ("step", *_MOMENTS) if name not in state]:
        raise ValueError(f"state_dict: parameter {index} lacks {', '.join(absent)}")
    for name in _MOMENTS:
        if state[name].shape != param.shape:
            raise ValueError(
                f"state_dict: {name} of parameter {index} must have shape {list(param.shape)}, "
                f"got {list(state[name].shape)}"
            )


def _check_param(param: Tensor) -> None:
    if param.ndim not in (1, 2) or not param.is_contiguous():
        raise ValueError(
            f"params must be contiguous [m, d] matrices (row = latent) or vectors, got shape {list(param.shape)}, "
            f"strides {param.stride()}; use torch.optim.Adam for others"
        )
    if param.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"params must be float32, bfloat16, float16 or float64, got {param.dtype}")
