# SPDX-License-Identifier: Apache-2.0
"""Selections of given pre-activations."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import topk as kernels
from .available import table


def topk_fwd(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values = pre.new_empty(pre.shape[0], k)
    indices = torch.empty(pre.shape[0], k, dtype=torch.int32, device=pre.device)
    # Values apart from their keys: a key does not tell -0.0 from +0.0.
    kernels.select_dense(pre, k, kernels.Columns(), values, indices, side=True)
    return values, indices


TABLE = table(topk_fwd)
