# SPDX-License-Identifier: Apache-2.0
"""Training steps of the forms of dictionaries, on fusae's ops and in plain torch with dense codes; see `workloads`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import decode, decode_loss, encode_batch_topk, encode_threshold, encode_topk
from ..optim import Adam
from .bench_inputs import Build, Call, Inputs
from .bench_steps import LR, SPARSITY, leaves_of, prime, squared_error, threshold_of, train_step

#: ``loss(x, W_enc, b_enc, W_dec, b_dec, k, backend)``
Loss = Callable[..., Tensor]
_DEAD, _AUX = 0.1, 1 / 32  # share of dead latents, coefficient of their loss


def step_of(loss: Loss, ours: bool, sparse_start: bool = False) -> Build:
    """A step on a loss. `sparse_start`: a bias at which about k latents of a row are active from the beginning."""

    def build(inputs: Inputs, k: int, backend: str) -> Call:
        leaves = leaves_of(inputs)
        if sparse_start:
            with torch.no_grad():
                leaves[1].sub_(threshold_of(inputs, k).to(leaves[1].dtype))
        optimizer = Adam(leaves, lr=LR, backend=backend) if ours else torch.optim.Adam(leaves, lr=LR, fused=True)
        prime(optimizer)
        return train_step(inputs, lambda x: loss(x, *leaves, k, backend), optimizer)

    return build


def _pre(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    return F.linear(x, W_enc, b_enc - W_enc @ b_dec)


def _error(codes, W_dec, b_dec, x, backend, **options) -> Tensor:
    return decode_loss(codes, W_dec, b_dec, x, sparse_grad=True, backend=backend, **options).loss / len(x)


def _scattered(pre: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    return torch.zeros_like(pre).scatter(1, indices, values)


def _batch_ours(x, W_enc, b_enc, W_dec, b_dec, k, backend):
    codes, _ = encode_batch_topk(x - b_dec, W_enc, b_enc, k, sparse_grad=True, backend=backend)
    return _error(codes, W_dec, b_dec, x, backend)


def _batch_torch(x, W_enc, b_enc, W_dec, b_dec, k, backend):
    pre = _pre(x, W_enc, b_enc, b_dec).relu()
    values, places = pre.flatten().topk(len(x) * k)
    f = torch.zeros_like(pre).flatten().scatter(0, places, values).view_as(pre)
    return squared_error(f @ W_dec + b_dec, x)


def _relu_ours(x, W_enc, b_enc, W_dec, b_dec, k, backend):
    codes = encode_threshold(x - b_dec, W_enc, b_enc, 0.0, sparse_grad=True, backend=backend)
    return _error(codes, W_dec, b_dec, x, backend) + SPARSITY * codes.values.sum() / len(x)


def _relu_torch(x, W_enc, b_enc, W_dec, b_dec, k, backend):
    f = _pre(x, W_enc, b_enc, b_dec).relu()
    return squared_error(f @ W_dec + b_dec, x) + SPARSITY * f.sum() / len(x)


def _abs_ours(x, W_enc, b_enc, W_dec, b_dec, k, backend):
    codes = encode_topk(x - b_dec, W_enc, b_enc, k, "none", "abs", sparse_grad=True, backend=backend)
    return _error(codes, W_dec, b_dec, x, backend)


def _abs_torch(x, W_enc, b_enc, W_dec, b_dec, k, backend):
    pre = _pre(x, W_enc, b_enc, b_dec)
    indices = pre.abs().topk(k).indices
    return squared_error(_scattered(pre, pre.gather(1, indices), indices) @ W_dec + b_dec, x)


def _groups_ours(x, W_enc, b_enc, W_dec, b_dec, k, backend):
    codes = encode_topk(x - b_dec, W_enc, b_enc, k, select="group_max", sparse_grad=True, backend=backend)
    return _error(codes, W_dec, b_dec, x, backend)


def _groups_torch(x, W_enc, b_enc, W_dec, b_dec, k, backend):
    pre = _pre(x, W_enc, b_enc, b_dec)
    values, places = pre.view(len(x), k, -1).max(-1)
    indices = places + torch.arange(k, device=x.device) * (pre.shape[1] // k)
    return squared_error(_scattered(pre, values.relu(), indices) @ W_dec + b_dec, x)


def _nested(k: int) -> list[int]:
    return sorted({max(1, k >> i) for i in range(4)})


def _ranks_ours(x, W_enc, b_enc, W_dec, b_dec, k, backend):
    codes = encode_topk(x - b_dec, W_enc, b_enc, k, sparse_grad=True, backend=backend)
    return _error(codes, W_dec, b_dec, x, backend, prefixes=_nested(k), nested="rank")


def _ranks_torch(x, W_enc, b_enc, W_dec, b_dec, k, backend):
    pre = _pre(x, W_enc, b_enc, b_dec)
    values, indices = pre.topk(k)
    made = (_scattered(pre, values[:, :p].relu(), indices[:, :p]) for p in _nested(k))
    return sum(squared_error(f @ W_dec + b_dec, x) for f in made)


def _dead(W: Tensor) -> Tensor:
    """``[m]`` bool, the same for all contenders."""
    drawn = torch.rand(len(W), generator=torch.Generator().manual_seed(0)) < _DEAD
    return drawn.to(W.device)


def _aux_ours(x, W_enc, b_enc, W_dec, b_dec, k, backend):
    codes, aux = encode_topk(
        x - b_dec, W_enc, b_enc, k, aux_mask=_dead(W_enc), k_aux=2 * k, sparse_grad=True, backend=backend
    )
    main = decode_loss(codes, W_dec, b_dec, x, sparse_grad=True, backend=backend)
    rest = main.residual.detach()
    y = decode(aux, W_dec, sparse_grad=True, backend=backend)
    return main.loss / len(x) + _AUX * squared_error(y, rest)


def _aux_torch(x, W_enc, b_enc, W_dec, b_dec, k, backend):
    pre = _pre(x, W_enc, b_enc, b_dec)
    values, indices = pre.topk(k)
    y = _scattered(pre, values.relu(), indices) @ W_dec + b_dec
    values, indices = pre.masked_fill(~_dead(W_enc), -torch.inf).topk(2 * k)
    aux = _scattered(pre, values.relu(), indices) @ W_dec
    return squared_error(y, x) + _AUX * squared_error(aux, (x - y).detach())


FORMS: dict[str, dict[str, Build]] = {
    f"{name}_step": {
        "plain torch": step_of(dense, False, name == "relu"),
        "fusae": step_of(sparse, True, name == "relu"),
    }
    for name, (sparse, dense) in {
        "batch_topk": (_batch_ours, _batch_torch),
        "relu": (_relu_ours, _relu_torch),
        "abs": (_abs_ours, _abs_torch),
        "group_max": (_groups_ours, _groups_torch),
        "hierarchical": (_ranks_ours, _ranks_torch),
        "auxk": (_aux_ours, _aux_torch),
    }.items()
}
