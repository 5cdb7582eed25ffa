# SPDX-License-Identifier: Apache-2.0
"""Run a model with other values at some sites: a module's output, or its input (``"name:in"``)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ..data import hooks


class Patcher:
    """Records a forward pass of a model at some sites, and repeats it with other hidden states there.

    Everything before the first site that can be named as whole blocks is computed once: in a repetition those blocks
    answer with what they gave the first time.

    Args:
        model: called with ids ``[batch, ctx]``.
        names: sites, ``"model.layers.11"`` (output) or ``"model.layers.11.mlp:in"`` (input).
    """

    def __init__(self, model: nn.Module, names: str | Sequence[str]) -> None:
        self.model = model
        self.sites = hooks.Sites.find(model, names)
        self._before = _earlier_blocks(model, [site["module"] for site in self.sites.described])
        self._outputs: dict[Any, Any] = {}
        self._widths: list[int] = []

    def _each(self) -> Iterator[tuple[str, nn.Module, bool]]:
        """(name, module, whether it is the module's input) of every site."""
        for name, module in zip(self.sites.names, self.sites.modules, strict=True):
            yield name, module, name.endswith(hooks.INPUT)

    @contextlib.contextmanager
    def recording(self, ids: Tensor) -> Iterator[list[Tensor]]:
        """A forward pass of `ids` inside leaves the hidden states ``[batch, ctx, d_i]`` of the sites in the list."""
        outputs: dict[Any, Any] = {}  # of a block; of a site's name
        caught: dict[str, Tensor] = {}

        # A module that runs more than once counts with its first run, as when activations are captured.
        def keep(name: str, value: Any) -> None:
            if name not in outputs:
                outputs[name] = value
                # What a later module changes in place is not what was here.
                caught[name] = hooks.hidden_of(value, ids, name).clone()

        def of_block(block: nn.Module) -> Callable:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                outputs.setdefault(block, output)

            return hook

        def after(name: str) -> Callable:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                keep(name, output)

            return hook

        def before(name: str) -> Callable:
            def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                keep(name, _input_of(args, kwargs))

            return hook

        hidden: list[Tensor] = []
        handles = [block.register_forward_hook(of_block(block)) for block in self._before]
        for name, module, is_input in self._each():
            if is_input:
                handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(after(name)))
        try:
            yield hidden
        finally:
            for handle in handles:
                handle.remove()
        for name, _, _ in self._each():
            if name not in caught:
                raise ValueError(f"module: {name!r} took no part in the forward pass of {type(self.model).__name__}")
            hidden.append(caught[name])
        self._outputs = outputs
        self._widths = [part.shape[-1] for part in hidden]

    @contextlib.contextmanager
    def replaced(self, hidden: Tensor) -> Iterator[None]:
        """A forward pass inside, of the ids recorded last, meets `hidden` ``[batch, ctx, Σ d]`` at the sites."""
        answers = {block: self._outputs[block] for block in self._before if block in self._outputs}
        handles = []
        for (name, module, is_input), part in zip(self._each(), hidden.split(self._widths, -1), strict=True):
            if is_input:
                handles.append(module.register_forward_pre_hook(_with_input(part), with_kwargs=True))
            else:
                answers[module] = hooks.with_hidden(self._outputs[name], part)
        had = {module: module.__dict__.get("forward") for module in answers}
        try:
            for module, output in answers.items():
                module.forward = lambda *_args, _output=output, **_kwargs: _output
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, forward in had.items():
                if forward is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.forward = forward


def _input_of(args: tuple, kwargs: dict[str, Any]) -> Any:
    """What a module works on: its first argument, or the one of `kwargs` that would be."""
    return args[0] if args else kwargs.get(_keyword(kwargs))


def _keyword(kwargs: dict[str, Any]) -> str | None:
    return "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs), None)


def _with_input(hidden: Tensor) -> Callable:
    def change(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (hooks.with_hidden(args[0], hidden), *args[1:]), kwargs
        name = _keyword(kwargs)
        return args, {**kwargs, name: hooks.with_hidden(kwargs[name], hidden)}

    return change


def _earlier_blocks(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The blocks of a stack (`nn.ModuleList`) before the first that holds a site; none where the sites share none."""
    places = set()
    for name in names:
        parts = name.split(".")
        for depth in range(1, len(parts)):
            parent = ".".join(parts[:depth])
            if isinstance(model.get_submodule(parent), nn.ModuleList):
                places.add((parent, int(parts[depth])))
                break
        else:
            return []
    if len({parent for parent, _ in places}) != 1:
        return []
    return list(model.get_submodule(next(iter(places))[0]))[: min(place for _, place in places)]
