# SPDX-License-Identifier: Apache-2.0
"""Tensors that are written when somebody needs them: what a tool's API hands out and hardly anybody reads.

Any use of a `Later` but the few that it can answer (its shape and the like) makes the tensor first and goes on with it,
also when it goes into a C++ operator. It is made once: an edit in place stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..codes import SparseCodes
from ._dense import dense_of


def coo_of(codes: SparseCodes, batch: torch.Size) -> Tensor:
    """Fixed-width codes as a coalesced ``torch.sparse_coo`` tensor of leading shape `batch`; differentiable."""
    codes = codes.flatten()
    indices, order = codes.indices.long().sort(-1)
    n, k = indices.shape
    rows = torch.arange(n, device=indices.device).repeat_interleave(k)
    places = torch.stack([*torch.unravel_index(rows, batch), indices.flatten()]) if len(batch) else indices
    return torch.sparse_coo_tensor(
        places, codes.values.gather(-1, order).flatten(), (*batch, codes.m), is_coalesced=True, check_invariants=False
    )


# Answered without the contents.
_PLAIN = {
    Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point, Tensor.__hash__, Tensor.__len__,
    Tensor.shape.__get__, Tensor.ndim.__get__, Tensor.dtype.__get__, Tensor.device.__get__,
}  # fmt: skip
_LAYOUT = {Tensor.layout.__get__, Tensor.is_sparse.__get__}


def refuse_gradient(*_: Any) -> None:
    raise RuntimeError(
        "this tensor was not part of the graph, so there is no gradient by it: fusae kept sparse codes instead. A hook "
        "on hook_sae_acts_post (for pre-activations: hook_sae_acts_pre) makes it part; .clone() is an ordinary tensor"
    )


class Later(Tensor):
    """A tensor of this shape, dtype and device that `make()` gives when it is needed.

    Derivatives by it are refused: the graph that led here does not run through it.
    """

    @staticmethod
    def __new__(cls, shape: torch.Size, dtype: torch.dtype, device: torch.device, make: Callable[[], Tensor]) -> Later:
        return cls._wrapper(shape, dtype, device)

    @classmethod
    def _wrapper(cls, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Later:
        # A torch.autograd.Function takes it as it is: what comes back from there must not be lost (`refuse_gradient`).
        graph = dtype.is_floating_point and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device, requires_grad=graph)

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device, make: Callable[[], Tensor]) -> None:
        self._make: Callable[[], Tensor] | None = make
        self._made: Tensor | None = None
        self._graph = torch.is_grad_enabled()
        with torch._C.DisableTorchFunctionSubclass():
            if self.requires_grad:
                self.register_hook(refuse_gradient)

    def __repr__(self, **given: Any) -> str:
        try:
            return repr(self.made)
        except RuntimeError as error:
            return f"{type(self).__name__}({list(self.shape)}: {error})"

    @property
    def made(self) -> Tensor:
        """The tensor itself."""
        if self._made is None:
            with torch.set_grad_enabled(self._graph):  # also where a torch.autograd.Function reads it first
                self._made, self._make = self._make(), None
        return self._made

    def answer(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """The result of `func`, of which this is the first argument, without the tensor; NotImplemented otherwise."""
        return NotImplemented

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        self = args[0] if args and isinstance(args[0], Later) else None
        if func in _LAYOUT and self is not None and self._made is not None:
            return func(self._made)
        if func is torch.autograd.grad or func is Tensor.retain_grad:
            refuse_gradient()
        if self is not None and self._made is None:
            result = self.answer(func, args, kwargs)
            if result is not NotImplemented:
                return result
        if func in _PLAIN or func in _LAYOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = tree_map(made, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        args, kwargs = tree_map(made, (args, kwargs or {}))
        return func(*args, **kwargs)


def made(value: Any) -> Any:
    return value.made if isinstance(value, Later) else value


class Activations(Later):
    """Dense ``[..., m]`` activations of which only the `codes` are there, until more is needed.

    Whether an entry is active and sums along one dimension are answered from the codes.

    Args:
        codes: the activations, over one row for each of `batch`.
        batch: leading shape.
        scale: ``[m]``; an activation is the value of its code times this.
        coo: pass for a ``torch.sparse_coo`` tensor, and become one.
    """

    @staticmethod
    def __new__(
        cls, codes: SparseCodes, batch: torch.Size, scale: Tensor | None = None, coo: bool = False
    ) -> Activations:
        return cls._wrapper((*batch, codes.m), codes.dtype, codes.device)

    def __init__(self, codes: SparseCodes, batch: torch.Size, scale: Tensor | None = None, coo: bool = False) -> None:
        write = coo_of if coo else dense_of
        super().__init__((*batch, codes.m), codes.dtype, codes.device, lambda: write(self.scaled(), batch))
        self.codes, self.batch, self.scale, self.coo = codes, batch, scale, coo

    @property
    def sparse(self) -> bool:
        """Whether the codes still say it all: nobody has made the tensor, which may have been edited since."""
        return self._made is None

    def scaled(self) -> SparseCodes:
        """The activations as codes."""
        codes = self.codes
        if self.scale is None:
            return codes
        values = codes.values * self.scale.index_select(0, codes.indices.flatten()).view(codes.values.shape)
        return SparseCodes(values, codes.indices, codes.m, codes.offsets)

    def _with(self, values: Tensor) -> Activations:
        return Activations(SparseCodes(values, self.codes.indices, self.codes.m, self.codes.offsets), self.batch)

    def answer(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        if func in _LAYOUT:
            layout = torch.sparse_coo if self.coo else torch.strided
            return layout if func == Tensor.layout.__get__ else self.coo
        if func is Tensor.bool or (func in (Tensor.gt, Tensor.__gt__) and args[1:] == (0,)):
            values = self.scaled().values
            return self._with(values.bool() if func is Tensor.bool else values > 0)
        if func is Tensor.float:
            return self._with(self.scaled().values.float())
        if func is Tensor.sum and len(self.batch) == 1:
            dim = args[1] if len(args) == 2 else kwargs.get("dim")
            if dim in (0, 1, -1, -2) and len(args) + len(kwargs) == 2 and not isinstance(dim, bool):
                return self._sum(by_latent=dim in (0, -2))
        return NotImplemented

    def _sum(self, by_latent: bool) -> Tensor:
        codes = self.scaled().flatten()
        values = codes.values if codes.dtype != torch.bool else codes.values.long()
        if by_latent:
            return values.new_zeros(codes.m).index_add(0, codes.indices.flatten(), values.flatten())
        if not codes.is_ragged:
            return values.sum(-1)
        n = codes.offsets.shape[0] - 1
        return values.new_zeros(n + 1).index_add(0, codes.row_ids(), values)[:n]  # unused storage has row n
