# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks run: inputs, the contenders of every op, and their cost.

A contender is built once, ``build(inputs, k, backend) -> call``, and then called again and again without arguments;
each call takes the next of the batches in `Inputs`, so no batch is warm in a cache from the call before, and all
contenders of a round see the same one. Contenders of an op do the same work and return the same numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _dispatch
from ..codes import SparseCodes  # noqa: F401
from ..nn import SparseCoder, SparseCoderConfig
from ..ops import (
    codes_from_dense,
    decode,
    decode_loss,
    encode_batch_topk,
    encode_threshold,
    encode_topk,
    topk,
)
from ..optim import Adam
from .bench_adam import ADAM
from .bench_calls import CALLS, Function, pre_activations  # noqa: F401
from .bench_forms import FORMS
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
from .bench_steps import (  # noqa: F401
    LR,
    bag,
    jumprelu_fusae,
    jumprelu_torch,
    leaves_of,
    matryoshka_batch_fusae,
    matryoshka_batch_torch,
    matryoshka_fusae,
    matryoshka_torch,
    prime,
    squared_error,
    threshold_of,
    train_step,
)  # fmt: skip
from .bench_torch import PLAIN, embedding_bag

#: op of `CALLS` -> the public function and its fixed arguments, with which "fusae" runs
PUBLIC: dict[str, tuple[Function, dict[str, object]]] = {
    "topk": (topk, {}),
    "encode_topk": (encode_topk, {}),
    "encode_threshold": (encode_threshold, {}),
    "encode_batch_topk": (encode_batch_topk, {}),
    "encode_topk_bwd": (encode_topk, {}),
    "decode": (decode, {}),
    "decode_bwd": (decode, {}),
    "decode_loss": (decode_loss, {"sparse_grad": True}),
    "decode_loss_prefixes": (decode_loss, {"sparse_grad": True}),
    "codes_from_dense": (codes_from_dense, {}),
}


def _gemm(inputs: Inputs, k: int, backend: str) -> Call:
    """The encoder's matrix product alone, into memory that is already there."""
    out = inputs.xs[0].new_empty(inputs.xs[0].shape[0], inputs.W_enc.shape[0])
    return over(inputs.xs, lambda x: torch.mm(x, inputs.W_enc.T, out=out))


def _ours(op: str, **options: object) -> Build:
    """fusae's function for an op, on the backend that the builder is given."""
    function, fixed = PUBLIC[op]

    def build(inputs: Inputs, k: int, backend: str) -> Call:
        return CALLS[op](functools.partial(function, backend=backend, **{**fixed, **options}))(inputs, k, backend)

    return build


def _decode_then_error(inputs: Inputs, k: int, backend: str) -> Call:
    """`decode` and the error after it: what `decode_loss` does in one pass."""

    def loss(codes: SparseCodes, W_dec: Tensor, b_dec: Tensor, target: Tensor) -> Tensor:
        y = decode(codes, W_dec, b_dec, sparse_grad=True, backend=backend)
        return squared_error(y, target) * len(target)

    return CALLS["decode_loss"](loss)(inputs, k, backend)


def _plain(op: str) -> dict[str, Build]:
    return {name: CALLS[op](function) for name, function in PLAIN[op].items()}


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
    return bag(values, indices, W_dec, b_dec)


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


def train_torch(forward: Forward) -> Build:
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
    "topk": {**_plain("topk"), "fusae": _ours("topk")},
    "encode_topk": {"gemm": _gemm, "fusae": _ours("encode_topk"), **_plain("encode_topk")},
    "encode_threshold": {"gemm": _gemm, "fusae": _ours("encode_threshold"), **_plain("encode_threshold")},
    "encode_batch_topk": {"gemm": _gemm, "fusae": _ours("encode_batch_topk"), **_plain("encode_batch_topk")},
    "encode_topk_bwd": {
        **_plain("encode_topk_bwd"),
        "fusae": _ours("encode_topk_bwd"),
        "fusae sparse_grad": _ours("encode_topk_bwd", sparse_grad=True),
    },
    "decode": {
        "embedding_bag": CALLS["decode"](embedding_bag),
        "fusae": _ours("decode"),
        "dense matmul": _plain("decode")["dense matmul"],
    },
    "decode_bwd": {
        **_plain("decode_bwd"),
        "fusae": _ours("decode_bwd"),
        "fusae sparse_grad": _ours("decode_bwd", sparse_grad=True),
    },
    "decode_loss": {
        "decode + error": _decode_then_error,
        "fusae": _ours("decode_loss"),
        **_plain("decode_loss"),
    },
    "decode_loss_prefixes": {**_plain("decode_loss_prefixes"), "fusae": _ours("decode_loss_prefixes")},
    "codes_from_dense": {**_plain("codes_from_dense"), "fusae": _ours("codes_from_dense")},
    "backward": {
        "plain torch": lambda inputs, k, backend: _backward(forward_dense, inputs, k),
        "fusae": lambda inputs, k, backend: _backward(_forward_fusae(backend, False), inputs, k),
        "fusae sparse_grad": lambda inputs, k, backend: _backward(_forward_fusae(backend, True), inputs, k),
        "torch embedding_bag": lambda inputs, k, backend: _backward(forward_bag, inputs, k),
    },
    **ADAM,
    "train_step": {
        "gemm": _gemm,
        "fusae": _train_coder,
        "fusae ops": _train_ops,
        "plain torch": train_torch(forward_dense),
        "torch embedding_bag": train_torch(forward_bag),
    },
    "matryoshka_step": {"top-k step": _train_ops, "fusae": matryoshka_fusae, "plain torch": matryoshka_torch},
    "matryoshka_batch_step": {
        "top-k step": _train_ops,
        "fusae": matryoshka_batch_fusae,
        "plain torch": matryoshka_batch_torch,
    },
    "jumprelu_step": {"plain torch": jumprelu_torch, "fusae": jumprelu_fusae},
    **FORMS,
}
#: Contenders that do other work than the op beside which they run.
OTHER_WORK = frozenset({"gemm", "top-k step", "fusae 8-bit"})
BASELINE = {op: next(iter(builders)) for op, builders in CONTENDERS.items()}
_STEPS = frozenset(op for op in CONTENDERS if op.endswith("_step") or op.startswith(("adam_rows", "decode_loss")))
#: "bwd": the gradients alone; "step": what a training step does, forward to update (decode_loss: to the gradients).
MODE = {
    op: "step" if op in _STEPS else "bwd" if op == "backward" or op.endswith("_bwd") else "fwd" for op in CONTENDERS
}
_GRADIENTS = ("encode_topk_fwd", "decode_fwd", "encode_bwd", "decode_bwd")
_LOSS = ("decode_loss_fwd", "decode_loss_bwd")
_TRAIN = ("encode_topk_fwd", "encode_bwd", *_LOSS, "adam_rows_")
#: The raw ops that an op is made of.
RAW = {
    "topk": ("topk_fwd",),
    "encode_topk": ("encode_topk_fwd",),
    "encode_threshold": ("encode_threshold_fwd",),
    "encode_batch_topk": ("encode_batch_topk_fwd",),
    "encode_topk_bwd": ("encode_topk_fwd", "encode_bwd"),
    "decode": ("decode_fwd",),
    "decode_bwd": ("decode_fwd", "decode_bwd"),
    "decode_loss": ("decode_fwd", "decode_bwd", *_LOSS),
    "decode_loss_prefixes": _LOSS,
    "codes_from_dense": ("codes_from_dense_fwd",),
    "matryoshka_step": (*_GRADIENTS, *_LOSS, "adam_rows_"),
    "matryoshka_batch_step": ("encode_batch_topk_fwd", *_GRADIENTS, *_LOSS, "adam_rows_"),
    "jumprelu_step": ("encode_threshold_fwd", "encode_threshold_bwd", "encode_bwd", *_LOSS, "adam_rows_"),
    "backward": _GRADIENTS,
    **{op: ("adam_rows_",) for op in ADAM},
    "train_step": (*_GRADIENTS, "adam_rows_"),
    "batch_topk_step": ("encode_batch_topk_fwd", *_TRAIN[1:]),
    "relu_step": ("encode_threshold_fwd", "encode_threshold_bwd", *_TRAIN[1:]),
    "abs_step": _TRAIN,
    "group_max_step": _TRAIN,
    "hierarchical_step": _TRAIN,
    "auxk_step": (*_TRAIN, "decode_fwd", "decode_bwd"),
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
        found = (_dispatch.why_not(raw, backend, static=True) for raw in RAW[op])
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
    if op not in CONTENDERS and op != "gemm":
        raise ValueError(f"op must be gemm or one of {', '.join(CONTENDERS)}, got {op!r}")
    touched, codes = min(n * k, m), n * k * (itemsize + 4)
    rows, x, matrix, moments = touched * d * itemsize, n * d * itemsize, m * d * itemsize, 16 * m * d
    encode = 2 * n * m * d, x + matrix + m * itemsize + codes
    sparse, adam = 2 * n * k * d, 12 * m * d
    step = encode[0] + 4 * sparse + 2 * adam, encode[1] + rows + 2 * (2 * matrix + moments)
    if op.startswith("adam_rows"):
        if op in ("adam_rows_masked", "adam_rows_lazy"):  # only the rows that are touched
            return 12 * touched * d, 3 * rows + (8 if op.endswith("lazy") else 16) * touched * d
        grad = rows if op == "adam_rows_sparse" else matrix
        return adam * (2 if op == "adam_rows_unit" else 1), 2 * matrix + grad + (4 * m * d if "8bit" in op else moments)
    if op.endswith("_step"):
        return step
    table = {
        "gemm": (2 * n * m * d, x + matrix + n * m * itemsize),
        "topk": (n * m, n * m * itemsize + codes),
        "decode": (sparse, rows + d * itemsize + codes + x),
        "encode_topk_bwd": (2 * sparse, rows + 2 * x + codes + matrix + m * itemsize),
        "decode_bwd": (2 * sparse, rows + x + 2 * codes + matrix + d * itemsize),
        "decode_loss": (3 * sparse, 2 * rows + 3 * x + 2 * codes),
        "decode_loss_prefixes": (3 * sparse, 2 * rows + 7 * x + 2 * codes),
        "codes_from_dense": (n * m, n * m * itemsize + codes),
        "backward": (3 * sparse, rows + 2 * x + codes + 2 * matrix + (m + d) * itemsize),
    }
    return table.get(op, encode)
