# SPDX-License-Identifier: Apache-2.0
"""The Triton backend: `fusae.kernels` on a GPU, or in Triton's interpreter (``TRITON_INTERPRET=1``) for tests."""

from __future__ import annotations

from .available import by_name_only, unavailable

__all__ = ["TABLE", "by_name_only", "unavailable"]

TABLE: dict = {}

if unavailable() is None:  # nothing of Triton is imported where it cannot run
    from . import decode, dense, encode, latents, optimiser, ragged, selection
    from .encode import force_encoder as force_encoder

    for _family in (selection, encode, ragged, decode, latents, dense, optimiser):
        TABLE |= _family.TABLE
