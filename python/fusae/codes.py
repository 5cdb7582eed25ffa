# SPDX-License-Identifier: Apache-2.0
"""`SparseCodes`: the few active latents of every row, in fixed-width or ragged form."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class SparseCodes:
    """Active latents of `n` rows over a dictionary of `m` latents.

    Fixed width (``offsets is None``): `values` ``[..., k]`` and `indices` ``[..., k]`` int32; a row with fewer than k
    active latents is filled with distinct inactive ones of value 0. Ragged (CSR): `values` ``[nnz]``, `indices`
    ``[nnz]`` int32 and `offsets` ``[n + 1]`` int64; the storage may be longer than ``offsets[-1]``, which is the truth.

    Latents are distinct within a row. Gradients flow through `values`.
    """

    values: Tensor
    indices: Tensor
    m: int
    offsets: Tensor | None = None

    def __post_init__(self) -> None:
        values, indices, offsets = self.values, self.indices, self.offsets
        for name in ("values", "indices", "offsets"):
            part = getattr(self, name)
            if part is None and name == "offsets":
                continue
            if not isinstance(part, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(part).__name__}")
            if part.layout != torch.strided:
                raise TypeError(f"{name} must be a dense tensor, got layout {part.layout}; call .to_dense() first")
            if part.device != values.device:
                raise ValueError(f"{name} must be on {values.device} like values, got {part.device}")
        if isinstance(self.m, bool) or not isinstance(self.m, (int, torch.SymInt)):
            raise TypeError(f"m must be an int, got {type(self.m).__name__} {self.m!r}")
        if self.m < 1 or self.m >= 2**31:
            raise ValueError(f"m must be between 1 and 2**31 - 1 (indices are int32), got {self.m}")
        if indices.dtype != torch.int32:
            raise TypeError(f"indices must be int32, got {indices.dtype}")
        if values.shape != indices.shape:
            raise ValueError(
                f"values and indices must have the same shape, got {list(values.shape)} and {list(indices.shape)}"
            )
        if offsets is None:
            if values.ndim < 1:
                raise ValueError("values must have shape [..., k], got a scalar")
        else:
            if values.ndim != 1:
                raise ValueError(f"values of ragged codes must have shape [nnz], got {list(values.shape)}")
            if offsets.dtype != torch.int64 or offsets.ndim != 1 or offsets.shape[0] < 1:
                raise ValueError(
                    f"offsets must have shape [n + 1] and dtype int64, got {list(offsets.shape)} {offsets.dtype}"
                )

    @property
    def is_ragged(self) -> bool:
        return self.offsets is not None

    @property
    def batch_shape(self) -> torch.Size:
        """The leading dimensions: those of `values` without k, or ``[n]`` for ragged codes."""
        if self.offsets is None:
            return self.values.shape[:-1]
        return torch.Size([self.offsets.shape[0] - 1])

    @property
    def shape(self) -> torch.Size:
        """The shape of the dense equivalent, ``[..., m]``."""
        return torch.Size([*self.batch_shape, self.m])

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def l0(self) -> Tensor:
        """Number of active (non-zero) latents of every row, int64, shape `batch_shape`. Not read by the host: of codes
        that did not fit their storage, the entries that did are counted."""
        if self.offsets is None:
            return (self.values != 0).sum(-1)
        active = (self.values != 0).to(torch.int64)
        total = torch.cat([active.new_zeros(1), active.cumsum(0)])
        return total[self.offsets.clamp(max=self.values.shape[0])].diff()

    def row_ids(self) -> Tensor:
        """Row of every stored entry of ragged codes, int64 ``[nnz]``; entries past ``offsets[-1]`` get row n."""
        if self.offsets is None:
            raise ValueError("row_ids is for ragged codes; fixed-width codes keep one row of values per row")
        position = torch.arange(self.values.shape[0], device=self.device)
        return torch.searchsorted(self.offsets[1:].contiguous(), position, right=True)

    def _used(self) -> int:
        """``offsets[-1]`` of ragged codes (one host sync on a GPU), which may say that entries did not fit."""
        used, storage = int(self.offsets[-1]), self.values.shape[0]
        if used > storage:
            raise IndexError(
                f"the codes have {used} entries and a storage of {storage}: a capacity was too small; "
                f"make them again with capacity >= {used}, or with None"
            )
        return used

    def to_dense(self) -> Tensor:
        """The dense ``[..., m]`` activations, in the dtype of `values`. Differentiable.

        Equivalent to: ``torch.zeros(*batch, m).scatter_add_(-1, indices, values)``
        """
        if self.offsets is None:
            dense = self.values.new_zeros(self.shape)
            return dense.scatter_add(-1, self.indices.long(), self.values)
        n = self.offsets.shape[0] - 1
        used = self._used()
        dense = self.values.new_zeros(n, self.m)
        place = (self.row_ids()[:used], self.indices[:used].long())
        return dense.index_put(place, self.values[:used], accumulate=True)

    def to_sparse_csr(self) -> Tensor:
        """A ``torch.sparse_csr`` tensor ``[n, m]`` of the non-zero entries, latents ascending in every row."""
        ragged = self.flatten().to_ragged()
        n, used = len(ragged), ragged._used()
        active = ragged.values[:used] != 0
        rows, latents = ragged.row_ids()[:used][active], ragged.indices[:used][active].long()
        order = torch.argsort(rows * self.m + latents)
        starts = torch.zeros(n + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(torch.bincount(rows, minlength=n), 0, out=starts[1:])
        values = ragged.values[:used][active][order]
        return torch.sparse_csr_tensor(starts, latents[order], values, size=(n, self.m), check_invariants=False)

    def flatten(self) -> SparseCodes:
        """The same codes with the leading dimensions of a fixed-width form joined into one."""
        if self.offsets is not None or self.values.ndim == 2:
            return self
        k = self.values.shape[-1]
        n = self.values.numel() // k if k else self.batch_shape.numel()
        return SparseCodes(self.values.reshape(n, k), self.indices.reshape(n, k), self.m)

    def to_ragged(self) -> SparseCodes:
        """The ragged form with the zero-valued padding dropped; ragged codes as they are. Reads the count of entries
        (one host sync on a GPU)."""
        if self.offsets is not None:
            return self
        flat = self.flatten()
        active = flat.values != 0
        offsets = torch.zeros(flat.values.shape[0] + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(active.sum(-1), 0, out=offsets[1:])
        return SparseCodes(flat.values[active], flat.indices[active], self.m, offsets)

    @staticmethod
    def from_dense(dense: Tensor) -> SparseCodes:
        """``fusae.codes_from_dense(dense)``: ragged codes of the non-zero entries of ``[n, m]`` activations."""
        from .ops import codes_from_dense

        return codes_from_dense(dense)

    def detach(self) -> SparseCodes:
        return SparseCodes(self.values.detach(), self.indices, self.m, self.offsets)

    def to(self, *args: object, **kwargs: object) -> SparseCodes:
        """Move to a device and / or cast the values, as ``torch.Tensor.to``; indices and offsets keep their dtype."""
        values = self.values.to(*args, **kwargs)
        offsets = None if self.offsets is None else self.offsets.to(values.device)
        return SparseCodes(values, self.indices.to(values.device), self.m, offsets)

    def __len__(self) -> int:
        return self.batch_shape[0]

    def __getitem__(self, rows: int | slice | Tensor) -> SparseCodes:
        """Codes of some rows (along the first dimension): a slice, a tensor of row numbers or a boolean mask ``[n]``.

        An int takes the first dimension away, as for a tensor: from ragged codes it gives the fixed-width codes of that
        one row, as wide as the row (reads the row's place: one host sync on a GPU).
        """
        if isinstance(rows, bool) or not isinstance(rows, (int, torch.SymInt, slice, Tensor)):
            raise TypeError(f"rows must be an int, a slice or a tensor of rows, got {rows!r}")
        if isinstance(rows, Tensor) and rows.ndim != 1:
            raise ValueError(f"rows must have one dimension, got shape {list(rows.shape)}")
        if self.offsets is None:
            return SparseCodes(self.values[rows], self.indices[rows], self.m)
        self._used()
        n = self.offsets.shape[0] - 1
        chosen = torch.arange(n, device=self.device)[rows]
        if chosen.ndim == 0:
            place = slice(*self.offsets[chosen : chosen + 2].tolist())
            return SparseCodes(self.values[place], self.indices[place], self.m)
        start, width = self.offsets[chosen], self.offsets[chosen + 1] - self.offsets[chosen]
        offsets = torch.zeros(chosen.shape[0] + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(width, 0, out=offsets[1:])
        shift = torch.repeat_interleave(start - offsets[:-1], width)
        place = torch.arange(shift.shape[0], device=self.device) + shift
        return SparseCodes(self.values[place], self.indices[place], self.m, offsets)

    def __repr__(self) -> str:
        form = f"ragged, storage {self.values.shape[0]}" if self.is_ragged else f"k={self.values.shape[-1]}"
        return f"SparseCodes({list(self.shape)}, {form}, {self.dtype}, {self.device})"
