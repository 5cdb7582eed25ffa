# SPDX-License-Identifier: Apache-2.0
"""The native CPU backend: torch's GEMM, our selection, gathers, sums by latent and optimiser (`fusae._C`)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor

try:
    from fusae import _C
except ImportError as error:  # a build without the native module still runs on the reference
    _C, _missing = None, str(error)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Columns of one GEMM tile and rows of one block: constants, so that a product never depends on the thread count. A tile
# (8 MB) stays in the outer cache between the GEMM that writes it and the selection that reads it.
_TILE, _ROWS = 1024, 2048
_STATE_BYTES = 64 << 20


def unavailable() -> str | None:
    if _C is not None:
        return None
    wanted = os.environ.get("FUSAE_CPU_ISA")
    return f"the native module is missing ({_missing})" + (f"; FUSAE_CPU_ISA asks for {wanted!r}" if wanted else "")


def isas() -> list[str]:
    """Instruction sets that are compiled in and run on this processor, best first."""
    return [name for name in _C.compiled_isas() if _C.runnable(name)]


def set_isa(name: str, where: str = "CPU instruction set") -> None:
    """Use the kernels of one instruction set: 'avx512', 'avx2' or 'generic', in the whole process.

    Raises where it cannot run, saying `where` the name came from.
    """
    if not _C.set_isa(name):
        raise ValueError(f"{where} must be one of {', '.join(isas())} on this machine, got {name!r}")


@contextlib.contextmanager
def force_isa(name: str) -> Iterator[None]:
    """`set_isa` for a ``with`` block. For tests and measurements: other threads of the process change with it."""
    before = _C.isa()
    set_isa(name)
    try:
        yield
    finally:
        set_isa(before)


def describe() -> str:
    """One line for ``python -m fusae``."""
    if _C is None:
        return unavailable()
    runs = {name: "" if _C.runnable(name) else " (not on this processor)" for name in _C.compiled_isas()}
    compiled = ", ".join(name + note for name, note in runs.items())
    return f"{_C.isa()} in use; compiled in: {compiled}; {torch.get_num_threads()} threads"


if _C is not None and (_wanted := os.environ.get("FUSAE_CPU_ISA")):
    set_isa(_wanted, "the environment variable FUSAE_CPU_ISA")


def _why_not(*args, **kwargs) -> str | None:
    for arg in (*args, *kwargs.values()):
        if not isinstance(arg, Tensor):
            continue
        if arg.device.type != "cpu":
            return f"a tensor is on {arg.device}"
        if arg.dtype == torch.float64:
            return "float64 is only on the reference"
    return None


def _ptr(tensor: Tensor | None) -> int:
    """Address of the data; 0 for None. The tensor must be contiguous and kept alive by the caller."""
    return 0 if tensor is None else tensor.data_ptr()


def _offset(tensor: Tensor | None, items: int) -> int:
    return 0 if tensor is None else tensor.data_ptr() + items * tensor.element_size()


class _Selection:
    """Buffers of a running selection of k per row, for blocks of at most `rows` rows."""

    def __init__(self, k: int, rows: int) -> None:
        self.k, self.cap = k, _capacity(k)
        self.pre = torch.empty(rows, self.cap, dtype=torch.float32)
        self.idx = torch.empty(rows, self.cap, dtype=torch.int32)
        self.count = torch.empty(rows, dtype=torch.int32)
        self.threshold = torch.empty(rows, dtype=torch.float32)

    def reset(self) -> None:
        self.count.zero_()
        self.threshold.fill_(float("nan"))

    def state(self) -> tuple[int, ...]:
        return (*map(_ptr, (self.pre, self.idx, self.count, self.threshold)), self.cap, self.k)


_NO_SELECTION = (0, 0, 0, 0, 0, 0)


def _capacity(k: int) -> int:
    """Candidates a row can hold: k, one block of columns that all pass, a vector, and room to cut seldom."""
    return k + 256 + 16 + max(k, 128)


def _row_block(n: int, *widths: int) -> int:
    """Rows selected together, so that their candidates take a bounded amount of memory."""
    limit = max(1, _STATE_BYTES // (8 * sum(map(_capacity, widths))))
    blocks = max(1, -(-n // limit))
    return max(1, -(-n // blocks))  # of equal size: a last block of a few rows would pack all of W for them


_gemm = "auto"


@contextlib.contextmanager
def force_gemm(name: str) -> Iterator[None]:
    """Take the products of `encode_topk` from 'native' (fused with the selection) or 'torch' in a ``with`` block.

    For tests and measurements: other threads of the process change with it.
    """
    global _gemm
    if name not in ("auto", "native", "torch"):
        raise ValueError(f"GEMM must be 'auto', 'native' or 'torch', got {name!r}")
    before, _gemm = _gemm, name
    try:
        yield
    finally:
        _gemm = before


def _use_native_gemm(n: int) -> bool:
    """Whether the fused GEMM is the faster one: MKL, torch's library, is tuned for Intel's processors and leaves
    about half of an AMD core's multiply-adds unused; few rows do not pay for packing W."""
    if _gemm != "auto":
        return _gemm == "native"
    return n >= 128 and _C.isa() != "generic" and not _C.is_intel()


def topk_fwd(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    n, m = pre.shape
    if pre.stride(1) != 1:
        pre = pre.contiguous()
    values = pre.new_empty(n, k)
    indices = torch.empty(n, k, dtype=torch.int32)
    rows = _row_block(n, k)
    selection, dtype, threads = _Selection(k, rows), _DTYPES[pre.dtype], torch.get_num_threads()
    for i in range(0, n, rows):
        block = pre[i : i + rows]
        selection.reset()
        _C.select_tile(
            _ptr(block), dtype, pre.stride(0), len(block), m, 0, 0, 0, 0, False, selection.state(), _NO_SELECTION,
            threads,
        )  # fmt: skip
        _C.select_finish(
            selection.state(), len(block), m, 0, 0, False, False, _offset(values, i * k), dtype,
            _offset(indices, i * k), threads,
        )  # fmt: skip
    return values, indices


def topk_bwd(grad_values: Tensor, indices: Tensor, m: int) -> Tensor:
    # As the reference does it, and no kernel: writing the zeros of [n, m] takes the time, the scatter next to none.
    grad = grad_values.new_zeros(grad_values.shape[0], m)
    return grad.scatter_(1, indices.long(), grad_values)


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
    n, d = x.shape
    m = W_enc.shape[0]
    bias = None if b_enc is None else b_enc.float().contiguous()
    norms = None if norms is None else norms.contiguous()
    mask = None if aux_mask is None else aux_mask.contiguous()
    magnitude, relu, threads = select == "abs", activation == "relu", torch.get_num_threads()
    widths = (k, k_aux) if k_aux else (k,)
    out = [(x.new_empty(n, w), torch.empty(n, w, dtype=torch.int32)) for w in (k, k_aux)]
    native = _use_native_gemm(n)
    rows = _row_block(n if native else min(n, _ROWS), *widths)
    selections = [_Selection(w, rows) for w in widths]
    states = [selection.state() for selection in selections]
    aux_state = states[1] if k_aux else _NO_SELECTION
    tile = torch.empty(0 if native else rows * min(m, _TILE), dtype=torch.float32)
    for i in range(0, n, rows):
        block = x[i : i + rows]
        for selection in selections:
            selection.reset()
        if native:
            _C.encode_select(
                _ptr(block), *x.stride(), _ptr(W_enc), *W_enc.stride(), _DTYPES[x.dtype], len(block), d, m, _ptr(bias),
                _ptr(norms), _ptr(mask), magnitude, states[0], aux_state, threads,
            )  # fmt: skip
        else:
            block = block.float()
            for j in range(0, m, _TILE):
                weight = W_enc[j : j + _TILE].float()
                size = (len(block), len(weight))
                products = torch.mm(block, weight.T, out=tile[: size[0] * size[1]].view(size))
                _C.select_tile(
                    _ptr(products), 0, size[1], *size, j, _offset(bias, j), _ptr(norms), _offset(mask, j),
                    magnitude, states[0], aux_state, threads,
                )  # fmt: skip
        for state, filler, width, (values, indices) in zip(states, (None, mask), widths, out, strict=False):
            _C.select_finish(
                state, len(block), m, _ptr(norms), _ptr(filler), magnitude, relu, _offset(values, i * width),
                _DTYPES[x.dtype], _offset(indices, i * width), threads,
            )  # fmt: skip
    return *out[0], *out[1]


def _codes(values: Tensor, indices: Tensor, offsets: Tensor | None) -> tuple[int, ...]:
    """Contiguous codes as the binding takes them."""
    n, width = (indices.shape[0], indices.shape[1]) if offsets is None else (offsets.shape[0] - 1, 0)
    return (_ptr(values), _ptr(indices), _ptr(offsets), _DTYPES[values.dtype], n, width, values.numel())


def decode_fwd(
    values: Tensor, indices: Tensor, offsets: Tensor | None, W_dec: Tensor, b_dec: Tensor | None
) -> Tensor:
    values, indices, W_dec = values.contiguous(), indices.contiguous(), W_dec.contiguous()
    offsets = None if offsets is None else offsets.contiguous()
    b_dec = None if b_dec is None else b_dec.contiguous()
    m, d = W_dec.shape
    codes = _codes(values, indices, offsets)
    y = W_dec.new_empty(codes[4], d)
    _C.decode(codes, _ptr(W_dec), _ptr(b_dec), _ptr(y), _DTYPES[W_dec.dtype], m, d, torch.get_num_threads())
    return y


class _ByLatent:
    """The stored entries of codes sorted by latent, and passes over it."""

    def __init__(self, coef: Tensor, indices: Tensor, offsets: Tensor | None, m: int) -> None:
        self.coef, self.indices = coef.contiguous(), indices.contiguous()
        self.offsets = None if offsets is None else offsets.contiguous()
        self.m = m
        self.start = torch.empty(m + 1, dtype=torch.int64)
        self.order = torch.empty(coef.numel(), dtype=torch.int64)
        self.row = torch.empty(coef.numel(), dtype=torch.int32)
        self.codes = _codes(self.coef, self.indices, self.offsets)
        _C.by_latent(self.codes, m, *map(_ptr, (self.start, self.order, self.row)))

    def touched(self) -> Tensor:
        """bool ``[m]``: the latents with a non-zero coefficient."""
        used = self.coef.numel() if self.offsets is None else int(self.offsets[-1])
        mark = torch.zeros(self.m, dtype=torch.bool)
        mark[self.indices.view(-1)[:used][self.coef.view(-1)[:used] != 0].long()] = True
        return mark

    def run(
        self,
        rows: Tensor,
        *,
        latents: Tensor | None = None,
        weight: Tensor | None = None,
        sum: Tensor | None = None,
        dots: Tensor | None = None,
        coef_sum: Tensor | None = None,
    ) -> None:
        """One pass; see ``LatentPassArgs`` in csrc/include/fusae/ops.h."""
        if latents is not None and len(latents) == 0:  # no address would mean all of them
            return
        _C.latent_pass(
            self.codes, *map(_ptr, (self.start, self.order, self.row, latents)), 0 if latents is None else len(latents),
            _ptr(rows), _ptr(weight), _DTYPES[rows.dtype], self.m, rows.shape[1], *map(_ptr, (sum, dots, coef_sum)),
            torch.get_num_threads(),
        )  # fmt: skip


def encode_bwd(
    grad_pre: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    x: Tensor,
    W_enc: Tensor,
    need_x: bool,
    need_W: bool,
    need_b: bool,
    row_sparse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x, rows = x.new_empty(0), torch.empty(0, dtype=torch.int64)
    grad_W, grad_b = x.new_empty(0), x.new_empty(0)
    if need_x:
        grad_x = decode_fwd(grad_pre, indices, offsets, W_enc, None)
    if need_W or need_b:
        m, d = W_enc.shape
        x = x.contiguous()
        entries = _ByLatent(grad_pre, indices, offsets, m)
        if need_b:
            grad_b = W_enc.new_zeros(m)
        if need_W and row_sparse:
            rows = entries.touched().nonzero().view(-1)
        if need_W:
            grad_W = W_enc.new_empty(len(rows) if row_sparse else m, d)
        entries.run(
            x,
            latents=rows if need_W and row_sparse else None,
            sum=grad_W if need_W else None,
            coef_sum=grad_b if need_b else None,
        )
    return grad_x, rows, grad_W, grad_b


def decode_bwd(
    grad_y: Tensor,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    W_dec: Tensor,
    need_values: bool,
    need_W: bool,
    row_sparse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_y, W_dec = grad_y.contiguous(), W_dec.contiguous()
    m, d = W_dec.shape
    entries = _ByLatent(values, indices, offsets, m)
    rows = torch.empty(0, dtype=torch.int64)
    grad_values, grad_W = values.new_empty(0), values.new_empty(0)
    # Storage past offsets[-1] is visited by no latent.
    if need_values:
        grad_values = torch.zeros(values.shape, dtype=values.dtype)
    dots = grad_values if need_values else None
    if not need_W:
        entries.run(grad_y, weight=W_dec, dots=dots)
    elif not row_sparse:
        grad_W = W_dec.new_empty(m, d)
        entries.run(grad_y, weight=W_dec, dots=dots, sum=grad_W)
    else:
        touched = entries.touched()
        rows = touched.nonzero().view(-1)
        grad_W = W_dec.new_empty(len(rows), d)
        entries.run(grad_y, weight=W_dec, latents=rows, dots=dots, sum=grad_W)
        if need_values:  # latents that were stored with value 0 everywhere: no gradient row, but dots
            padding = ((entries.start[1:] > entries.start[:-1]) & ~touched).nonzero().view(-1)
            entries.run(grad_y, weight=W_dec, latents=padding, dots=dots)
    return grad_values, rows, grad_W


def adam_rows_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    rows: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    decoupled: bool,
    masked: bool,
    project: bool,
    renormalise: bool,
) -> None:
    grad = grad.contiguous()
    u = 0 if rows is None else len(rows)
    # The address of an empty tensor is 0, which would stand for "not given": a gradient of no rows is still row-sparse.
    rows = None if rows is None else rows.contiguous() if u else torch.zeros(1, dtype=torch.int64)
    m, d = param.shape
    root_correction2 = (1 - beta2**step) ** 0.5
    _C.adam_rows(
        *map(_ptr, (param, exp_avg, exp_avg_sq, grad, rows)), _DTYPES[param.dtype], m, d, u,
        1 - lr * weight_decay if decoupled else 1.0, 0.0 if decoupled else weight_decay, 1 - beta1, beta2, 1 - beta2,
        lr / (1 - beta1**step), root_correction2, eps / root_correction2 if masked else eps, masked, project,
        renormalise, torch.get_num_threads(),
    )  # fmt: skip


def fma_burst() -> float:
    """Multiply-adds on registers alone, on all threads: some tens of ms. The floating-point operations done, which over
    the time taken is the rate that no float32 GEMM on this processor can pass."""
    return _C.fma_burst(4_000_000, torch.get_num_threads())


TABLE = {
    name: (globals()[name], _why_not)
    for name in ("topk_fwd", "topk_bwd", "encode_topk_fwd", "encode_bwd", "decode_fwd", "decode_bwd", "adam_rows_")
}
