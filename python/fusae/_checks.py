# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the public functions. Every message names the argument, what was wanted and what came."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._fields import choice, number

if TYPE_CHECKING:
    from .codes import SparseCodes

__all__ = [
    "accumulator", "autocast", "auxiliary", "choice", "codes", "count", "dense", "encoder", "floating", "like",
    "matrix", "norms", "number", "row_gradient", "tensor", "vector",
]  # fmt: skip

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over tensors of `dtype` are taken."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    return value


def dense(name: str, value: object) -> Tensor:
    """A tensor with strides: not sparse, not in a layout of some library."""
    value = tensor(name, value)
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}; call .to_dense() first")
    return value


def floating(name: str, value: object) -> Tensor:
    value = dense(name, value)
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    return value


def like(name: str, value: Tensor, ref_name: str, ref: Tensor, *, dtype: bool = True) -> None:
    """Same device as `ref`, and (with `dtype`) the same dtype."""
    if value.device != ref.device:
        raise ValueError(f"{name} must be on {ref.device} like {ref_name}, got {value.device}")
    if dtype and value.dtype != ref.dtype:
        raise TypeError(f"{name} must have dtype {ref.dtype} like {ref_name}, got {value.dtype}")


def matrix(name: str, value: object, columns: int, columns_of: str) -> Tensor:
    """A weight ``[m, d]`` whose width d is that of another argument."""
    value = floating(name, value)
    if columns < 1:
        raise ValueError(f"{columns_of} must have at least one dimension (d >= 1), got d = {columns}")
    if value.ndim != 2 or value.shape[1] != columns:
        hint = " (transposed?)" if value.ndim == 2 and value.shape[0] == columns else ""
        raise ValueError(
            f"{name} must have shape [m, {columns}], row = latent, to match {columns_of}, got {list(value.shape)}{hint}"
        )
    if value.shape[0] < 1:
        raise ValueError(f"{name} must have at least one latent (row), got shape {list(value.shape)}")
    if not torch.compiler.is_compiling() and value.shape[0] >= 2**31:
        raise ValueError(f"{name} must have fewer than 2**31 latents (indices are int32), got {value.shape[0]}")
    return value


def vector(name: str, value: object, length: int, meaning: str) -> Tensor:
    value = dense(name, value)
    if value.ndim != 1 or value.shape[0] != length:
        raise ValueError(f"{name} must have shape [{length}] ({meaning}), got {list(value.shape)}")
    return value


def count(name: str, value: object, upper: int, upper_name: str, *, lower: int = 1) -> int:
    """An integer in ``[lower, upper]`` (symbolic sizes of torch.compile included)."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    if value < lower or value > upper:
        raise ValueError(f"{name} must be between {lower} and {upper_name} = {upper}, got {value}")
    return value


def codes(name: str, value: object) -> SparseCodes:
    from .codes import SparseCodes

    if not isinstance(value, SparseCodes):
        raise TypeError(f"{name} must be a fusae.SparseCodes, got {type(value).__name__}")
    return value


class _Cast(torch.autograd.Function):
    """A tensor in another dtype; a row-sparse gradient comes back row-sparse (through ``Tensor.to`` it cannot)."""

    @staticmethod
    def forward(tensor, dtype):
        return tensor.to(dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype), None


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under ``torch.autocast``, the tensors in the autocast dtype, as ``torch.nn.functional.linear`` takes them."""
    device = next(t.device.type for t in tensors if t is not None)
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    same = (None, torch.float64, dtype)
    return tuple(t if getattr(t, "dtype", None) in same else _Cast.apply(t, dtype) for t in tensors)


def encoder(x: object, W_enc: object, b_enc: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """x ``[..., d]``, W_enc ``[m, d]`` and b_enc ``[m]`` or None, in the autocast dtype."""
    x, W_enc = floating("x", x), dense("W_enc", W_enc)
    if x.ndim < 1:
        raise ValueError("x must have shape [..., d], got a scalar")
    x, W_enc, b_enc = autocast(x, W_enc, b_enc)
    W_enc = matrix("W_enc", W_enc, x.shape[-1], "x")
    like("W_enc", W_enc, "x", x)
    if b_enc is not None:
        vector("b_enc", b_enc, W_enc.shape[0], "one per latent")
        like("b_enc", b_enc, "x", x)
    return x, W_enc, b_enc


def norms(value: Tensor | None, m: int, x: Tensor) -> Tensor | None:
    """``[m]`` factors of scores, without a gradient, in the dtype of sums."""
    if value is None:
        return None
    vector("norms", value, m, "one per latent")
    like("norms", value, "x", x, dtype=False)
    return value.detach().to(accumulator(x.dtype))


def auxiliary(aux_mask: Tensor | None, k_aux: object, m: int, x: Tensor) -> int:
    """The width of an auxiliary selection among the latents where the ``[m]`` bool mask is true; 0 without a mask."""
    if aux_mask is None:
        if k_aux != 0:
            raise ValueError(f"k_aux must be 0 without aux_mask, got {k_aux}; pass the mask of latents to choose from")
        return 0
    vector("aux_mask", aux_mask, m, "one per latent")
    like("aux_mask", aux_mask, "x", x, dtype=False)
    if aux_mask.dtype != torch.bool:
        raise TypeError(f"aux_mask must be bool, got {aux_mask.dtype}")
    return count("k_aux", k_aux, m, "m")


def row_gradient(grad: Tensor) -> Tensor:
    """A sparse gradient with every row once, ascending; a dense one as it is.

    Autograd drops the mark of a coalesced gradient when it stores it in ``.grad``. Looking whether the rows ascend is
    far cheaper than sorting them and copying the values.
    """
    if grad.layout != torch.sparse_coo or grad.is_coalesced() or grad.sparse_dim() != 1:
        return grad
    rows = grad._indices()
    if (rows[0, 1:] > rows[0, :-1]).all():
        return torch.sparse_coo_tensor(rows, grad._values(), grad.shape, is_coalesced=True, check_invariants=False)
    return grad.coalesce()
