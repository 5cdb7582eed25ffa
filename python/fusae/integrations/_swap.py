# SPDX-License-Identifier: Apache-2.0
"""Swap the heavy methods of another tool's models for fused ones, in place, and back.

An accelerated object keeps its identity, its parameters, its hooks and its ``__dict__``: only its class changes, to a
subclass of the tool's own that has the same name and, in front of it, the methods of an `Adapter`'s mixin. In a mixin
``super().method(...)`` is the tool's own. So a restored or pickled object is the tool's own again, bit for bit.

An adapter module ``fusae/integrations/<tool>.py`` is imported when the tool itself has been imported: nothing here
imports a tool.
"""

from __future__ import annotations

import copy
import copyreg
import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from torch import nn

GRADIENTS = ("correct", "tool")
# Top-level package of a tool: the adapter module here. Its `ADAPTERS` are `Adapter`s.
TOOLS = {
    "sae_lens": "saelens",
    "sparsify": "sparsify",
    "dictionary_learning": "dictionary_learning",
    "circuit_tracer": "circuit_tracer",
    "llamascopium": "llamascopium",
}

T = TypeVar("T")


class SwapError(TypeError):
    """Nothing in the model can be accelerated. The message says why, module by module."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """How to accelerate one class of a tool.

    Attributes:
        tool_class: the class, or one whose subclasses count too as long as they keep its methods `swapped`.
        mixin: a subclass of `Swapped` with the fused methods.
        swapped: names of the methods that the mixin replaces, the tool's own ones that they stand for included: a
            subclass of the tool's class that overrides one of these is left alone.
        why_not: reason to leave this object alone, or None. Judged once, at the swap; what can change afterwards
            (dtype, shapes, hooks) is judged in the methods at every call.
        differences: what gradients='correct' does otherwise than the tool, in words, for `describe`.
        prepare, undo: called on the object after its class was swapped and before it is swapped back.
    """

    tool_class: type
    mixin: type
    swapped: tuple[str, ...]
    why_not: Callable[[Any], str | None] = lambda module: None
    differences: tuple[str, ...] = ()
    prepare: Callable[[Any], None] = lambda module: None
    undo: Callable[[Any], None] = lambda module: None


class Swapped:
    """Base of the mixins. Copies are accelerated too; a pickle is one of the tool's own class."""

    _fusae_tool_class: type
    _fusae_gradients: str
    _fusae_adapter: Adapter

    @property
    def _fusae_correct(self) -> bool:
        return self._fusae_gradients == "correct"

    def __deepcopy__(self, memo: dict) -> Any:
        new = self._fusae_tool_class.__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __copy__(self) -> Any:
        new = self._fusae_tool_class.__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Not `copyreg.__newobj__`, whose class must be that of the object: what protocols 0 and 1 use does the same.
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__  # every object's in Python 3.11
        return copyreg._reconstructor, (self._fusae_tool_class, object, None), state


class SwappedGeneric(Generic[T]):
    """`Swapped` for mixins of plain ``typing.Generic`` classes, whose layout in memory Python wants to be the same."""

    _fusae_correct = Swapped._fusae_correct
    __deepcopy__, __copy__, __reduce_ex__ = Swapped.__deepcopy__, Swapped.__copy__, Swapped.__reduce_ex__


SWAPPED = (Swapped, SwappedGeneric)


_classes: dict[tuple[type, Adapter, str], type] = {}


def _swapped_class(tool_class: type, adapter: Adapter, gradients: str) -> type:
    key = (tool_class, adapter, gradients)
    if key not in _classes:
        _classes[key] = type(
            tool_class.__name__,
            (adapter.mixin, tool_class),
            {
                "__module__": tool_class.__module__,
                "__qualname__": tool_class.__qualname__,
                "__doc__": tool_class.__doc__,
                "_fusae_tool_class": tool_class,
                "_fusae_gradients": gradients,
                "_fusae_adapter": adapter,
            },
        )
    return _classes[key]


def _adapters() -> Iterator[Adapter]:
    for package, name in TOOLS.items():
        if package in sys.modules:
            yield from importlib.import_module(f"fusae.integrations.{name}").ADAPTERS


def _own_class(module: Any) -> type:
    return module._fusae_tool_class if isinstance(module, SWAPPED) else type(module)


def _overrides(cls: type, base: type, names: tuple[str, ...]) -> list[str]:
    """Methods of `base` that `cls`, a subclass of it, defines anew."""
    between = cls.__mro__[: cls.__mro__.index(base)]
    return [name for name in names if any(name in c.__dict__ for c in between)]


def _judge(module: Any) -> tuple[Adapter | None, str | None]:
    """(adapter, None) for what can be swapped; (None, reason) for what a tool owns and cannot; (None, None) else."""
    cls, reason = _own_class(module), None
    found = [a for a in _adapters() if issubclass(cls, a.tool_class)]
    for adapter in sorted(found, key=lambda a: cls.__mro__.index(a.tool_class)):  # the nearest class first
        changed = _overrides(cls, adapter.tool_class, adapter.swapped)
        why = f"{cls.__name__} overrides {', '.join(changed)}" if changed else adapter.why_not(module)
        if why is None:
            return adapter, None
        reason = reason or why
    return None, reason


def _held(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, (list, tuple)):
        yield from enumerate(value)
    else:
        yield "", value


def _parts(model: Any) -> Iterator[tuple[str, Any]]:
    """`model` and what it holds: modules at any depth; of another object (a trainer), what its attributes hold; of a
    list, tuple or dict, its items."""
    if isinstance(model, nn.Module):
        yield from model.named_modules()
        return
    yield "", model
    known = tuple(adapter.tool_class for adapter in _adapters())
    seen = {id(model)}
    holds = {"": model} if isinstance(model, (dict, list, tuple)) else getattr(model, "__dict__", {})
    for name, value in holds.items():
        for key, item in _held(value):
            prefix = name if key == "" else f"{name}.{key}".removeprefix(".")
            inner = item.named_modules(prefix=prefix) if isinstance(item, nn.Module) else [(prefix, item)]
            for path, part in inner if isinstance(item, (nn.Module, *known)) else ():
                if id(part) not in seen:
                    seen.add(id(part))
                    yield path, part


def accelerate(model: T, gradients: str = "correct") -> T:
    """Run a model of SAELens, sparsify, dictionary_learning, circuit-tracer or llamascopium on fusae, in place.

    Every dictionary that is or is inside `model` gets the fused encode, decode and training step. It stays the same
    object with the same parameters, ``state_dict``, hooks and ``isinstance``; weights may be edited, replaced or
    resized at any time, for nothing is packed or cached. Whatever is not supported is left as it is, and named by
    ``fusae.explain(model)``. A call that the fused kernels cannot serve exactly as the tool does (functorch transforms,
    forward-mode derivatives, a hook on the dense pre-activations) runs the tool's own code.

    Args:
        model: a dictionary, a ``torch.nn.Module`` that holds some at any depth, a tool's trainer, or a list, tuple or
            dict of those. Or a class of those, for a tool that makes its objects itself
            (``{"trainer": fusae.accelerate(TopKTrainer)}``).
        gradients: 'correct': gradients are those of the loss that the tool states, which mends known defects of some
            tools' own (``fusae.explain(model)`` lists them); 'tool': those of the tool, defects included.

    Returns:
        `model` itself. For a class, a subclass of it that makes accelerated objects of the class.

    Raises:
        SwapError: there is nothing that could be accelerated.

    Equivalent to: the same tool without this line, in less time and memory.
    """
    if gradients not in GRADIENTS:
        raise ValueError(f"gradients must be one of {', '.join(map(repr, GRADIENTS))}, got {gradients!r}")
    if isinstance(model, type):
        return _accelerating(model, gradients)
    found = [(part, *_judge(part)) for _, part in _parts(model)]
    if not any(adapter for _, adapter, _ in found):
        raise SwapError(f"model has nothing to accelerate: {describe(model)}")
    for part, adapter, _ in found:
        if adapter is not None:
            restore_one(part)
            part.__class__ = _swapped_class(type(part), adapter, gradients)
            adapter.prepare(part)
    return model


def _accelerating(cls: type, gradients: str) -> type:
    if not any(issubclass(cls, adapter.tool_class) for adapter in _adapters()):
        raise SwapError(f"{cls.__name__} is no dictionary or trainer of a supported tool ({', '.join(TOOLS)})")

    def make(_: type, *args: Any, **kwargs: Any) -> Any:
        return accelerate(cls(*args, **kwargs), gradients)

    body = {"__new__": make, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls)(cls.__name__, (cls,), body)


def restore(model: T) -> T:
    """Undo `accelerate`: every dictionary in `model` is of its tool's own class again. Returns `model`."""
    for _, part in _parts(model):
        restore_one(part)
    return model


def restore_one(part: Any) -> None:
    if isinstance(part, SWAPPED):
        part._fusae_adapter.undo(part)
        part.__class__ = part._fusae_tool_class


def describe(model: Any) -> str:
    """What `accelerate` has swapped or could swap in `model`, and why not the rest. ``fusae.explain(model)`` is this.

    Returns:
        One line for each part of `model` that a supported tool owns: its name and class, then ``on fusae: <methods>``,
        ``can run on fusae`` or ``left as it is: <reason>``; below it, where gradients differ from the tool's.
    """
    lines = []
    for name, part in _parts(model):
        adapter, reason = _judge(part)
        if adapter is None and reason is None:
            continue
        title = f"{name or '(model)'}: {_own_class(part).__name__}"
        if isinstance(part, SWAPPED):
            lines.append(f"{title} on fusae: {', '.join(adapter.swapped)} (gradients {part._fusae_gradients!r})")
            if part._fusae_correct:
                lines += [f"    unlike the tool: {difference}" for difference in adapter.differences]
        else:
            lines.append(f"{title} " + ("can run on fusae" if adapter else f"left as it is: {reason}"))
    if not lines:
        known = ", ".join(TOOLS)
        return f"{type(model).__name__} is or holds no dictionary of a supported tool ({known})"
    return "\n".join(lines)
