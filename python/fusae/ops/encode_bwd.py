# SPDX-License-Identifier: Apache-2.0
"""`encode_bwd`: the gradient of selected pre-activations, shared by every encode op. Private."""

from __future__ import annotations

import torch

from .. import _dispatch


def _fake(grad_pre, indices, offsets, x, W_enc, need_x, need_W, need_b, row_sparse, backend=None):
    m, d = W_enc.shape
    u = torch.library.get_ctx().new_dynamic_size() if need_W and row_sparse else 0
    grad_W = W_enc.new_empty((u, d) if row_sparse else (m, d)) if need_W else x.new_empty(0)
    return (
        x.new_empty(x.shape if need_x else 0),
        indices.new_empty(u, dtype=torch.int64),
        grad_W,
        W_enc.new_empty(m if need_b else 0),
    )


_dispatch.define(
    "encode_bwd(Tensor grad_pre, Tensor indices, Tensor? offsets, Tensor x, Tensor W_enc, bool need_x, bool need_W, "
    "bool need_b, bool row_sparse, *, str? backend=None) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
