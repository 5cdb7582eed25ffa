# SPDX-License-Identifier: Apache-2.0
"""The reference as a backend: every op, every device, every dtype."""

from __future__ import annotations

from .. import reference


def unavailable() -> str | None:
    return None


def _always(*args, **kwargs) -> str | None:
    return None


TABLE = {
    name: (getattr(reference, name), _always)
    for name in (
        "topk_fwd", "topk_bwd", "encode_topk_fwd", "encode_threshold_fwd", "encode_threshold_bwd",
        "encode_batch_topk_fwd", "encode_bwd",
        "decode_fwd", "decode_bwd", "decode_loss_fwd", "decode_loss_bwd",
        "codes_from_dense_fwd", "codes_from_dense_bwd",
        "adam_rows_",
    )
}  # fmt: skip
