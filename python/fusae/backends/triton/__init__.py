# SPDX-License-Identifier: Apache-2.0
"""The Triton backend: `fusae.kernels` on a GPU, or in Triton's interpreter (``TRITON_INTERPRET=1``) for tests."""

from __future__ import annotations

from .available import by_name_only, unavailable

__all__ = ["TABLE", "by_name_only", "unavailable"]

TABLE: dict = {}

if unavailable() is None:  # nothing of Triton is imported where it cannot run
    from . import decode, dense, latents, optimiser, selection

    for _family in (selection, decode, latents, dense, optimiser):
        TABLE |= _family.TABLE
