# SPDX-License-Identifier: Apache-2.0
"""What stands beside fusae in the benchmarks of single ops: the same in plain torch, with the same arguments."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import reference
from ..codes import SparseCodes
from .bench_calls import Function
from .bench_inputs import select
from .bench_steps import bag


def torch_topk(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return tuple(torch.topk(pre, k))


def threshold(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    pre = F.linear(x, W_enc, b_enc)
    above = pre > threshold
    rows, latents = above.nonzero(as_tuple=True)
    return pre[rows, latents], latents, F.pad(above.sum(1).cumsum(0), (1, 0))


def batch_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pre = F.linear(x, W_enc, b_enc)
    values, places = pre.relu().flatten().topk(len(x) * k)
    order = places[values > 0].sort().values
    rows, latents = order // pre.shape[1], order % pre.shape[1]
    offsets = F.pad(torch.bincount(rows, minlength=len(x)).cumsum(0), (1, 0))
    return pre.flatten()[order], latents, offsets, values[values > 0].min()


def embedding_bag(codes: SparseCodes, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    return bag(codes.values, codes.indices, W_dec, b_dec)


def dense_of(codes: SparseCodes) -> Tensor:
    zeros = codes.values.new_zeros(len(codes.values), codes.m)
    return zeros.scatter(1, codes.indices.long(), codes.values)


def dense_decode(codes: SparseCodes, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    return torch.addmm(b_dec, dense_of(codes), W_dec)


def _squared(y: Tensor, x: Tensor) -> Tensor:
    return (y - x).to(reference.accumulator(x.dtype)).square().sum()


def bag_loss(codes: SparseCodes, W_dec: Tensor, b_dec: Tensor, target: Tensor) -> Tensor:
    return _squared(embedding_bag(codes, W_dec, b_dec), target)


def dense_losses(codes: SparseCodes, W_dec: Tensor, b_dec: Tensor, target: Tensor, prefixes: list[int]) -> Tensor:
    f = dense_of(codes)
    return sum(_squared(f[:, :p] @ W_dec[:p] + b_dec, target) for p in prefixes)


def nonzero(f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, latents = f.nonzero(as_tuple=True)
    return f[rows, latents], latents.to(torch.int32), F.pad((f != 0).sum(1).cumsum(0), (1, 0))


#: op -> contender -> a function with the arguments of the op
PLAIN: dict[str, dict[str, Function]] = {
    "topk": {"torch.topk": torch_topk},
    "encode_topk": {"torch mm + topk": select},
    "encode_threshold": {"torch mm + nonzero": threshold},
    "encode_batch_topk": {"torch mm + topk": batch_topk},
    "encode_topk_bwd": {"torch mm + topk": select},
    "decode": {"embedding_bag": embedding_bag, "dense matmul": dense_decode},
    "decode_bwd": {"embedding_bag": embedding_bag, "dense matmul": dense_decode},
    "decode_loss": {"embedding_bag": bag_loss},
    "decode_loss_prefixes": {"dense matmuls": dense_losses},
    "codes_from_dense": {"torch nonzero": nonzero},
}
