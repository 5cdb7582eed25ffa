# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend: `fusae._cuda` on a GPU of compute capability 8.0 or newer."""

from __future__ import annotations

from . import decode, dense, encode, latents, optimiser, ragged, selection
from .native import by_name_only, unavailable

__all__ = ["TABLE", "by_name_only", "unavailable"]

TABLE: dict = {}

for _family in (selection, encode, ragged, decode, latents, dense, optimiser):
    TABLE |= _family.TABLE
