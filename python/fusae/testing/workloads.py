# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks run: inputs, the contenders of every op, and their cost.

A contender is built once, ``build(inputs, k, backend) -> call``, and then called again and again without arguments;
each call takes the next of the batches in `Inputs`, so no batch is warm in a cache from the call before, and all
contenders of a round see the same one. Contenders of an op do the same work and return the same numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _dispatch, reference
from ..codes import SparseCodes
from ..nn import SparseCoder, SparseCoderConfig
from ..ops import adam_rows_, decode, encode_batch_topk, encode_threshold, encode_topk
from ..optim import Adam
from .bench_inputs import (  # noqa: F401
    Build,
    Call,
    Inputs,
    activations,
    codes_of,
    make_inputs,
    over,
    planted,
    select,
)  # fmt: skip
from .bench_losses import error_after, error_within, from_dense, loss_and_gradients, nonzero_fusae, nonzero_torch
from .bench_steps import (
    LR,
    jumprelu_fusae,
    jumprelu_torch,
    leaves_of,
    matryoshka_fusae,
    matryoshka_torch,
    prime,
    squared_error,
    threshold_of,
    train_step,
)  # fmt: skip


def _gemm(inputs: Inputs, k: int, backend: str) -> Call:
    """The encoder's matrix product alone, into memory that is already there."""
    out = inputs.xs[0].new_empty(inputs.xs[0].shape[0], inputs.W_enc.shape[0])
    return over(inputs.xs, lambda x: torch.mm(x, inputs.W_enc.T, out=out))


def _encode_fusae(inputs: Inputs, k: int, backend: str) -> Call:
    bias = inputs.bias

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = encode_topk(x, inputs.W_enc, bias, k, backend=backend)
        return codes.values, codes.indices

    return over(inputs.xs, call)


def _encode_torch(inputs: Inputs, k: int, backend: str) -> Call:
    bias = inputs.bias
    return over(inputs.xs, lambda x: select(x, inputs.W_enc, bias, k))


def _threshold_fusae(inputs: Inputs, k: int, backend: str) -> Call:
    bias, threshold = inputs.bias, threshold_of(inputs, k)

    def call(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes = encode_threshold(x, inputs.W_enc, bias, threshold, backend=backend)
        return codes.values, codes.indices, codes.offsets

    return over(inputs.xs, call)


def _threshold_torch(inputs: Inputs, k: int, backend: str) -> Call:
    bias, threshold = inputs.bias, threshold_of(inputs, k)

    def call(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pre = F.linear(x, inputs.W_enc, bias)
        above = pre > threshold
        rows, latents = above.nonzero(as_tuple=True)
        return pre[rows, latents], latents, F.pad(above.sum(1).cumsum(0), (1, 0))

    return over(inputs.xs, call)


def _batch_fusae(inputs: Inputs, k: int, backend: str) -> Call:
    bias = inputs.bias

    def call(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        codes, smallest = encode_batch_topk(x, inputs.W_enc, bias, k, backend=backend)
        return codes.values, codes.indices, codes.offsets, smallest

    return over(inputs.xs, call)


def _batch_torch(inputs: Inputs, k: int, backend: str) -> Call:
    bias = inputs.bias

    def call(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        pre = F.linear(x, inputs.W_enc, bias)
        values, places = pre.relu().flatten().topk(len(x) * k)
        order = places[values > 0].sort().values
        rows, latents = order // pre.shape[1], order % pre.shape[1]
        offsets = F.pad(torch.bincount(rows, minlength=len(x)).cumsum(0), (1, 0))
        return pre.flatten()[order], latents, offsets, values[values > 0].min()

    return over(inputs.xs, call)


def _decode_fusae(inputs: Inputs, k: int, backend: str) -> Call:
    return over(codes_of(inputs, k), lambda codes: decode(codes, inputs.W_dec, inputs.b_dec, backend=backend))


def _decode_bag(inputs: Inputs, k: int, backend: str) -> Call:
    return over(codes_of(inputs, k), lambda codes: _bag(codes.values, codes.indices, inputs.W_dec, inputs.b_dec))


def _decode_dense(inputs: Inputs, k: int, backend: str) -> Call:
    def call(codes: SparseCodes) -> Tensor:
        return torch.addmm(inputs.b_dec, codes.to_dense(), inputs.W_dec)

    return over(codes_of(inputs, k), call)


def _bag(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    return F.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum") + b_dec


Forward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]


def forward_dense(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int) -> Tensor:
    """A top-k autoencoder in plain torch: dense codes by scatter, dense decoder.

    b_dec is taken out of the pre-activations by way of the bias: the same function as ``F.linear(x - b_dec, ...)``,
    which would cost autograd one dense matrix product more.
    """
    pre = F.linear(x, W_enc, b_enc - W_enc @ b_dec)
    values, indices = torch.topk(pre, k)
    return torch.zeros_like(pre).scatter(1, indices, values.relu()) @ W_dec + b_dec


def forward_bag(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int) -> Tensor:
    """The same with ``torch.nn.functional.embedding_bag`` as the decoder."""
    values, indices = select(x, W_enc, b_enc - W_enc @ b_dec, k)
    return _bag(values, indices, W_dec, b_dec)


def _forward_fusae(backend: str, sparse_grad: bool) -> Forward:
    def forward(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int) -> Tensor:
        codes = encode_topk(x - b_dec, W_enc, b_enc, k, backend=backend, sparse_grad=sparse_grad)
        return decode(codes, W_dec, b_dec, backend=backend, sparse_grad=sparse_grad)

    return forward


def _backward(forward: Forward, inputs: Inputs, k: int) -> Call:
    """The gradients of all parameters through a graph that is kept (one batch: the graph may hold ``[n, m]``)."""
    leaves = leaves_of(inputs)
    y = forward(inputs.xs[0], *leaves, k)
    grad = (2 / len(y)) * (y.detach() - inputs.xs[0])
    return lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)


def _adam_fusae(inputs: Inputs, k: int, backend: str) -> Call:
    W, mean, square, grad = _adam_state(inputs)
    step = itertools.count(1)

    def call() -> Tensor:
        adam_rows_(W, mean, square, grad, lr=LR, step=next(step), backend=backend)
        return W

    return call


def _adam_state(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Parameter, moments (written once, so that the memory is there) and a dense gradient."""
    W, dtype = inputs.W_dec.clone(), reference.accumulator(inputs.W_dec.dtype)
    moments = (torch.empty_like(W, dtype=dtype).zero_() for _ in range(2))
    return W, *moments, inputs.W_enc.clone()


def _adam_torch(inputs: Inputs, k: int, backend: str) -> Call:
    W, grad = inputs.W_dec.clone().requires_grad_(), inputs.W_enc.clone()
    optimizer = torch.optim.Adam([W], lr=LR, fused=True)

    def call() -> Tensor:
        W.grad = grad
        optimizer.step()
        return W

    return call


def _train_torch(forward: Forward) -> Build:
    def build(inputs: Inputs, k: int, backend: str) -> Call:
        leaves = leaves_of(inputs)
        optimizer = torch.optim.Adam(leaves, lr=LR, fused=True)
        prime(optimizer)
        return train_step(inputs, lambda x: squared_error(forward(x, *leaves, k), x), optimizer)

    return build


def _train_ops(inputs: Inputs, k: int, backend: str) -> Call:
    """The public ops alone: row-sparse gradients, dense-exact Adam."""
    leaves = leaves_of(inputs)
    forward = _forward_fusae(backend, sparse_grad=True)
    optimizer = Adam(leaves, lr=LR, backend=backend)
    prime(optimizer)
    return train_step(inputs, lambda x: squared_error(forward(x, *leaves, k), x), optimizer)


def _train_coder(inputs: Inputs, k: int, backend: str) -> Call:
    """What a user of the package runs: `fusae.nn.SparseCoder` and `fusae.optim.Adam`."""
    m, d = inputs.W_enc.shape
    config = SparseCoderConfig(d=d, m=m, k=k, dtype=str(inputs.W_enc.dtype).removeprefix("torch."))
    coder = SparseCoder(config, seed=None, device=inputs.W_enc.device, sparse_grad=True)
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            getattr(coder, name).copy_(getattr(inputs, name))
    optimizer = Adam(coder.parameters(), lr=LR, backend=backend)
    prime(optimizer)

    def loss_of(x: Tensor) -> Tensor:
        with _dispatch.backend(backend):
            return coder.loss(x, variance=1.0).loss

    return train_step(inputs, loss_of, optimizer)


#: op -> contender -> builder. The contenders whose name starts with "fusae" run on the backend they are given.
CONTENDERS: dict[str, dict[str, Build]] = {
    "encode_topk": {"gemm": _gemm, "fusae": _encode_fusae, "torch mm + topk": _encode_torch},
    "encode_threshold": {"gemm": _gemm, "fusae": _threshold_fusae, "torch mm + nonzero": _threshold_torch},
    "encode_batch_topk": {"gemm": _gemm, "fusae": _batch_fusae, "torch mm + topk": _batch_torch},
    "decode": {"embedding_bag": _decode_bag, "fusae": _decode_fusae, "dense matmul": _decode_dense},
    "decode_loss": {
        "decode + error": loss_and_gradients(error_after),
        "fusae": loss_and_gradients(error_within),
    },
    "codes_from_dense": {"torch nonzero": from_dense(nonzero_torch), "fusae": from_dense(nonzero_fusae)},
    "backward": {
        "plain torch": lambda inputs, k, backend: _backward(forward_dense, inputs, k),
        "fusae": lambda inputs, k, backend: _backward(_forward_fusae(backend, False), inputs, k),
        "fusae sparse_grad": lambda inputs, k, backend: _backward(_forward_fusae(backend, True), inputs, k),
        "torch embedding_bag": lambda inputs, k, backend: _backward(forward_bag, inputs, k),
    },
    "adam_rows": {"torch Adam(fused)": _adam_torch, "fusae": _adam_fusae},
    "train_step": {
        "gemm": _gemm,
        "fusae": _train_coder,
        "fusae ops": _train_ops,
        "plain torch": _train_torch(forward_dense),
        "torch embedding_bag": _train_torch(forward_bag),
    },
    "matryoshka_step": {"top-k step": _train_ops, "fusae": matryoshka_fusae, "plain torch": matryoshka_torch},
    "jumprelu_step": {"plain torch": jumprelu_torch, "fusae": jumprelu_fusae},
}
#: Contenders that do other work than the op beside which they run.
OTHER_WORK = frozenset({"gemm", "top-k step"})
BASELINE = {op: next(iter(builders)) for op, builders in CONTENDERS.items()}
MODE = {
    "encode_topk": "fwd",
    "encode_threshold": "fwd",
    "encode_batch_topk": "fwd",
    "decode": "fwd",
    "decode_loss": "step",
    "codes_from_dense": "fwd",
    "matryoshka_step": "step",
    "jumprelu_step": "step",
    "backward": "bwd",
    "adam_rows": "step",
    "train_step": "step",
}
_GRADIENTS = ("encode_topk_fwd", "decode_fwd", "encode_bwd", "decode_bwd")
_RAW = {
    "encode_topk": ("encode_topk_fwd",),
    "encode_threshold": ("encode_threshold_fwd",),
    "encode_batch_topk": ("encode_batch_topk_fwd",),
    "decode": ("decode_fwd",),
    "decode_loss": ("decode_fwd", "decode_bwd", "decode_loss_fwd", "decode_loss_bwd"),
    "codes_from_dense": ("codes_from_dense_fwd",),
    "matryoshka_step": (*_GRADIENTS, "decode_loss_fwd", "decode_loss_bwd", "adam_rows_"),
    "jumprelu_step": (
        "encode_threshold_fwd", "encode_threshold_bwd", "encode_bwd", "decode_loss_fwd", "decode_loss_bwd",
        "adam_rows_",
    ),
    "backward": _GRADIENTS,
    "adam_rows": ("adam_rows_",),
    "train_step": (*_GRADIENTS, "adam_rows_"),
}


def contenders(op: str) -> dict[str, Build]:
    """The contenders of `op` in this package, the baseline first."""
    if op not in CONTENDERS:
        raise ValueError(f"op must be one of {', '.join(CONTENDERS)}, got {op!r}")
    return CONTENDERS[op]


def choose_backend(op: str, device: str = "cpu", wanted: str | None = None) -> str:
    """The backend for the fusae contenders of `op`: the one asked for (argument, context, FUSAE_BACKEND), else the
    first that has all raw ops. Raises `BackendError` where there is none."""
    wanted = _dispatch.requested(wanted)
    on_cpu = torch.device(device).type == "cpu"
    fitting = [name for name in _dispatch.ORDER if name == "reference" or (name == "cpu") == on_cpu]
    reasons = {}
    for backend in [wanted] if wanted else fitting:
        found = (_dispatch.why_not(raw, backend, static=True) for raw in _RAW[op])
        reasons[backend] = next((reason for reason in found if reason), None)
        if reasons[backend] is None:
            return backend
    told = "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items())
    raise _dispatch.BackendError(f"no backend can run the benchmark {op} on {device}: {told}")


def cost(op: str, n: int, d: int, m: int, k: int, itemsize: int) -> tuple[int, int]:
    """Useful flops of an op, and the bytes it has to move at least: every operand once, no temporaries.

    Gathers count every row of the dictionary that can be touched once, ``min(n k, m)``. A contender that does more work
    (a dense decoder) is measured by the same useful work, so its rates are comparable.
    """
    rows, codes = min(n * k, m) * d * itemsize, n * k * (itemsize + 4)
    x, matrix, moments = n * d * itemsize, m * d * itemsize, 16 * m * d
    encode = 2 * n * m * d, x + matrix + m * itemsize + codes
    sparse, adam = 2 * n * k * d, 12 * m * d
    step = encode[0] + 4 * sparse + 2 * adam, encode[1] + rows + 2 * (2 * matrix + moments)
    table = {
        "gemm": (2 * n * m * d, x + matrix + n * m * itemsize),
        "encode_topk": encode,
        "encode_threshold": encode,
        "encode_batch_topk": encode,
        "decode": (sparse, rows + d * itemsize + codes + x),
        "decode_loss": (3 * sparse, 2 * rows + 3 * x + 2 * codes),
        "codes_from_dense": (n * m, n * m * itemsize + codes),
        "backward": (3 * sparse, rows + 2 * x + codes + 2 * matrix + (m + d) * itemsize),
        "adam_rows": (adam, 3 * matrix + moments),
        "train_step": step,
        "matryoshka_step": step,
        "jumprelu_step": step,
    }
    return table[op]
