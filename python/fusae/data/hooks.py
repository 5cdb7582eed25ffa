# SPDX-License-Identifier: Apache-2.0
"""Reach into a torch module by name: run a model up to a submodule, and say which of its output rows to use.

Works with any module whose output is a tensor ``[batch, ctx, d]`` or a tuple that starts with one (blocks of Hugging
Face models).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def find_module(model: nn.Module, name: str) -> nn.Module:
    """The submodule called `name` (as in `named_modules`). Raises `ValueError` with the nearest names."""
    modules = dict(model.named_modules())
    modules.pop("", None)
    if name in modules:
        return modules[name]
    near = difflib.get_close_matches(name, modules, n=3, cutoff=0.4)
    hint = f"; close: {', '.join(near)}" if near else ""
    raise ValueError(f"module: {type(model).__name__} has no submodule {name!r}{hint}")


class _Reached(Exception):
    """Raised by the hook to leave the forward pass; never seen by a caller."""


def run_to(model: nn.Module, module: nn.Module, ids: Tensor) -> Tensor:
    """The output ``[batch, ctx, d]`` of `module` for token ids ``[batch, ctx]``; what follows it is not computed."""
    caught: list[Any] = []

    def stop(_module: nn.Module, _args: Any, output: Any) -> None:
        caught.append(output)
        raise _Reached

    handle = module.register_forward_hook(stop)
    try:
        model(ids, **forward_options(model))
    except _Reached:
        pass
    finally:
        handle.remove()
    if not caught:
        raise ValueError(f"module: {type(module).__name__} took no part in the forward pass of {type(model).__name__}")
    return hidden_of(caught[0], ids)


def hidden_of(output: Any, ids: Tensor) -> Tensor:
    """The hidden states ``[batch, ctx, d]`` in a module's output for `ids`. Raises `ValueError` if there are none."""
    hidden = output[0] if isinstance(output, tuple) and output else output
    if (
        not isinstance(hidden, Tensor)
        or not hidden.is_floating_point()
        or hidden.ndim != 3
        or hidden.shape[:2] != ids.shape
    ):
        what = f"shape {list(hidden.shape)}, {hidden.dtype}" if isinstance(hidden, Tensor) else type(hidden).__name__
        raise ValueError(
            f"module: its output must hold hidden states [batch, ctx, d], here [{ids.shape[0]}, {ids.shape[1]}, d], "
            f"got {what}"
        )
    return hidden


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """`output` with its hidden states exchanged for `hidden`."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def forward_options(model: nn.Module) -> dict[str, Any]:
    """Keywords for a forward pass over whole chunks: no key-value cache, where the model has one."""
    return {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode (no dropout) and `torch.inference_mode` inside; the mode of every submodule is put back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def ids_of(chunks: np.ndarray, start: int, stop: int, device: torch.device) -> Tensor:
    return torch.from_numpy(np.asarray(chunks[start:stop]).astype(np.int64)).to(device)


def check_chunks(chunks: Any, model: nn.Module) -> np.ndarray:
    """`chunks` as an integer array ``[chunks, ctx]`` of ids that `model` has; raises `TypeError` or `ValueError`."""
    if isinstance(chunks, Tensor):
        chunks = chunks.cpu().numpy()
    if not isinstance(chunks, np.ndarray) or not np.issubdtype(chunks.dtype, np.integer):
        what = f"dtype {chunks.dtype}" if isinstance(chunks, np.ndarray) else type(chunks).__name__
        raise TypeError(f"chunks must be an integer array of token ids [chunks, ctx], got {what}")
    if chunks.ndim != 2 or 0 in chunks.shape:
        raise ValueError(f"chunks must have shape [chunks, ctx] with at least one chunk, got {list(chunks.shape)}")
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    low, high = int(chunks.min()), int(chunks.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise ValueError(f"chunks hold ids {low} to {high}, the model's vocabulary has {vocabulary} tokens from 0 on")
    return chunks


def check_row_options(ctx: int, skip_positions: int, outlier_factor: float | None) -> None:
    if not 0 <= skip_positions < ctx:
        raise ValueError(f"skip_positions must lie in 0..{ctx - 1} (ctx is {ctx}), got {skip_positions}")
    if outlier_factor is not None and not (outlier_factor > 1.0 and np.isfinite(outlier_factor)):
        raise ValueError(f"outlier_factor must be finite and above 1, or None, got {outlier_factor}")


def norm_limit_of(hidden: Tensor, skip_positions: int, outlier_factor: float | None) -> float | None:
    """`outlier_factor` times the median norm of the rows of ``[batch, ctx, d]`` from position `skip_positions` on.

    Attention sinks have norms some hundred times the usual one: a single such row decides any squared error.
    """
    if outlier_factor is None:
        return None
    limit = float(outlier_factor * hidden[:, skip_positions:].float().norm(dim=-1).median())
    if not np.isfinite(limit):
        raise ValueError("model: its activations are not finite; a lower precision than it was made for?")
    return limit


def rows_to_use(hidden: Tensor, skip_positions: int, norm_limit: float | None) -> Tensor:
    """Bool ``[batch, ctx]``: position at least `skip_positions` and norm at most `norm_limit` (a NaN row is kept)."""
    use = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    use[:, :skip_positions] = False
    if norm_limit is not None:
        use &= ~(hidden.float().norm(dim=-1) > norm_limit)
    return use
