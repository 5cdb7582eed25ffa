# SPDX-License-Identifier: Apache-2.0
"""What this machine does a second, measured in a few seconds on pieces of a step."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from ..codes import SparseCodes
from ..ops import adam_rows_, decode, encode_topk
from ..ops.adam_rows import moment_width
from ..optim import MOMENTS
from ..train import TrainConfig

# Latents of the pieces: the encoder's few enough to be quick (two sizes: a selection takes most of its candidates from
# the first latents), the gathers' too many for a cache.
_FEW, _LATENTS, _GATHERED, _ROWS = 8192, 32768, 65536, 4096


@dataclasses.dataclass(frozen=True)
class Rates:
    """Measured on the device at the widths of a configuration; see `measure_rates`.

    Attributes:
        gemm: floating-point operations a second of the encoder: the products, and the selection in the same pass.
        start: seconds per token that the selection takes beside that, however many latents there are.
        copy: bytes a second, read and written, of a pass over memory.
        entry: seconds per active entry of a step's codes: decoding, and all sums of the backward pass.
        row: seconds per row of one matrix in the optimiser.
        device: on which.
    """

    gemm: float
    start: float
    copy: float
    entry: float
    row: float
    device: str


def _seconds(call: Callable[[], Any], device: torch.device, rounds: int = 3) -> float:
    """Median time of a call, after one that is not counted."""
    times = []
    for _ in range(rounds + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def measure_rates(config: TrainConfig, device: torch.device | str = "cpu", rounds: int = 3) -> Rates:
    """Time the pieces of a step of a resolved configuration: some seconds, and about 64k rows of memory.

    Args:
        config: resolved.
        device: where.
        rounds: times that each piece is run; the median counts.
    """
    device, n, k = torch.device(device), min(config.batch_size, 8192), config.k
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else getattr(torch, config.dtype)
    width = config.input_width // config.layers
    out = config.parts[-1] if config.is_transcoder else config.d
    generator = torch.Generator().manual_seed(0)

    def rows(count: int, columns: int) -> torch.Tensor:
        # Of one small block, again and again: nothing here depends on the numbers, and drawing them takes its time.
        block = torch.randn(min(count, 512), columns, generator=generator).to(device, dtype)
        return block.repeat(-(-count // len(block)), 1)[:count].contiguous()

    x, W = rows(n, width), rows(min(config.m, _LATENTS), width)
    W.mul_(torch.rand(len(W), 1, generator=generator).to(device, dtype) + 0.5)  # no two rows alike
    kept = min(k, len(W))
    few = min(len(W), _FEW)
    with torch.no_grad():
        whole = _seconds(lambda: encode_topk(x, W, None, kept), device, rounds)
        part = _seconds(lambda: encode_topk(x, W[:few], None, min(kept, few)), device, rounds)
    each = whole / len(W)
    if few < len(W):  # bounded: noise of the two must not become a rate that no machine has
        each = min(each, max(0.7 * each, (whole - part) / (len(W) - few)))
    gemm, start = 2 * n * width / each, (whole - each * len(W)) / n
    length = 1 << 25
    buffer = torch.ones(length, device=device)
    copy = 8 * length / _seconds(lambda: buffer.add_(1.0), device, rounds)
    return Rates(gemm, start, copy, _entry(config, rows, n, width, out, generator, device, rounds),
                 _row(config, rows, out, generator, device, rounds), str(device))  # fmt: skip


def _entry(
    config: TrainConfig, rows: Callable, n: int, width: int, out: int, generator: torch.Generator,
    device: torch.device, rounds: int,
) -> float:  # fmt: skip
    """Decoder forward and backward, and the encoder's backward."""
    latents, k = min(config.m, _GATHERED), min(config.k, config.m)
    indices = torch.randint(latents, (n, k), generator=generator, dtype=torch.int32).sort(1).indices.to(torch.int32)
    indices = (indices + torch.randint(latents - k + 1, (n, 1), generator=generator, dtype=torch.int32)).to(device)
    if latents >= 64 * k:  # spread over all latents, distinct within a row
        step = latents // k
        indices = torch.arange(k, dtype=torch.int32) * step
        indices = (indices + torch.randint(step, (n, k), generator=generator, dtype=torch.int32)).to(device)
    W_dec, W_enc, x = rows(latents, out), rows(latents, width), rows(n, width)
    values = rows(n, k).abs() + 0.1
    W_dec.requires_grad_()

    def call() -> None:
        entries = values.clone().requires_grad_()
        W_dec.grad = None
        y = decode(SparseCodes(entries, indices, latents), W_dec, sparse_grad=True)
        y.backward(torch.ones_like(y))
        torch.ops.fusae.encode_bwd(entries.grad, indices, None, x, W_enc, False, True, True, True)

    return _seconds(call, device, rounds) / (n * k)


def _row(
    config: TrainConfig, rows: Callable, out: int, generator: torch.Generator, device: torch.device, rounds: int
) -> float:
    """The optimiser on some rows of many, as the modes of the configuration have it."""
    m, wide = min(config.m, _GATHERED), config.dtype == "float64"
    weights = torch.float32 if config.weights == "float32" and not wide else torch.bfloat16
    param = rows(m, out).to(torch.float64 if wide else weights)
    kind = torch.float64 if wide else MOMENTS[config.moments]
    shape = (m, moment_width(out, kind))
    lazy, unit = config.optimizer == "lazy", config.unit_decoder
    state = {
        "exp_avg": torch.zeros(0 if lazy else shape, dtype=kind, device=device),
        "exp_avg_sq": torch.zeros(shape, dtype=kind, device=device),
        "last_step": torch.zeros(m, dtype=torch.int32, device=device) if lazy else None,
        "master": param.float() if config.weights == "bfloat16_master" else None,
        "seed": None if kind in (torch.float32, torch.float64) and weights == torch.float32 else 0,
    }
    chosen = torch.randperm(m, generator=generator)[: min(m, _ROWS)].sort().values.to(device)
    grad = rows(len(chosen), out).to(param.dtype)
    sparse = torch.sparse_coo_tensor(chosen[None], grad, param.shape, is_coalesced=True, check_invariants=False)
    betas = (0.0 if lazy else config.beta1, config.beta2)

    def step(number: int, masked: bool) -> None:
        adam_rows_(
            param, grad=sparse, lr=1e-4, betas=betas, step=number, masked=masked, project=unit, renormalise=unit,
            **state,
        )  # fmt: skip

    if config.optimizer == "dense":  # all rows, in order
        return _seconds(lambda: step(1, False), device, rounds) / m
    return _seconds(lambda: step(1, not lazy), device, rounds) / len(chosen)
