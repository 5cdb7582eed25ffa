# SPDX-License-Identifier: Apache-2.0
"""Encoders: one pass with a sample and certificates, or pieces of ``[n, m]``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ...kernels import encode_chunked as chunked
from ...kernels import encode_plan as plan
from ...kernels.encode_tile import Operands
from ...kernels.encode_topk import select_fused
from ...kernels.topk import Columns
from .available import table

_way = "auto"


@contextlib.contextmanager
def force_encoder(name: str) -> Iterator[None]:
    """Encode by the 'fused' pass where it is possible at all, or 'chunked', in a ``with`` block. For tests and
    measurements: other threads of the process change with it."""
    global _way
    if name not in ("auto", "fused", "chunked"):
        raise ValueError(f"encoder must be 'auto', 'fused' or 'chunked', got {name!r}")
    before, _way = _way, name
    try:
        yield
    finally:
        _way = before


def way() -> str:
    """What `force_encoder` asks for, or 'auto'."""
    return _way


def auxiliary(x: Tensor, mask: Tensor | None, k_aux: int) -> tuple | None:
    """The second selection: k_aux, mask as bytes, values, indices, the unmasked latents to fill up with; its codes."""
    values = x.new_empty(len(x), k_aux)
    indices = torch.empty(len(x), k_aux, dtype=torch.int32, device=x.device)
    if k_aux == 0:
        return None, values, indices
    mask = mask.contiguous().view(torch.uint8)
    fill = torch.sort(mask, stable=True).indices[:k_aux].to(torch.int32)
    return (k_aux, mask, values, indices, fill), values, indices


def encode_topk_fwd(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    norms: Tensor | None,
    aux_mask: Tensor | None,
    k: int,
    k_aux: int,
    activation: str,
    select: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, m, relu = len(x), len(W_enc), activation == "relu"
    values, indices = x.new_empty(n, k), torch.empty(n, k, dtype=torch.int32, device=x.device)
    aux, aux_values, aux_indices = auxiliary(x, aux_mask, k_aux if aux_mask is not None else 0)
    if n > 0:
        operands = Operands(x, W_enc, b_enc, norms, select == "abs")
        width = operands.tiles.BN
        if plan.fused(n, m, k, k_aux, select, width, _way):
            main, second = plan.sample(m, k, width), aux and plan.sample(m, k_aux, width)
            for part in plan.row_pieces(n, [main, second] if aux else [main], operands.side):
                rest = aux and (k_aux, second, aux[1], aux[4], (aux_values[part], aux_indices[part]))
                select_fused(operands.rows(part), k, main, (values[part], indices[part]), relu, rest)
        else:
            columns = Columns(operands.bias, operands.norms, None, select == "abs")
            if select == "group_max":
                chunked.group_max(operands.x, W_enc, columns, k, relu, values, indices)
                selections = []
            else:
                selections = [(k, None, values, indices, None)]
            if selections or aux:
                chunked.select_chunked(operands.x, W_enc, columns, relu, *selections, *([aux] if aux else []))
    return values, indices, aux_values, aux_indices


TABLE = table(encode_topk_fwd)
