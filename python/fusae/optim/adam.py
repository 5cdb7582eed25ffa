# SPDX-License-Identifier: Apache-2.0
"""Adam over matrices of latent rows, on `fusae.adam_rows_`: one pass over memory per matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _checks, _fields
from .._pages import large_pages
from ..ops import adam_rows_
from ..ops.adam_rows import moment_width

_FLAGS = ("decoupled", "masked", "project", "renormalise", "lazy", "master")
# What states from before these options were there mean.
_BEFORE = {"lazy": False, "moments": "float32", "master": False, "seed": None}
MOMENTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "8bit": torch.uint8}
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
        lazy: leave rows without an entry in the sparse gradient alone, exactly: ``betas[0]`` must be 0 (such a row does
            not move then; the decay of its second moment is made up for when it next has an entry), and no weight
            decay. Equals dense Adam to rounding, and needs no first moment; with `renormalise` where rows have unit
            length from the start.
        moments: of matrices: 'float32', 'bfloat16' or '8bit' (see `fusae.adam_rows_`), the latter two rounded
            stochastically.
        master: keep a float32 copy of a 16-bit parameter, which is what the steps add up in.
        seed: of stochastic rounding. Without a master, bfloat16 parameters are rounded so as well where it is given.
        backend: run on this backend or raise (default: the first that can).

    Every option may differ from group to group. Vectors go through the same formula; they are never masked, projected
    or renormalised, their moments are float32. The moments are float32 (float64 for a float64 parameter) whatever the
    dtype of the parameter, but as `moments` says. Random bits are a function of seed, parameter (its place among all),
    step, row and column: the same for any number of threads, and after a restart.

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
        lazy: bool = False,
        moments: str = "float32",
        master: bool = False,
        seed: int | None = None,
        backend: str | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decoupled": decoupled,
            "masked": masked, "project": project, "renormalise": renormalise, "lazy": lazy, "moments": moments,
            "master": master, "seed": seed, "backend": backend,
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
                _check_param(param, self.param_groups[-1])
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
        for number, (param, group) in enumerate(self._params(), 1):
            if param.grad is not None:
                self._update(param, group, number)
        return loss

    @torch.no_grad()
    def step_one(self, param: Tensor) -> None:
        """Step one parameter by its gradient and drop that, so that `step` passes it by.

        For ``param.register_post_accumulate_grad_hook``: gradients are then used up one by one while the backward pass
        goes on, and need not all be there at the same time. Nothing that runs later in that pass may read `param`.
        """
        for number, (known, group) in enumerate(self._params(), 1):
            if known is param:
                self._update(param, group, number)
                param.grad = None
                return
        raise ValueError("param must be one of this optimiser's")

    def _params(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        return ((param, group) for group in self.param_groups for param in group["params"])

    def _update(self, param: Tensor, group: dict[str, Any], number: int) -> None:
        """The step of parameter `number` of all (its seed)."""
        options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "decoupled", "backend")}
        state = self.state_of(param)
        options["seed"] = None if group["seed"] is None else group["seed"] + number
        none = param.new_empty(0, dtype=state["exp_avg_sq"].dtype)
        held = [state.get("exp_avg", none), state["exp_avg_sq"], state.get("master")]
        # Counted only when the update went through: a raised step leaves the state as it was.
        options["step"] = state["step"] + 1
        if param.ndim == 2:
            flags = {name: group[name] for name in ("masked", "project", "renormalise")}
            lazy = {"last_step": state.get("last_step"), "master": held[2]}
            adam_rows_(param, *held[:2], param.grad, **lazy, **options, **flags)
        else:
            grad = param.grad.to_dense() if param.grad.layout == torch.sparse_coo else param.grad
            row = [None if t is None else t.view(1, -1) for t in (param, *held)]
            adam_rows_(*row[:3], grad.reshape(1, -1), master=row[3], **options)
        state["step"] += 1

    def state_of(self, param: Tensor) -> dict[str, Any]:
        """``step`` and the tensors of a parameter's state; made where it has none yet: all 0, `master` its copy."""
        state = self.state[param]
        if not state:
            state["step"] = 0
            for name, (shape, dtype) in self._layout(param).items():
                state[name] = large_pages(torch.zeros(shape, dtype=dtype, device=param.device))
            if "master" in state:
                state["master"].copy_(param.detach())
        return state

    def _layout(self, param: Tensor) -> dict[str, tuple[list[int], torch.dtype]]:
        """Shape and dtype of what is kept for a parameter."""
        group = next(g for g in self.param_groups if any(p is param for p in g["params"]))
        return state_layout(list(param.shape), param.dtype, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict()`. The moments keep their precision (torch would cast them to the parameter's dtype).

        States of versions before `lazy`, `moments`, `master` and `seed` load as without them.

        Raises:
            ValueError, TypeError: it is of another optimiser, of other groups or of other shapes; nothing has changed.
        """
        groups = [{**_BEFORE, **group} if "masked" in group else group for group in state_dict["param_groups"]]
        state_dict = {**state_dict, "param_groups": groups}
        for i, group in enumerate(groups):
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
        groups = {id(p): g for ours, g in zip(self.param_groups, state_dict["param_groups"], strict=False)
                  for p in ours["params"]}  # fmt: skip
        layouts = [state_layout(list(param.shape), param.dtype, groups[id(param)]) for _, param in pairs]
        for (index, _), layout in zip(pairs, layouts, strict=True):
            _check_state(index, saved[index], layout)
        super().load_state_dict(state_dict)
        for (index, param), layout in zip(pairs, layouts, strict=True):
            kept = {name: saved[index][name].to(param.device, copy=True) for name in layout}
            kept = {name: large_pages(value.to(layout[name][1])) for name, value in kept.items()}
            self.state[param] = {"step": int(saved[index]["step"]), **kept}

    @torch.no_grad()
    def clip_grad_norm_(
        self, max_norm: float, joint: Callable[[list[Tensor], Tensor], Tensor] | None = None
    ) -> Tensor:
        """Scale all gradients so that their joint Euclidean norm is at most `max_norm`. Never reads from the device.

        Sparse gradients are taken as they are (``torch.nn.utils.clip_grad_norm_`` refuses them). Where a group
        projects, the norm is that of the projected gradient: the order is project, clip, step.

        `joint`: for parameters whose rows are spread over processes, makes the squared norm of all of them from the
        parameters and the squared norm of the gradient of each ``[p]`` as this process has it; default: their sum.

        Returns:
            The norm before clipping, a scalar on the device of the gradients. As with torch's function, a NaN norm
            makes all gradients NaN; an infinite one makes infinite values NaN and all others 0.
        """
        _fields.number("max_norm", max_norm, above=True)
        squares, grads, params = [], [], []
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
                params.append(param)
                project = group["project"] and param.ndim == 2
                squares.append(_square_norm(grad, rows, param if project else None))
        if not squares:
            return torch.zeros(())
        each = torch.stack([s.to(squares[0].device) for s in squares])
        norm = (each.sum() if joint is None else joint(params, each)).sqrt()
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
    _fields.choice("moments", group["moments"], tuple(MOMENTS))
    if group["seed"] is not None:
        _fields.whole("seed", group["seed"], 0, 2**62)
    elif group["moments"] != "float32":
        raise ValueError(f"seed must be given with moments {group['moments']!r}, which are rounded stochastically")
    if group["lazy"]:
        if group["masked"]:
            raise ValueError("masked must be False with lazy=True: lazy steps are dense Adam's, masked ones are not")
        if betas[0]:
            raise ValueError(
                f"betas[0] must be 0 with lazy=True, got {betas[0]}: with momentum a row moves on without a gradient; "
                "use betas=(0, ...), or masked=True"
            )
        if group["weight_decay"]:
            raise ValueError(
                f"weight_decay must be 0 with lazy=True, got {group['weight_decay']}: it moves rows without a gradient"
            )
    if group["masked"] and group["weight_decay"]:
        raise ValueError(f"weight_decay must be 0 with masked=True (SparseAdam has none), got {group['weight_decay']}")


def state_layout(
    shape: list[int], dtype: torch.dtype, options: dict[str, Any]
) -> dict[str, tuple[list[int], torch.dtype]]:
    """Shape and dtype of every tensor that `Adam` keeps for a parameter in a group of these `options`."""
    wide, kind = _checks.accumulator(dtype), MOMENTS[options["moments"]]
    matrix = len(shape) == 2
    if matrix and kind != torch.float32:
        moment = ([shape[0], moment_width(shape[1], kind)], kind)
    else:
        moment = (shape, wide)
    lazy = options["lazy"] and matrix
    layout = {"exp_avg_sq": moment} if lazy else {"exp_avg": moment, "exp_avg_sq": moment}
    if lazy:
        layout["last_step"] = (shape[:1], torch.int32)
    if options["master"] and dtype in (torch.bfloat16, torch.float16):
        layout["master"] = (shape, torch.float32)
    return layout


def _check_state(index: int, state: dict[str, Any], layout: dict[str, tuple[list[int], torch.dtype]]) -> None:
    if absent := [name for name in ("step", *layout) if name not in state]:
        raise ValueError(f"state_dict: parameter {index} lacks {', '.join(absent)}")
    for name, (shape, dtype) in layout.items():
        if list(state[name].shape) != shape:
            raise ValueError(
                f"state_dict: {name} of parameter {index} must have shape {shape}, got {list(state[name].shape)}"
            )
        if dtype in (torch.uint8, torch.int32) and state[name].dtype != dtype:
            raise TypeError(f"state_dict: {name} of parameter {index} must be {dtype}, got {state[name].dtype}")


def _check_param(param: Tensor, group: dict[str, Any]) -> None:
    if param.ndim not in (1, 2) or not param.is_contiguous():
        raise ValueError(
            f"params must be contiguous [m, d] matrices (row = latent) or vectors, got shape {list(param.shape)}, "
            f"strides {param.stride()}; use torch.optim.Adam for others"
        )
    if param.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"params must be float32, bfloat16, float16 or float64, got {param.dtype}")
    if param.dtype == torch.float64 and group["moments"] != "float32":
        raise TypeError(f"moments must be 'float32' (float64, then) for a float64 parameter, got {group['moments']!r}")
    if param.dtype == torch.float16 and group["seed"] is not None and not group["master"]:
        raise TypeError("a float16 parameter is rounded to nearest alone: set master=True, or take bfloat16")
