# SPDX-License-Identifier: Apache-2.0
"""The hidden states in what a module takes and gives, and a module's type while something is attached to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..data import hooks


def first_of(output: Any) -> Any:
    """The hidden states in an output: it, or its first entry."""
    if isinstance(output, Mapping):  # transformers' ModelOutput
        return next(iter(output.values()), None)
    return output[0] if isinstance(output, tuple | list) and output else output


def input_of(args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """The hidden states that a module is called with: its first argument, or `hidden_states` among keywords alone."""
    return first_of(args[0] if args else kwargs.get(_keyword(kwargs)))


def with_input(args: tuple, kwargs: dict[str, Any], hidden: Tensor) -> tuple[tuple, dict[str, Any]]:
    """The arguments with other hidden states."""
    if args:
        return (hooks.with_hidden(args[0], hidden), *args[1:]), kwargs
    name = _keyword(kwargs)
    return args, {**kwargs, name: hooks.with_hidden(kwargs[name], hidden)}


def _keyword(kwargs: Mapping[str, Any]) -> str | None:
    return "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs), None)


def find(model: nn.Module, module: str | nn.Module) -> tuple[str, nn.Module]:
    """Name and module. Raises `TypeError` or `ValueError`, with the nearest names."""
    if isinstance(module, str):
        if module.endswith(hooks.INPUT):
            raise ValueError(f"module: {module!r} names an input; pass {module.removesuffix(hooks.INPUT)!r} and "
                             "part='input'")  # fmt: skip
        return module, hooks.find_module(model, module)
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a name or a torch.nn.Module, got {type(module).__name__}")
    for name, found in model.named_modules():
        if found is module:
            return name, module
    raise ValueError(f"module: this {type(module).__name__} is no submodule of the {type(model).__name__}")


def mark(module: nn.Module, change: int) -> None:
    """Give `module` a type of its own for as long as something is attached to it.

    What torch.compile has made of a module takes no notice of hooks that come or go later, but it does of the type:
    with a new one it compiles anew, with the old one it goes on with what it had.
    """
    cls = type(module)
    base, count = getattr(cls, "_fusae_base", cls), getattr(cls, "_fusae_count", 0) + change
    if not count:
        module.__class__ = base
        return
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    module.__class__ = type(base.__name__, (base,), {**names, "_fusae_base": base, "_fusae_count": count})
