# SPDX-License-Identifier: Apache-2.0
"""The native CPU backend: torch's GEMM, our selection, gathers, sums by latent and optimiser (`fusae._C`)."""

from __future__ import annotations

import torch
from torch import Tensor

from .dense import codes_from_dense_bwd, codes_from_dense_fwd
from .latents import decode_bwd, decode_fwd, decode_loss_bwd, decode_loss_fwd, encode_bwd
from .native import describe, fma_burst, force_isa, isas, set_isa, unavailable
from .optimiser import adam_rows_
from .ragged import encode_batch_topk_fwd, encode_threshold_bwd, encode_threshold_fwd
from .selection import encode_topk_fwd, force_gemm, topk_bwd, topk_fwd

__all__ = ["TABLE", "describe", "fma_burst", "force_gemm", "force_isa", "isas", "set_isa", "unavailable"]


def _why_not(*args, **kwargs) -> str | None:
    for arg in (*args, *kwargs.values()):
        if not isinstance(arg, Tensor):
            continue
        if arg.device.type != "cpu":
            return f"a tensor is on {arg.device}"
        if arg.dtype == torch.float64:
            return "float64 is only on the reference"
    return None


TABLE = {
    run.__name__: (run, _why_not)
    for run in (
        topk_fwd, topk_bwd, encode_topk_fwd, encode_threshold_fwd, encode_threshold_bwd, encode_batch_topk_fwd,
        encode_bwd,
        decode_fwd, decode_bwd, decode_loss_fwd, decode_loss_bwd,
        codes_from_dense_fwd, codes_from_dense_bwd,
        adam_rows_,
    )
}  # fmt: skip
