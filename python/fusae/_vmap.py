# SPDX-License-Identifier: Apache-2.0
"""How the raw ops run under ``torch.vmap``: a batch of rows is more rows; anything else, one call per element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def rule(op: Callable[..., Any], rows: tuple[str, ...]) -> Callable[..., Any]:
    """The batching rule of a raw op for ``torch.library.register_vmap``.

    `rows` names the arguments ``[n, ...]`` whose rows the op treats one by one, if all results are ``[n, ...]`` too.
    """
    names = [argument.name for argument in op._schema.arguments]

    def batched(info: Any, in_dims: tuple, *args: Any, **kwargs: Any) -> tuple[tuple | Tensor, tuple | int]:
        given = dict(zip(names, args, strict=False))
        if op._schema.is_mutable:
            raise RuntimeError(f"{op._opname} works in place and has no vmap rule; call it once for each matrix")
        if given.get("row_sparse"):
            raise RuntimeError("row-sparse gradients differ in size, so vmap cannot stack them; use sparse_grad=False")
        in_dims = [None if isinstance(at, (list, tuple)) else at for at in in_dims]  # a list of numbers
        args = [a if at is None else a.movedim(at, 0) for a, at in zip(args, in_dims, strict=True)]
        over = [i for i, at in enumerate(in_dims) if at is not None]
        foldable = [i for i, name in enumerate(names) if name in rows and given.get("offsets") is None]
        if set(over) <= set(foldable):
            for i in foldable:
                args[i] = args[i] if i in over else args[i].expand(info.batch_size, *args[i].shape)
            n = args[foldable[0]].shape[1]
            for i in foldable:
                args[i] = args[i].flatten(0, 1)
            out = op(*args, **kwargs)
            if isinstance(out, Tensor):
                return out.unflatten(0, (info.batch_size, n)), 0
            return tuple(part.unflatten(0, (info.batch_size, n)) for part in out), (0,) * len(out)
        if info.batch_size == 0:
            raise RuntimeError(f"vmap of {op._opname} over {[names[i] for i in over]} needs at least one element")
        calls = [op(*(a[b] if i in over else a for i, a in enumerate(args)), **kwargs) for b in range(info.batch_size)]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        if any(part.shape != first.shape for call in calls for part, first in zip(call, calls[0], strict=True)):
            raise RuntimeError(
                f"the results of {op._opname} differ in size from one element to the next, so vmap cannot stack them; "
                "give a capacity, a storage of the same size for all"
            )
        return tuple(map(torch.stack, zip(*calls, strict=True))), (0,) * len(calls[0])

    return batched
