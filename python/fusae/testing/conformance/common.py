# SPDX-License-Identifier: Apache-2.0
"""What the checks of several ops share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..compare import assert_equal
from ..patterns import LAYOUTS


def grad_like(t: Tensor, layout: str, gen: torch.Generator) -> Tensor:
    return LAYOUTS[layout](torch.randn(t.shape, generator=gen).to(t.dtype).to(t.device))


def check_row_sparse(sparse: Tensor, dense: Tensor, coef: Tensor, latents: Tensor) -> None:
    """A row-sparse gradient holds the dense one, its rows ascending, exactly those with a non-zero coefficient."""
    if sparse.layout != torch.sparse_coo or not sparse.is_coalesced():
        raise AssertionError(f"a coalesced sparse_coo gradient wanted, got {sparse.layout}")
    wanted = torch.unique(latents[coef != 0]).long()
    assert_equal(sparse.indices()[0], wanted, "rows of the sparse gradient")
    assert_equal(sparse.values(), dense[wanted], "values of the sparse gradient")
