# SPDX-License-Identifier: Apache-2.0
"""Which latents have not fired for long."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _fields
from ..codes import SparseCodes


class DeadLatents:
    """Counts, for every latent, the tokens since it last fired. Never reads from the device.

    Fired means: value != 0. A latent that was selected with value 0 (padding of a row with fewer than k positives) has
    not fired. A latent is dead when it has not fired for `window` tokens.

    Attributes:
        tokens_since_fired: int64 ``[m]``.
        window: tokens.
    """

    def __init__(self, m: int, window: int, device: torch.device | str | None = None) -> None:
        _fields.whole("m", m, 1)
        self.window = _fields.whole("window", window, 1)
        self.tokens_since_fired = torch.zeros(m, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, codes: SparseCodes) -> None:
        """Count the rows of `codes` as tokens seen. Entries that did not fit a storage of `codes` have not fired."""
        m = self.tokens_since_fired.shape[0]
        if codes.m != m:
            raise ValueError(f"codes must be over {m} latents, got {codes.m}")
        active, latents = codes.values.reshape(-1) != 0, codes.indices.reshape(-1)
        if codes.offsets is not None:  # storage past offsets[-1] is not in use
            used = torch.arange(active.shape[0], device=active.device) < codes.offsets[-1]
            active, latents = active & used, torch.where(used, latents, 0)
        # A sum of integers: exact and the same in any order, unlike an assignment to repeated indices.
        fired = torch.zeros(m, dtype=torch.int32, device=active.device)
        fired.scatter_add_(0, latents.long(), active.to(torch.int32))
        self.tokens_since_fired += codes.batch_shape.numel()
        self.tokens_since_fired.masked_fill_(fired > 0, 0)

    def mask(self) -> Tensor:
        """bool ``[m]``: the latents that are dead."""
        return self.tokens_since_fired >= self.window
