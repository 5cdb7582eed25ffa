# SPDX-License-Identifier: Apache-2.0
"""Sparse codes as the kernels take them.

On a GPU no one looks at their contents, which would stall the stream: the kernels take care. What does not fit a
storage is left out, which the codes tell wherever the host reads their size, and a latent outside the dictionary makes
its row of a reconstruction NaN. Emulated on the CPU they are checked as on every other backend.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .native import DTYPES, ptr


class Codes(NamedTuple):
    """``[n, width]``, or ragged with `offsets` ``[n + 1]``; all contiguous."""

    values: Tensor
    indices: Tensor
    offsets: Tensor | None
    m: int

    @classmethod
    def of(cls, values: Tensor, indices: Tensor, offsets: Tensor | None, m: int) -> Codes:
        codes = cls(values.contiguous(), indices.contiguous(), None if offsets is None else offsets.contiguous(), m)
        if indices.device.type == "cpu":
            codes._check()
        return codes

    @property
    def n(self) -> int:
        return self.indices.shape[0] if self.offsets is None else self.offsets.shape[0] - 1

    @property
    def storage(self) -> int:
        return self.indices.numel()

    def tuple(self) -> tuple[int, ...]:
        """As the bindings take them."""
        width = self.indices.shape[1] if self.offsets is None else 0
        return (*map(ptr, self[:3]), DTYPES[self.values.dtype], self.n, width, self.storage, self.m)

    def _check(self) -> None:
        used = self.storage
        if (offsets := self.offsets) is not None:
            used = int(offsets[-1])
            if int(offsets[0]) != 0 or used > self.storage or bool((offsets[1:] < offsets[:-1]).any()):
                raise IndexError(
                    f"offsets must rise from 0 to at most the storage of {self.storage} entries, "
                    f"got {int(offsets[0])} to {used}"
                )
        indices = self.indices.view(-1)[:used]
        if used and (int(indices.min()) < 0 or int(indices.max()) >= self.m):
            raise IndexError(f"indices must lie in [0, {self.m}), got {int(indices.min())} to {int(indices.max())}")


def fits(offsets: Tensor, storage: int) -> None:
    """Raises if not all entries fit their storage: one host sync. Nothing can be asked in the capture of a graph."""
    if offsets.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return
    used = int(offsets[-1])
    if used > storage:
        raise IndexError(
            f"the codes have {used} entries and a storage of {storage}: a capacity was too small; "
            f"make them again with capacity >= {used}, or with None"
        )
