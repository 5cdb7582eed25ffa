# SPDX-License-Identifier: Apache-2.0
"""`fusae.hook`: a dictionary at a module of a model, to read what is there, to replace it and to edit it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from ..nn import SparseCoder
    from .attached import Hook

__all__ = ["hook"]


def hook(
    model: nn.Module,
    module: str | nn.Module,
    coder: SparseCoder,
    mode: str = "error",
    *,
    part: str | None = None,
    detach_error: bool = False,
    requires_grad: bool = False,
) -> Hook:
    """Attach `coder` to a module of `model` until `Hook.remove`, or for a ``with`` block::

        with fusae.hook(model, "model.layers.11", coder) as h:
            h.edit(17, add=4.0, positions=slice(5, None))
            logits = model(ids).logits
            h.codes                                # SparseCodes [batch, ctx, k]

    In every forward pass the hidden states x ``[..., d]`` there are encoded, and the model goes on with what `mode`
    says, of y = x (for a transcoder, y is the module's output and x its input):

    - "read": y. Nothing is changed, edits are refused.
    - "error": ``decode(edited codes) + error``, where ``error = y - decode(codes)``. It is computed as y plus the
      decoder rows of what was edited alone, so that without an edit it is y, bit for bit.
    - "replace": ``decode(edited codes)``.

    Args:
        model: a Hugging Face model or any module; call this one (or what was compiled of it). Its ``attention_mask``
            ``[batch, ctx]`` and ``past_key_values`` say what is padding and where the sequences start: `Hook.edit` has
            the rules. Padding is left as it is in every mode, and its codes are 0.
        module: name as in ``named_modules``, or the module itself. Its hidden states are the tensor, or the first entry
            of a tuple or of a `transformers` output.
        coder: a `fusae.nn.SparseCoder` of that width, on the same device (`fusae.load`); in another dtype than the
            hidden states, these are cast. Its parameters take part in gradients as those of any module:
            ``coder.requires_grad_(False)`` saves the gradients of the dictionary.
        mode: as above.
        part: the hidden states meant: the module's "output" (default) or "input"; "through": x is its input and y its
            output (default for coders with `d_out`, i.e. transcoders).
        detach_error: take the error as a constant: gradients reach x through the codes alone, as in SAELens. By
            default they are those of y itself where nothing is edited.
        requires_grad: `Hook.codes` and `Hook.error` get gradients even where nothing before them needs one (a frozen
            model and coder).

    Gradients reach x, ``h.codes.values``, tensors in edits and ``h.error``; the derivative by ``h.codes.values`` is
    that of ``decode(codes) + error`` with the error held, the derivative by ``h.error`` that of y.

    Raises:
        TypeError, ValueError: naming the argument. At a forward pass, also where there are no hidden states of the
            coder's width.
    """
    from .attached import Hook

    return Hook(model, module, coder, mode, part=part, detach_error=detach_error, requires_grad=requires_grad)
