# SPDX-License-Identifier: Apache-2.0
"""Where in a batch: which rows of the hidden states are padding, and which a choice of positions means."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Positions = int | slice | Sequence[int] | Tensor | None


@dataclasses.dataclass
class Call:
    """What one call of the model says of its batch.

    Attributes:
        shape: (batch, ctx) of the tokens in this call; None: not known.
        mask: bool ``[batch, earlier + ctx]``, true for tokens in use; None: all are.
        earlier: columns that came in earlier calls (a key-value cache).
    """

    shape: tuple[int, ...] | None = None
    mask: Tensor | None = None
    earlier: int = 0

    @classmethod
    def of(cls, names: Sequence[str], args: tuple, kwargs: Mapping[str, Any]) -> Call:
        """Of the arguments of a forward pass whose positional ones are called `names`."""
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        tokens = given.get("input_ids")
        if tokens is None:
            tokens = given.get("inputs_embeds")
        if tokens is None and args and isinstance(args[0], Tensor) and not args[0].is_floating_point():
            tokens = args[0]
        if not isinstance(tokens, Tensor) or tokens.ndim < 2:
            return cls()
        batch, ctx = tokens.shape[:2]
        mask, cache = given.get("attention_mask"), given.get("past_key_values")
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[0] == batch and mask.shape[1] >= ctx:
            return cls((batch, ctx), mask != 0, mask.shape[1] - ctx)
        if cache is None:
            return cls((batch, ctx))
        if not hasattr(cache, "get_seq_length"):
            raise ValueError(
                f"past_key_values: a {type(cache).__name__} does not say how long it is; pass an attention_mask "
                "[batch, past + new], or a transformers Cache"
            )
        return cls((batch, ctx), None, int(cache.get_seq_length()))

    def fits(self, lead: torch.Size) -> bool:
        return self.shape is not None and tuple(lead[:2]) == self.shape

    def lead_of(self, lead: torch.Size) -> torch.Size:
        """The leading dimensions of hidden states: ``[batch · ctx, d]`` count as ``[batch, ctx, d]``."""
        joined = self.shape is not None and len(lead) == 1 and lead[0] == self.shape[0] * self.shape[1]
        return torch.Size(self.shape) if joined else lead

    def used(self, lead: torch.Size) -> Tensor | None:
        """Bool ``[n]`` of the rows of hidden states ``[*lead, d]``: false for padding. None: no row is padding."""
        if self.mask is None or not self.fits(lead):
            return None
        return _rows(self.mask[:, self.earlier :], lead)

    def chosen(self, positions: Positions, lead: torch.Size, device: torch.device) -> Tensor | None:
        """Bool ``[n]`` of the rows that `positions` mean, padding left out. None: all rows."""
        used = self.used(lead)
        if positions is None:
            return used
        call = self if self.fits(lead) else Call()
        base = lead[:2] if len(lead) > 1 else torch.Size([1, *lead]) if lead else torch.Size([1, 1])
        if isinstance(positions, Tensor) and positions.dtype == torch.bool:
            chosen = _of_mask(positions.to(device), base, call.earlier)
        else:
            chosen = call._of_numbers(positions, base, device)
        chosen = _rows(chosen.expand(base), lead)
        return chosen if used is None else chosen & used

    def _of_numbers(self, positions: Any, base: torch.Size, device: torch.device) -> Tensor:
        """Positions of the tokens in use, counted from the first of each sequence."""
        if self.mask is None:
            place = self.earlier + torch.arange(base[1], device=device)[None]
            length = torch.full((1, 1), self.earlier + base[1], device=device)
        else:
            place, length = (self.mask.cumsum(1) - 1)[:, self.earlier :], self.mask.sum(1, keepdim=True)
        if isinstance(positions, slice):
            step = 1 if positions.step is None else positions.step
            start = 0 if positions.start is None else positions.start
            start = start if start >= 0 else (length + start).clamp(min=0)
            chosen = (place >= start) & ((place - start) % step == 0)
            stop = positions.stop
            return chosen if stop is None else chosen & (place < (stop if stop >= 0 else length + stop))
        wanted = positions.to(device) if isinstance(positions, Tensor) else torch.tensor(positions, device=device)
        wanted = wanted.reshape(1, -1) if wanted.ndim < 2 else wanted
        if wanted.shape[0] not in (1, base[0]):
            raise ValueError(f"positions must have a row for each of the {base[0]} sequences, got {wanted.shape[0]}")
        wanted = torch.where(wanted < 0, wanted + length, wanted)
        return (place[..., None] == wanted[:, None]).any(-1)


def check_positions(positions: Any) -> Positions:
    """`positions` as `Call.chosen` takes them; raises `TypeError` or `ValueError`."""
    wanted = "an int, a list of ints, a slice, an integer tensor [p] or [batch, p], or a bool tensor"
    if positions is None or (isinstance(positions, int) and not isinstance(positions, bool)):
        return positions
    if isinstance(positions, slice):
        parts = (positions.start, positions.stop, positions.step)
        if not all(part is None or (isinstance(part, int) and not isinstance(part, bool)) for part in parts):
            raise TypeError(f"positions must be a slice of whole numbers, got {positions}")
        if positions.step is not None and positions.step < 1:
            raise ValueError(f"positions must have a step of at least 1, got {positions}")
        return positions
    if isinstance(positions, Tensor):
        if positions.is_floating_point() or positions.is_complex():
            raise TypeError(f"positions must be {wanted}, got a tensor of {positions.dtype}")
        if positions.ndim > 2:
            raise ValueError(f"positions must have one or two dimensions, got shape {list(positions.shape)}")
        return positions
    if isinstance(positions, range):
        positions = list(positions)
    if isinstance(positions, list | tuple) and all(isinstance(p, int) and not isinstance(p, bool) for p in positions):
        return torch.tensor(positions, dtype=torch.int64)
    raise TypeError(f"positions must be {wanted}, got {type(positions).__name__} {positions!r}")


def parameter_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the positional arguments of a model's forward."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds)


def _of_mask(mask: Tensor, base: torch.Size, earlier: int) -> Tensor:
    """The columns of this call of a mask whose columns are those of the whole sequence; past its end: false."""
    mask = mask[None] if mask.ndim < 2 else mask
    if mask.shape[0] not in (1, base[0]) or (not earlier and mask.shape[1] < base[1]):
        raise ValueError(
            f"positions must be a mask of shape {list(base)}, one for each token, got {list(mask.shape)} (generating "
            "several sequences repeats the batch)"
        )
    mask = mask[:, earlier : earlier + base[1]]
    return nn.functional.pad(mask, (0, base[1] - mask.shape[1]))


def _rows(mask: Tensor, lead: torch.Size) -> Tensor:
    """A mask ``[batch, ctx]`` for every row of ``[*lead, d]``."""
    if len(lead) > 2:
        mask = mask[(...,) + (None,) * (len(lead) - 2)].expand(lead)
    return mask.reshape(-1)
