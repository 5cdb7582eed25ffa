# SPDX-License-Identifier: Apache-2.0
"""Reach into a torch module by name: run a model over token chunks up to submodules, and take what is there.

Works with any module whose input or output is a tensor ``[batch, ctx, d]`` or a tuple that starts with one (blocks of
Hugging Face models).
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .tokens import TokenChunks

INPUT = ":in"  # what ends the name of a site that is a module's input

_POSITION_TABLES = ("wpe", "position_embeddings", "embed_positions")
_NO_MASK = (
    "chunks: they differ in length, but the forward of {} takes no attention_mask; use chunks of one length "
    "(tokenize with tails=False)"
)


def find_module(model: nn.Module, name: str) -> nn.Module:
    """The submodule called `name` (as in `named_modules`). Raises `ValueError` with the nearest names."""
    modules = dict(model.named_modules())
    modules.pop("", None)
    if name in modules:
        return modules[name]
    near = difflib.get_close_matches(name, modules, n=3, cutoff=0.4)
    hint = f"; close: {', '.join(near)}" if near else ""
    raise ValueError(f"module: {type(model).__name__} has no submodule {name!r}{hint}")


@dataclasses.dataclass(eq=False)
class Sites:
    """Places in a model whose rows are captured: outputs or inputs of named modules.

    Attributes:
        names: as given: ``"model.layers.11"`` is that module's output, ``"model.layers.11.mlp:in"`` its input.
        modules: the modules, in the same order.
        widths: the width d_i of each, known after the first run.
    """

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    widths: tuple[int, ...] | None = None

    @classmethod
    def find(cls, model: nn.Module, names: str | Sequence[str]) -> Sites:
        """The sites of `model` called `names` (one or several); raises `ValueError` with the nearest module names."""
        names = (names,) if isinstance(names, str) else tuple(names)
        if not names or not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
            raise ValueError(f"module: name one or several different sites, got {list(names)}")
        return cls(names, tuple(find_module(model, name.removesuffix(INPUT)) for name in names))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def described(self) -> list[dict[str, Any]]:
        """``[{"module": name, "side": "in" or "out", "width": d_i}]``, plain values."""
        return [
            {"module": name.removesuffix(INPUT), "side": "in" if name.endswith(INPUT) else "out", "width": width}
            for name, width in zip(self.names, self.widths or [None] * len(self), strict=True)
        ]


class _Reached(Exception):
    """Raised by the last hook to leave the forward pass; never seen by a caller."""


def run_to(model: nn.Module, sites: Sites, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The rows ``[batch, ctx, Σ d_i]`` at `sites` for token ids ``[batch, ctx]``; what follows them is not computed.

    One forward pass. Several sites are side by side in the order of `sites.names`. A module that runs more than once
    in a pass counts with its first run.

    Args:
        attention_mask: ``[batch, ctx]``, true for tokens in use, which come first (padding is on the right, so the
            model's own count of positions is right for them); None where all are in use.

    Raises `ValueError` if a site takes no part in the forward pass, has no hidden states, or a mask is given to a model
    whose forward takes none.
    """
    options = forward_options(model, attention_mask)
    caught: dict[int, Tensor] = {}

    def catch(place: int, value: Any) -> None:
        if place in caught:
            return
        hidden = hidden_of(value, ids, sites.names[place])
        # What a later module changes in place is not what was here.
        caught[place] = hidden if len(sites) == 1 else hidden.clone()
        if len(caught) == len(sites):
            raise _Reached

    def before(_module: nn.Module, args: tuple, kwargs: dict[str, Any], *, place: int) -> None:
        catch(place, _input_of(args, kwargs))

    def after(_module: nn.Module, _args: tuple, output: Any, *, place: int) -> None:
        catch(place, output)

    handles = []
    for place, (name, module) in enumerate(zip(sites.names, sites.modules, strict=True)):
        if name.endswith(INPUT):
            handles.append(module.register_forward_pre_hook(functools.partial(before, place=place), with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(functools.partial(after, place=place)))
    try:
        model(ids, **options)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    absent = [name for place, name in enumerate(sites.names) if place not in caught]
    if absent:
        raise ValueError(f"module: {', '.join(absent)} took no part in the forward pass of {type(model).__name__}")
    parts = [caught[place] for place in range(len(sites))]
    sites.widths = tuple(part.shape[-1] for part in parts)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _input_of(args: tuple, kwargs: dict[str, Any]) -> Any:
    """What a module works on: its first argument, or `hidden_states` where it is called with keywords alone."""
    if args:
        return args[0]
    return kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(kwargs.values()), None)


def hidden_of(output: Any, ids: Tensor, name: str = "") -> Tensor:
    """The hidden states ``[batch, ctx, d]`` in a module's input or output for `ids`.

    They are the tensor itself or the first entry of a tuple or of a `transformers` output; ``[batch · ctx, d]`` is
    viewed as three axes. Raises `ValueError` if there are none; `name` is for its message.
    """
    hidden = _first(output)
    if isinstance(hidden, Tensor) and hidden.ndim == 2 and hidden.shape[0] == ids.numel():
        hidden = hidden.view(*ids.shape, hidden.shape[-1])
    if (
        not isinstance(hidden, Tensor)
        or not hidden.is_floating_point()
        or hidden.ndim != 3
        or hidden.shape[:2] != ids.shape
    ):
        what = f"shape {list(hidden.shape)}, {hidden.dtype}" if isinstance(hidden, Tensor) else type(hidden).__name__
        side = "input" if name.endswith(INPUT) else "output"
        raise ValueError(
            f"module: {f'{name!r}: ' if name else ''}its {side} must hold hidden states [batch, ctx, d], here "
            f"[{ids.shape[0]}, {ids.shape[1]}, d], got {what}"
        )
    return hidden


def _first(output: Any) -> Any:
    if isinstance(output, Mapping):  # transformers' ModelOutput
        return next(iter(output.values()), None)
    return output[0] if isinstance(output, tuple | list) and output else output


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """`output` with its hidden states exchanged for `hidden`."""
    if isinstance(output, Mapping):
        changed = copy.copy(output)
        changed[next(iter(output))] = hidden
        return changed
    if isinstance(output, tuple | list):
        make = getattr(type(output), "_make", type(output))  # of a named tuple
        return make((hidden, *output[1:]))
    return hidden.view(output.shape)


def takes_mask(model: nn.Module) -> bool:
    """Whether the forward of `model` has an argument ``attention_mask``."""
    return "attention_mask" in _parameters(model)


def forward_options(model: nn.Module, attention_mask: Tensor | None = None) -> dict[str, Any]:
    """Keywords for a forward pass over chunks: the mask, and no key-value cache where the model has one.

    Raises `ValueError` for a mask that `model` cannot take.
    """
    options: dict[str, Any] = {}
    if hasattr(getattr(model, "config", None), "use_cache") and any(
        name == "use_cache" or parameter.kind is parameter.VAR_KEYWORD for name, parameter in _parameters(model).items()
    ):
        options["use_cache"] = False
    if attention_mask is not None:
        if not takes_mask(model):
            raise ValueError(_NO_MASK.format(type(model).__name__))
        options["attention_mask"] = attention_mask.long()
    return options


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(getattr(model, "_orig_mod", model).forward).parameters


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


def batch_of(chunks: TokenChunks, index: slice | np.ndarray, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Some chunks as a batch: ids ``[batch, longest]`` int64, and their bool mask, or None where all are of a length.

    Cut to the longest of them: what is padding in all is not computed.
    """
    part = chunks[index]
    longest = int(part.lengths.max())
    ids = torch.from_numpy(part.ids[:, :longest].astype(np.int64)).to(device)
    if int(part.lengths.min()) == longest:
        return ids, None
    mask = torch.from_numpy(np.arange(longest) < part.lengths[:, None])
    return ids, mask.to(device)


def check_chunks(chunks: Any, model: nn.Module) -> TokenChunks:
    """`chunks` (`TokenChunks`, or an integer array or tensor ``[chunks, ctx]``) as `TokenChunks` that `model` can run.

    Raises `TypeError` or `ValueError` for something else, ids that the model does not have, chunks longer than its
    positions, or chunks of different lengths for a model that takes no attention mask.
    """
    chunks = TokenChunks.of(chunks)
    vocabulary = getattr(text_config(model), "vocab_size", None)
    low, high = int(chunks.ids.min()), int(chunks.ids.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise ValueError(f"chunks hold ids {low} to {high}, the model's vocabulary has {vocabulary} tokens from 0 on")
    positions, longest = positions_of(model), int(chunks.lengths.max())
    if positions is not None and longest > positions:
        raise ValueError(f"chunks are {longest} tokens long, {type(model).__name__} has {positions} positions")
    if int(chunks.lengths.min()) < longest and not takes_mask(model):
        raise ValueError(_NO_MASK.format(type(model).__name__))
    return chunks


def positions_of(model: nn.Module) -> int | None:
    """The most tokens a chunk may have: positions that `model` was made for; None if it does not say.

    Of learned positions some models keep the first for padding (OPT, RoBERTa): these do not count.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITION_TABLES:
            padding = -1 if module.padding_idx is None else module.padding_idx
            return module.num_embeddings - getattr(module, "offset", padding + 1)
    positions = getattr(text_config(model), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def text_config(model: nn.Module) -> Any:
    """The config of a `transformers` model, of a model of text and more the one of its text part; None without."""
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def check_row_options(ctx: int, skip_positions: int, outlier_factor: float | None) -> None:
    if not 0 <= skip_positions < ctx:
        raise ValueError(f"skip_positions must lie in 0..{ctx - 1} (ctx is {ctx}), got {skip_positions}")
    if outlier_factor is not None and not (outlier_factor > 1.0 and np.isfinite(outlier_factor)):
        raise ValueError(f"outlier_factor must be finite and above 1, or None, got {outlier_factor}")


def is_special(ids: Tensor, special: Sequence[int]) -> Tensor:
    """Bool, the shape of `ids`: which of them are among `special`, e.g. `TokenChunks.special`."""
    return torch.isin(ids, torch.tensor(special, dtype=ids.dtype, device=ids.device))
