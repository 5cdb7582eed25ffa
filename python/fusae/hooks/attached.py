# SPDX-License-Identifier: Apache-2.0
"""`Hook`: a dictionary attached to a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import _fields
from ..codes import SparseCodes
from ..data.hooks import with_hidden
from ..nn import CrossLayerTranscoder, SparseCoder
from . import site
from .edits import Edit, Edits, merge, rows_of_entries
from .passing import Last, decoded, forward
from .places import Call, Positions, parameter_names

MODES, PARTS = ("read", "error", "replace"), ("output", "input", "through")


class Hook:
    """What `fusae.hook` gives: edits to be made in the next forward passes, and what the last one held.

    Attributes:
        model, module, name, coder, mode, part: what is attached to what.
    """

    def __init__(
        self,
        model: nn.Module,
        module: str | nn.Module,
        coder: SparseCoder,
        mode: str = "error",
        *,
        part: str | None = None,
        detach_error: bool = False,
        requires_grad: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.model = model = getattr(model, "_orig_mod", model)  # of what torch.compile gave
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                f"model: a {type(model).__name__} has two sequences; pass the half that is meant (model.encoder, "
                "model.decoder, or as get_encoder() gives it)"
            )
        self.name, self.module = site.find(model, module)
        self.coder, config = coder, _checked(coder).config
        self.mode = _fields.choice("mode", mode, MODES)
        transcodes = config.output_width != config.d or config.d_out is not None
        self.part = _fields.choice("part", part or ("through" if transcodes else "output"), PARTS)
        if self.part != "through" and config.output_width != config.d and mode != "read":
            raise ValueError(
                f"part must be 'through' for a transcoder (d {config.d}, d_out {config.output_width}): from the "
                f"module's input to its output; got {part!r}"
            )
        self.detach_error = _fields.flag("detach_error", detach_error)
        self.requires_grad = _fields.flag("requires_grad", requires_grad)
        self._edits = Edits()
        self._last: Last | None = None
        self._calls: list[Call] = []  # the model's calls that are under way, the innermost last
        self._finished = Call()
        self._names = parameter_names(model)
        if self.part == "input":
            handle = self.module.register_forward_pre_hook(self._before, with_kwargs=True)
        else:
            handle = self.module.register_forward_hook(self._after, with_kwargs=True)
        self._handles = [
            handle,
            model.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._leave, always_call=True),  # last: the module may be the model
        ]
        for held in self._held():
            site.mark(held, 1)

    def _held(self) -> list[nn.Module]:
        return [self.module] if self.module is self.model else [self.module, self.model]

    def remove(self) -> None:
        """Detach; a second time it does nothing. What the last forward pass held can still be read."""
        if self._handles:
            for handle in self._handles:
                handle.remove()
            self._handles = []
            for held in self._held():
                site.mark(held, -1)

    def __enter__(self) -> Hook:
        if not self._handles:
            raise RuntimeError("this hook was removed; attach another with fusae.hook")
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = f"{len(self._edits)} edits" if self._handles else "removed"
        return f"Hook({self.name!r}, mode={self.mode!r}, part={self.part!r}, m={self.coder.config.m}, {state})"

    # --- edits --------------------------------------------------------------------------------------------------------

    def edit(
        self,
        latents: Any,
        *,
        value: float | Tensor | None = None,
        scale: float | Tensor | None = None,
        add: float | Tensor | None = None,
        low: float | Tensor | None = None,
        high: float | Tensor | None = None,
        positions: Positions = None,
    ) -> Hook:
        """Change the values of some latents in every forward pass from now on; also where they are off.

        A value v becomes `value`, or ``clamp(v · scale + add, low, high)`` of what is given. Edits apply one after the
        other. Values may come out negative.

        Args:
            latents: an int, a list, or an integer tensor ``[l]``; different from each other.
            value, scale, add, low, high: a number, or a tensor ``[l]``, or one that broadcasts to ``[batch, ctx, l]``.
                Cast to the dtype of the codes; gradients reach them.
            positions: which tokens. None: all. An int, a list or an integer tensor ``[p]``: positions in every
                sequence, in a tensor ``[batch, p]`` in each its own; a slice. They count from the first token that is
                not padding, on either side, and go on through the steps of ``model.generate``; negative ones count from
                the end of what there is so far, so that ``-1`` is the last token of each pass: the one that predicts
                the next. A bool tensor ``[batch, ctx]`` or ``[ctx]``: columns, padding included, from the first of the
                sequence; false past its end. Padding is never edited. In a model without tokens the last but one
                dimension of ``[..., d]`` is what positions count.

        Edits that may switch a latent on hold ``[n, l]`` values each pass, all others nothing of that size.

        Returns:
            The hook itself.
        """
        if self.mode == "read":
            raise ValueError("mode is 'read', which changes nothing; attach with mode 'error' or 'replace' to edit")
        options = {"value": value, "scale": scale, "add": add, "low": low, "high": high}
        device = self.coder.W_dec.device
        made = Edit.of(self.coder.config.m, device, latents, positions, options)
        self._edits = Edits([*self._edits.edits, made], device)
        return self

    def ablate(self, latents: Any, *, positions: Positions = None) -> Hook:
        """``edit(latents, value=0)``."""
        return self.edit(latents, value=0.0, positions=positions)

    def clear(self) -> Hook:
        """Forget all edits."""
        self._edits = Edits()
        return self

    # --- what the last forward pass held ------------------------------------------------------------------------------

    @property
    def input(self) -> Tensor:
        """The hidden states x ``[..., d]`` that were encoded, as the model had them."""
        return self._read().x

    @property
    def codes(self) -> SparseCodes:
        """Their codes before edits: ``[..., k]``, or ragged with the leading dimensions of x joined to rows."""
        return self._read().codes

    @property
    def edited(self) -> SparseCodes:
        """The codes after edits; `codes` where there were none, else ragged, without entries of value 0."""
        last = self._read()
        if last.rest is None:
            return last.codes
        return merge(last.rest, rows_of_entries(last.rest), last.columns, last.edits.latents)

    @property
    def reconstruction(self) -> Tensor:
        """``decode(codes)`` ``[..., d_out]`` before edits, in the dtype of the coder."""
        last = self._read()
        if last.reconstruction is None:
            last.reconstruction = decoded(self.coder, last.codes, last.x)
        return last.reconstruction

    @property
    def error(self) -> Tensor:
        """``y - reconstruction`` ``[..., d_out]``, y being the module's output for a transcoder and x else."""
        last = self._read()
        if last.error is None:
            last.error = last.y - self.reconstruction
        return last.error

    def _read(self) -> Last:
        if self._last is None:
            raise RuntimeError(f"no forward pass has come through {self.name or 'the model'!r} yet")
        return self._last

    # --- in the forward pass ------------------------------------------------------------------------------------------

    def _enter(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._calls.append(Call())  # first: `_leave` follows whatever is raised here
        self._calls[-1] = Call.of(self._names, args, kwargs)

    def _leave(self, *_: Any) -> None:
        if self._calls:
            self._finished = self._calls.pop()

    def _before(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        x = self._hidden(site.input_of(args, kwargs), self.coder.config.d, "input")
        y = self._run(x, x)
        return None if y is x else site.with_input(args, kwargs, y)

    def _after(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        config, y = self.coder.config, site.first_of(output)
        if self.part == "through":
            x = self._hidden(site.input_of(args, kwargs), config.d, "input")
            y = self._hidden(y, config.output_width, "output")
        else:
            x = y = self._hidden(y, config.d, "output")
        new = self._run(x, y)
        return None if new is y else with_hidden(output, new)

    def _hidden(self, hidden: Any, width: int, side: str) -> Tensor:
        fits = isinstance(hidden, Tensor) and hidden.is_floating_point() and hidden.ndim and hidden.shape[-1] == width
        if not fits:
            what = f"{list(hidden.shape)}, {hidden.dtype}" if isinstance(hidden, Tensor) else type(hidden).__name__
            raise ValueError(
                f"module: {self.name!r}: its {side} must hold hidden states [..., {width}], as wide as the coder; "
                f"got {what}"
            )
        device = self.coder.W_enc.device
        if hidden.device != device:
            raise ValueError(f"coder must be on {hidden.device} like {self.name!r}, got {device}; use coder.to")
        return hidden

    def _run(self, x: Tensor, y: Tensor) -> Tensor:
        if (
            not self._calls and torch._C._current_graph_task_id() != -1
        ):  # a checkpoint is computed again for its backward
            return forward(self, x, y, self._finished, self._edits)[0]
        out, self._last = forward(self, x, y, self._calls[-1] if self._calls else Call(), self._edits)
        return out


def _checked(coder: Any) -> SparseCoder:
    if isinstance(coder, CrossLayerTranscoder):
        raise ValueError(
            "coder: a cross-layer transcoder reads and writes several modules, a hook is for one; call its encode and "
            "decode in hooks of your own"
        )
    if not isinstance(coder, SparseCoder):
        hint = "; it holds several: choose one" if isinstance(coder, dict) else "; fusae.load reads one"
        raise TypeError(f"coder must be a fusae.nn.SparseCoder, got {type(coder).__name__}{hint}")
    if coder.config.sites is not None:
        raise ValueError(
            f"coder: a crosscoder's rows are joined from {len(coder.config.sites)} modules, a hook is for one; call "
            "its encode and decode in hooks of your own"
        )
    return coder
