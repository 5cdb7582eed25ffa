# SPDX-License-Identifier: Apache-2.0
"""``torch.compile`` of the plain versions, for the shape at hand and before the first round."""

from __future__ import annotations

import shutil

import torch

from . import workloads
from .bench_calls import CALLS, Function
from .bench_inputs import Build, Call, Inputs
from .bench_torch import PLAIN

_OPS = ("topk", "encode_topk", "encode_threshold", "encode_batch_topk", "decode", "codes_from_dense")


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    if not torch.cuda.is_available() and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return "no C++ compiler"
    return None


def _ready(build: Build) -> Build:
    """Builds, and calls once: compiling is no part of a round, nor of the peak memory of a call."""

    def built(inputs: Inputs, k: int, backend: str) -> Call:
        torch._dynamo.reset()
        call = build(inputs, k, backend)
        call()
        return call

    return built


def compiled(function: Function) -> Function:
    return torch.compile(function, dynamic=False)


def _op(op: str) -> dict[str, Build]:
    """The first of the op's plain versions."""
    function = next(iter(PLAIN[op].values()))
    return {"torch.compile": _ready(lambda *given: CALLS[op](compiled(function))(*given))}


def _train(inputs: Inputs, k: int, backend: str) -> Call:
    return workloads.train_torch(compiled(workloads.forward_dense))(inputs, k, backend)


#: as `workloads.CONTENDERS`
CONTENDERS: dict[str, dict[str, Build]] = {
    **{op: _op(op) for op in _OPS},
    "train_step": {"torch.compile": _ready(_train)},
}
