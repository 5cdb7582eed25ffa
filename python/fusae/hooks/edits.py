# SPDX-License-Identifier: Apache-2.0
"""Edits of sparse codes: other values for some latents in some rows, without a matrix ``[n, m]``.

The latents that an edit may switch on are kept as columns ``[n, c]``, the c of all edits together; every other edit
changes the values of entries that are there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _fields
from ..codes import SparseCodes
from .places import Positions, check_positions

Number = float | Tensor
_OPTIONS = ("value", "scale", "add", "low", "high")


@dataclasses.dataclass(eq=False)
class Edit:
    """New values of some latents: `value`, or ``clamp(old · scale + add, low, high)``.

    Attributes:
        latents: int64 ``[l]``, ascending.
        options: those of the five that are given; tensors ``[..., l]`` in the order of `latents`, or single numbers.
        positions: where; None: everywhere.
        switches_on: whether the value of a latent that is off may change.
    """

    latents: Tensor
    options: dict[str, Number]
    positions: Positions
    switches_on: bool

    @classmethod
    def of(cls, m: int, device: torch.device, latents: Any, positions: Any, options: dict[str, Any]) -> Edit:
        """Checked. `options` may be None where they are not given."""
        options = {name: value for name, value in options.items() if value is not None}
        if not options:
            raise ValueError(f"edit needs one of {', '.join(_OPTIONS)}")
        if "value" in options and len(options) > 1:
            others = ", ".join(name for name in options if name != "value")
            raise ValueError(f"value sets a latent, so that {others} would have no effect; give one or the other")
        latents = _latents(latents, m, device)
        order = latents.argsort()
        for name, value in options.items():
            options[name] = _option(name, value, latents.shape[0], order)
        low, high = options.get("low"), options.get("high")
        if isinstance(low, float) and isinstance(high, float) and low > high:
            raise ValueError(f"low must be at most high, got {low} and {high}")
        return cls(latents[order], options, check_positions(positions), _moves_zero(options))

    @property
    def needs_grad(self) -> bool:
        return any(isinstance(value, Tensor) and value.requires_grad for value in self.options.values())

    def _formula(self, old: Tensor, get: Callable[[Number], Number]) -> Tensor:
        options = {name: get(value) for name, value in self.options.items()}
        if "value" in options:
            value = options["value"]
            return value.expand_as(old) if isinstance(value, Tensor) else torch.full_like(old, value)
        new = old
        if "scale" in options:
            new = new * options["scale"]
        if "add" in options:
            new = new + options["add"]
        if "low" in options:
            new = new.clamp(min=options["low"])
        if "high" in options:
            new = new.clamp(max=options["high"])
        return new

    def of_columns(self, old: Tensor, rows: Tensor | None, which: Tensor, lead: torch.Size) -> Tensor:
        """New values ``[n, c]`` of the latents number `which` (of this edit) for the old ones; `rows`: bool ``[n]``."""

        def get(value: Number) -> Number:
            if not isinstance(value, Tensor):
                return value
            value = value.to(old)
            if value.ndim > 1:
                value = self._by_row(value, lead)
            return value if value.ndim == 0 else value[..., which]

        new = self._formula(old, get)
        return new if rows is None else torch.where(rows[:, None], new, old)

    def of_entries(self, codes: SparseCodes, row: Tensor, rows: Tensor | None, lead: torch.Size) -> Tensor:
        """New values of flat codes. `row`: that of every entry, n for storage that is not in use."""
        slot, hit = find(self.latents, codes.indices)
        n = lead.numel()
        hit = hit & (row < n)
        inside = row.clamp(max=max(n - 1, 0))
        if rows is not None and n:
            hit = hit & rows[inside]

        def get(value: Number) -> Number:
            if not isinstance(value, Tensor) or value.ndim == 0:
                return value.to(codes.values) if isinstance(value, Tensor) else value
            value = value.to(codes.values)
            return value[slot] if value.ndim == 1 else self._by_row(value, lead)[inside, slot]

        return torch.where(hit, self._formula(codes.values, get), codes.values)

    def _by_row(self, value: Tensor, lead: torch.Size) -> Tensor:
        """``[n, l]`` of an option with leading dimensions."""
        try:
            return value.expand(*lead, value.shape[-1]).reshape(-1, value.shape[-1])
        except RuntimeError:
            raise ValueError(
                f"an edit's tensor must be of shape [l] or broadcast to {[*lead, self.latents.shape[0]]} (the hidden "
                f"states' leading dimensions, latents), got {list(value.shape)}"
            ) from None


class Edits:
    """All edits of a hook, in the order in which they apply, and the latents that are kept as columns."""

    def __init__(self, edits: Sequence[Edit] = (), device: torch.device | None = None) -> None:
        self.edits = tuple(edits)
        on = [edit.latents for edit in self.edits if edit.switches_on]
        self.latents = torch.cat(on).unique() if on else torch.empty(0, dtype=torch.int64, device=device)
        self.columns = self.latents.shape[0]
        # Of each edit: its latents among the columns (their places there and in the edit), and whether it has others.
        self._places = []
        for edit in self.edits:
            slot, hit = find(edit.latents, self.latents)
            place = hit.nonzero().flatten()
            self._places.append((place, slot[place], place.shape[0] < edit.latents.shape[0]))

    def __len__(self) -> int:
        return len(self.edits)

    @property
    def needs_grad(self) -> bool:
        return any(edit.needs_grad for edit in self.edits)

    def split(self, codes: SparseCodes, row: Tensor) -> tuple[SparseCodes, Tensor]:
        """Flat codes as (the same without the columns' latents, whose entries become 0; the columns ``[n, c]``)."""
        n = codes.batch_shape.numel()
        if not self.columns:
            return codes, codes.values.new_zeros(n, 0)
        slot, hit = find(self.latents, codes.indices)
        hit = hit & (row < n)
        place = torch.where(hit, row * self.columns + slot, n * self.columns)
        moved = torch.where(hit, codes.values, 0.0)
        columns = codes.values.new_zeros(n * self.columns + 1).index_add(0, place.flatten(), moved.flatten())
        rest = SparseCodes(torch.where(hit, 0.0, codes.values), codes.indices, codes.m, codes.offsets)
        return rest, columns[:-1].view(n, self.columns)

    def apply(
        self, rest: SparseCodes, columns: Tensor, row: Tensor, lead: torch.Size, rows_of: Callable
    ) -> tuple[SparseCodes, Tensor]:
        """What `split` gave, edited. `rows_of`: from positions to bool ``[n]`` or None."""
        for edit, (place, which, has_others) in zip(self.edits, self._places, strict=True):
            rows = rows_of(edit.positions)
            if place.shape[0]:
                new = edit.of_columns(columns[:, place], rows, which, lead)
                columns = columns.index_copy(1, place, new)
            if has_others:
                values = edit.of_entries(rest, row, rows, lead)
                rest = SparseCodes(values, rest.indices, rest.m, rest.offsets)
        return rest, columns

    def as_codes(self, columns: Tensor, m: int) -> SparseCodes:
        """Columns as codes ``[n, c]``."""
        return SparseCodes(columns, self.latents.to(torch.int32).expand(columns.shape).contiguous(), m)


def rows_of_entries(codes: SparseCodes) -> Tensor:
    """The row of every entry of flat codes: ``[n, 1]`` of fixed width, ``[nnz]`` of ragged codes (n: not in use)."""
    if codes.offsets is not None:
        return codes.row_ids()
    return torch.arange(codes.values.shape[0], device=codes.device)[:, None]


def merge(rest: SparseCodes, row: Tensor, columns: Tensor, latents: Tensor) -> SparseCodes:
    """Flat codes and columns of other latents as ragged codes; entries of value 0 are left out. Gradients flow."""
    n, m = columns.shape[0], rest.m
    row = row.expand(rest.values.shape).flatten()
    values = torch.cat([rest.values.flatten(), columns.flatten()])
    indices = torch.cat([rest.indices.flatten(), latents.to(torch.int32).expand(columns.shape).flatten()])
    rows = torch.cat([row, torch.arange(n, device=row.device).repeat_interleave(columns.shape[1])])
    order = (rows * m + indices).argsort()
    order = order[((values != 0) & (rows < n))[order]]
    offsets = torch.zeros(n + 1, dtype=torch.int64, device=row.device)
    offsets[1:] = torch.bincount(rows[order], minlength=n).cumsum(0)
    return SparseCodes(values[order], indices[order], m, offsets)


def find(latents: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Where `indices` are in `latents` (int64 ``[l]``, ascending): (place, whether they are there)."""
    if not latents.shape[0]:
        return torch.zeros_like(indices, dtype=torch.int64), torch.zeros_like(indices, dtype=torch.bool)
    slot = torch.searchsorted(latents, indices.long()).clamp(max=latents.shape[0] - 1)
    return slot, latents[slot] == indices


def _moves_zero(options: dict[str, Number]) -> bool:
    """Whether the new value for an old one of 0 may be another; without looking into tensors."""
    value, add, low, high = (options.get(name, 0.0) for name in ("value", "add", "low", "high"))
    if any(isinstance(given, Tensor) for given in (value, add, low, high)):
        return True
    return value != 0.0 or add != 0.0 or low > 0.0 or high < 0.0


def _latents(latents: Any, m: int, device: torch.device) -> Tensor:
    if isinstance(latents, Tensor):
        if latents.dtype == torch.bool or latents.is_floating_point() or latents.is_complex():
            raise TypeError(f"latents must be whole numbers, got a tensor of {latents.dtype}")
        found = latents.detach().to(device, torch.int64)
    else:
        whole = isinstance(latents, int) and not isinstance(latents, bool)
        if not whole and not isinstance(latents, list | tuple | range):
            raise TypeError(f"latents must be an int, a list of ints or an integer tensor, got {latents!r}")
        for latent in [latents] if whole else latents:
            _fields.whole("latents", latent, 0, m - 1)
        found = torch.tensor([latents] if whole else list(latents), dtype=torch.int64, device=device)
    found = found.reshape(-1) if found.ndim < 2 else found
    if found.ndim != 1 or not found.shape[0]:
        raise ValueError(f"latents must have shape [l] with at least one latent, got {list(found.shape)}")
    if int(found.min()) < 0 or int(found.max()) >= m:
        raise ValueError(f"latents must lie in 0..{m - 1}, got {int(found.min())} to {int(found.max())}")
    if found.unique().shape[0] != found.shape[0]:
        raise ValueError("latents must be different from each other")
    return found


def _option(name: str, value: Any, count: int, order: Tensor) -> Number:
    """A float, or a tensor whose last dimension is in the order of the sorted latents."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
        return float(value)
    if value.ndim == 0:
        return value
    if value.shape[-1] != count:
        raise ValueError(f"{name} must have shape [..., {count}], one for each latent, got {list(value.shape)}")
    return value[..., order.to(value.device)]
