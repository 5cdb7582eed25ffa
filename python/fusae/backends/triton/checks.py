# SPDX-License-Identifier: Apache-2.0
"""Checks of the contents of codes.

On the CPU (interpreted), where a look is cheap, as on every other backend. On a GPU it would stall the stream, so the
kernels take care: what does not fit a storage is left out, which the codes tell wherever the host reads their size, and
a latent outside the dictionary makes its row of a reconstruction NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.entries import Codes


def codes_of(values: Tensor, indices: Tensor, offsets: Tensor | None, m: int) -> Codes:
    codes = Codes.of(values, indices, offsets, m)
    if indices.device.type == "cpu":
        _check(codes)
    return codes


def _check(codes: Codes) -> None:
    used = codes.storage
    if codes.offsets is not None:
        used, offsets = int(codes.offsets[-1]), codes.offsets
        if int(offsets[0]) != 0 or used > codes.storage or bool((offsets[1:] < offsets[:-1]).any()):
            raise IndexError(
                f"offsets must rise from 0 to at most the storage of {codes.storage} entries, "
                f"got {int(offsets[0])} to {used}"
            )
    indices = codes.indices.view(-1)[:used]
    if used and (int(indices.min()) < 0 or int(indices.max()) >= codes.m):
        raise IndexError(f"indices must lie in [0, {codes.m}), got {int(indices.min())} to {int(indices.max())}")


def fits(offsets: Tensor, storage: int) -> None:
    """Raises if not all entries fit their storage: one host sync. In the capture of a CUDA graph nothing can be asked:
    what does not fit makes gradients NaN then."""
    if offsets.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return
    used = int(offsets[-1])
    if used > storage:
        raise IndexError(
            f"the codes have {used} entries and a storage of {storage}: a capacity was too small; "
            f"make them again with capacity >= {used}, or with None"
        )
