# SPDX-License-Identifier: Apache-2.0
"""Float64 truths: dense torch formulas and autograd, with no code in common with the ops or their reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..codes import SparseCodes
from .compare import selection_band

Inputs = dict[str, Any]


def double(inputs: Inputs) -> Inputs:
    """The same inputs with every floating tensor in float64."""

    def one(value: Any) -> Any:
        if isinstance(value, SparseCodes):
            return value.detach().to(torch.float64)
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().to(torch.float64)
        return value

    return {name: one(value) for name, value in inputs.items()}


def all_finite(inputs: Inputs) -> bool:
    """No NaN or Inf in any tensor (of ragged codes: in the part of the storage that is in use)."""
    for value in inputs.values():
        if isinstance(value, SparseCodes):
            value = value.values if value.offsets is None else value.values[: int(value.offsets[-1])]
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value.coalesce().values() if value.is_sparse else value
            if not bool(torch.isfinite(value).all()):
                return False
    return True


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a selection goes by: pre-activations and scores ``[n, m]`` in float64, and how far a backend may be off."""

    pre: Tensor
    score: Tensor
    band: float


def scores(inputs: Inputs, exact: bool) -> Scores:
    """Pre-activations and scores of an `encode_topk` call. `exact`: sums are exact, the band is 0."""

    def dense(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x, W, b, norms = (inputs.get(name) for name in ("x", "W_enc", "b_enc", "norms"))
        pre = x.detach().reshape(-1, W.shape[1]).to(dtype) @ W.detach().to(dtype).T
        pre = pre if b is None else pre + b.detach().to(dtype)
        score = pre.abs() if inputs.get("select") == "abs" else pre
        return pre, score if norms is None else score * norms.to(dtype)

    pre, score = dense(torch.float64)
    if exact:
        return Scores(pre, score, 0.0)
    dtype = inputs["x"].dtype
    rounded, rounded_score = dense(torch.float64 if dtype == torch.float64 else torch.float32)
    band = max(selection_band(rounded, pre, dtype), selection_band(rounded_score, score, dtype))
    return Scores(pre, score, band)


def _activate(selected: Tensor, values: Tensor, activation: str, band: float) -> Tensor:
    """ReLU with its gradient; inside the band around 0 the backend's own side counts."""
    if activation == "none":
        return selected
    near = selected.detach().abs() <= band
    return torch.where(near, selected * (values != 0), selected.relu())


def encode_topk_grads(
    inputs: Inputs, truth: Scores, selections: list[tuple[SparseCodes, Tensor, Tensor | None]]
) -> dict[str, Tensor]:
    """Float64 autograd through the dense formula, for given selections.

    Each selection is (codes, gradient of their values, mask of latents that count or None), all ``[n, k]``.
    """
    leaves = {
        name: inputs[name].detach().to(torch.float64).requires_grad_()
        for name in ("x", "W_enc", "b_enc")
        if inputs.get(name) is not None
    }
    W = leaves["W_enc"]
    pre = leaves["x"].reshape(-1, W.shape[1]) @ W.T
    if "b_enc" in leaves:
        pre = pre + leaves["b_enc"]
    loss = pre.new_zeros(())
    for codes, grad, mask in selections:
        at = codes.indices.long()
        out = _activate(pre.gather(1, at), codes.values, inputs.get("activation", "relu"), truth.band)
        if mask is not None:
            out = out * mask[at]
        loss = loss + (out * grad.to(torch.float64)).sum()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


class _Step(torch.autograd.Function):
    """``gain · H(pre - threshold)`` with H's derivative taken as ``1 / bandwidth`` in the open window around the
    threshold; `through` gives it to `pre` too. `gain` is 1, or with `active` ``[n, m]`` (the entries above their
    threshold that did not round to 0) `pre` itself, for JumpReLU (then threshold at the jump).
    """

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth, through, active):
        ctx.save_for_backward(pre, threshold, active)
        ctx.options = bandwidth, through
        return (~(pre <= threshold)).to(pre.dtype) if active is None else torch.where(active, pre, 0.0)

    @staticmethod
    def backward(ctx, grad):
        (pre, threshold, active), (bandwidth, through) = ctx.saved_tensors, ctx.options
        ramp = grad * ((pre - threshold).abs() < bandwidth / 2) / bandwidth * (1.0 if active is None else threshold)
        grad_pre = (0.0 if active is None else grad * active) + (ramp if through else torch.zeros_like(ramp))
        return grad_pre, -ramp.sum(0), None, None, None


def encode_threshold_grads(
    inputs: Inputs, codes: SparseCodes, grad: Tensor, grad_l0: Tensor | None
) -> dict[str, Tensor]:
    """Float64 autograd through the dense formula: gradients of the stored values, and of l0 with a bandwidth."""
    leaves = {
        name: inputs[name].detach().to(torch.float64).requires_grad_()
        for name in ("x", "W_enc", "b_enc", "threshold")
        if isinstance(inputs.get(name), Tensor)
    }
    W = leaves["W_enc"]
    pre = leaves["x"].reshape(-1, W.shape[1]) @ W.T
    if "b_enc" in leaves:
        pre = pre + leaves["b_enc"]
    used = int(codes.offsets[-1])
    place = codes.row_ids()[:used], codes.indices[:used].long()
    bandwidth = inputs.get("bandwidth")
    live = codes.values[:used] != 0
    if bandwidth is None:  # every stored entry is above
        leaves.pop("threshold", None)
        loss = (pre[place] * grad[:used].double())[live].sum()
    else:
        threshold = leaves.get("threshold", pre.new_full((codes.m,), 0.0) + inputs["threshold"])
        options = bandwidth, inputs.get("straight_through", False)
        active = torch.zeros_like(pre, dtype=torch.bool).index_put_(place, live)
        loss = (_Step.apply(pre, threshold, *options, active)[place] * grad[:used].double()).sum()
        loss = loss + (_Step.apply(pre, threshold, *options, None).sum(1) * grad_l0.double()).sum()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def linear_grads(inputs: Inputs, grad: Tensor) -> dict[str, Tensor]:
    """Float64 autograd of the pre-activations, for their gradient ``[n, m]``."""
    leaves = {
        name: inputs[name].detach().to(torch.float64).requires_grad_()
        for name in ("x", "W_enc", "b_enc")
        if inputs.get(name) is not None
    }
    W = leaves["W_enc"]
    pre = torch.nn.functional.linear(leaves["x"].reshape(-1, W.shape[1]), W, leaves.get("b_enc"))
    return dict(zip(leaves, torch.autograd.grad(pre, list(leaves.values()), grad), strict=True))


def decode(inputs: Inputs) -> Tensor:
    """``codes.to_dense() @ W_dec + b_dec`` in float64, ``[n, d]``."""
    codes = inputs["codes"].detach().flatten().to(torch.float64)
    y = codes.to_dense() @ inputs["W_dec"].detach().to(torch.float64)
    return y if inputs["b_dec"] is None else y + inputs["b_dec"].detach().to(torch.float64)


def decode_grads(inputs: Inputs, grad: Tensor) -> dict[str, Tensor]:
    """Float64 autograd through the dense formula; `grad` ``[n, d]``."""
    codes = inputs["codes"].detach().flatten().to(torch.float64)
    leaves = {"values": codes.values.requires_grad_(), "W_dec": inputs["W_dec"].detach().double().requires_grad_()}
    y = SparseCodes(leaves["values"], codes.indices, codes.m, codes.offsets).to_dense() @ leaves["W_dec"]
    if inputs["b_dec"] is not None:
        leaves["b_dec"] = inputs["b_dec"].detach().double().requires_grad_()
        y = y + leaves["b_dec"]
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad.double()), strict=True))


def _losses(inputs: Inputs, codes: SparseCodes, W: Tensor, b: Tensor | None, target: Tensor) -> tuple[Tensor, ...]:
    """The dense statement of `decode_loss`: loss, sse ``[G]``, residual ``[n, d]``; codes flat, everything float64."""
    by_rank = inputs.get("nested") == "rank"
    key = torch.arange(codes.values.shape[1] if by_rank else codes.m, device=W.device)
    sse = []
    for prefix in inputs.get("prefixes") or [codes.m]:
        if by_rank:
            dense = SparseCodes(codes.values * (key < prefix), codes.indices, codes.m).to_dense()
        else:
            dense = codes.to_dense() * (key < prefix)
        residual = target - dense @ W - (0.0 if b is None else b)
        sse.append(residual.square().sum())
    sse = torch.stack(sse)
    weights = inputs.get("weights") or [1.0] * len(sse)
    return (sse * torch.tensor(weights, dtype=sse.dtype, device=sse.device)).sum(), sse, residual


def decode_loss(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, sse ``[G]`` and residual ``[n, d]`` of a `decode_loss` call in float64."""
    inputs = double(inputs)
    W, b, target = (inputs[name] for name in ("W_dec", "b_dec", "target"))
    return _losses(inputs, inputs["codes"].flatten(), W, b, target.reshape(-1, W.shape[1]))


def decode_loss_grads(inputs: Inputs, grad: float) -> dict[str, Tensor]:
    """Float64 autograd through the dense statement, for a gradient `grad` of the loss."""
    inputs = double(inputs)
    codes = inputs["codes"].flatten()
    leaves = {"values": codes.values.clone().requires_grad_()}
    leaves |= {name: inputs[name].requires_grad_() for name in ("W_dec", "b_dec", "target") if inputs[name] is not None}
    codes = SparseCodes(leaves["values"], codes.indices, codes.m, codes.offsets)
    W, target = leaves["W_dec"], leaves["target"]
    loss, *_ = _losses(inputs, codes, W, leaves.get("b_dec"), target.reshape(-1, W.shape[1]))
    return dict(zip(leaves, torch.autograd.grad(grad * loss, list(leaves.values())), strict=True))


def adam_rows(inputs: Inputs) -> dict[str, Tensor]:
    """One step of torch's own Adam, AdamW or SparseAdam in float64: param, exp_avg and exp_avg_sq afterwards."""
    inputs = double(inputs)
    param, grad = inputs["param"].clone(), inputs["grad"]
    masked = inputs.get("masked", False)
    touched = torch.ones(param.shape[0], dtype=torch.bool, device=param.device)
    if masked:
        touched = torch.zeros_like(touched).index_fill_(0, grad.coalesce().indices()[0], True)
    grad = grad.to_dense() if grad.is_sparse else grad
    if inputs.get("project"):
        square = (param * param).sum(1, keepdim=True)
        along = (grad * param).sum(1, keepdim=True) / square.where(square > 0, 1.0)
        grad = torch.where(square > 0, grad - along * param, grad)
    param.requires_grad_()
    options = {"lr": inputs["lr"], "betas": inputs.get("betas", (0.9, 0.999)), "eps": inputs.get("eps", 1e-8)}
    if masked:
        optimizer = torch.optim.SparseAdam([param], **options)
        rows = touched.nonzero().T
        param.grad = torch.sparse_coo_tensor(rows, grad[rows[0]], grad.shape, check_invariants=False)
    else:
        kind = torch.optim.AdamW if inputs.get("decoupled") else torch.optim.Adam
        optimizer = kind([param], weight_decay=inputs.get("weight_decay", 0.0), **options)
        param.grad = grad
    before = inputs["step"] - 1
    state = {name: inputs[name].clone() for name in ("exp_avg", "exp_avg_sq")}
    optimizer.state[param] = {"step": before if masked else torch.tensor(float(before)), **state}
    optimizer.step()
    after = param.detach()
    if inputs.get("renormalise"):
        length = after.norm(dim=1, keepdim=True)
        after = torch.where(touched[:, None] & (length > 0), after / length, after)
    return {"param": after, **state}
