# SPDX-License-Identifier: Apache-2.0
"""Small coders of every kind with random weights, for tests of the modules and of their losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..nn import SparseCoder, SparseCoderConfig
from ..nn.objectives import BatchTopK, Gated, HierarchicalTopK, JumpReLU, Matryoshka, ReLU, TopK

D, M, K = 6, 20, 4

# What a coder is, beside the way it selects: fields of its configuration.
CROSSCODER = {"sites": (2, 4), "pre_bias": False}
SHAPES = {
    "autoencoder": {},
    "without pre_bias": {"pre_bias": False},
    "transcoder": {"d_out": 5, "pre_bias": False},
    "skip transcoder": {"d_out": 5, "pre_bias": False, "skip": True},
    "crosscoder": CROSSCODER,
}
# Every way to select: fields of the configuration, and the loss that trains it.
KINDS = {
    "topk": ({"k_aux": 5}, TopK(multi_topk=0.125)),
    "topk by norm": ({"k_aux": 5, "select_by_norm": True}, TopK()),
    "hierarchical": ({"k_aux": 5}, HierarchicalTopK()),
    "abs": ({"k_aux": 5, "select": "abs", "activation": "none"}, TopK()),
    "group_max": ({"k_aux": 5, "select": "group_max"}, TopK()),
    "batch_topk": ({"k_aux": 5, "select": "batch_topk"}, BatchTopK()),
    "batch_topk by norm": ({"k_aux": 5, "select": "batch_topk", "select_by_norm": True}, BatchTopK()),
    "matryoshka": ({"k_aux": 5, "select": "batch_topk"}, Matryoshka((5, 11, M))),
    "relu": ({"select": "relu"}, ReLU()),
    "gated": ({"select": "relu", "gated": True}, Gated()),
    "jumprelu": ({"select": "threshold"}, JumpReLU("l0", 0.1, 0.5, preact_coefficient=0.1)),
    "jumprelu tanh": ({"select": "threshold"}, JumpReLU("tanh", 0.1, 0.5, True, 2.0, 0.1)),
    "jumprelu nested": ({"select": "threshold"}, JumpReLU("l0_squared", 0.1, 0.5, prefixes=(5, M))),
}


def coder_of(kind: str | dict[str, Any], seed: int = 0, sparse_grad: bool = False, **more: Any) -> SparseCoder:
    """A float64 coder of a kind, or of fields, away from its start; thresholds at least 0.

    All `b_enc` are below 0, so that a row of zeros (a row that is `b_dec`, with pre_bias) has no positive latent.
    """
    fields = KINDS[kind][0] if isinstance(kind, str) else kind
    config = SparseCoderConfig(**{"d": D, "m": M, "k": K, "dtype": "float64"} | fields | more)
    coder = SparseCoder(config, seed=seed, sparse_grad=sparse_grad)
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for name, value in coder.state_dict().items():
            noise = 0.5 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
            value += (noise.abs() if name in ("threshold", "b_mag") else noise).to(value.dtype)
        coder.b_enc.copy_(-0.1 - coder.b_enc.abs())
    return coder


def rows_of(n: int = 13, seed: int = 1, d: int = D) -> Tensor:
    """``[n, d]`` of unit variance, float64."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dead_of(which: str) -> Tensor | None:
    """Dead latents: 'none given', 'some', 'fewer than k_aux', 'empty' or 'all'."""
    return {
        "none given": None,
        "some": torch.arange(M) % 3 == 0,
        "fewer than k_aux": torch.arange(M) < 2,
        "empty": torch.zeros(M, dtype=torch.bool),
        "all": torch.ones(M, dtype=torch.bool),
    }[which]


def gradients(loss: Tensor, coder: SparseCoder, x: Tensor | None = None) -> dict[str, Tensor]:
    """Dense gradients of all parameters by name, and of "x" where given; 0 where there is none."""
    named = {**dict(coder.named_parameters()), **({} if x is None else {"x": x})}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(of) if grad is None else grad.to_dense()
        for (name, of), grad in zip(named.items(), grads, strict=True)
    }
