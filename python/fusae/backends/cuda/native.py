# SPDX-License-Identifier: Apache-2.0
"""The native module `fusae._cuda`, where it can run, and how tensors cross to it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_missing = None
try:
    from fusae import _cuda
except ImportError as error:  # no nvcc or no GPU when fusae was installed
    _cuda, _missing = None, str(error)

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LEAST_CAPABILITY = (8, 0)

_module: ModuleType | None = _cuda


def module() -> ModuleType:
    """`fusae._cuda`, or what the tests put in its place."""
    return _module


def emulated() -> bool:
    """Whether the kernels run on the CPU: their sources, compiled by the host's compiler, in the tests."""
    return _module is not None and _module.emulated


@contextlib.contextmanager
def use(other: ModuleType) -> Iterator[None]:
    """Another build of the native module in a ``with`` block, for tests. (`_dispatch` asks `unavailable` only once.)"""
    global _module
    before, _module = _module, other
    try:
        yield
    finally:
        _module = before


def unavailable() -> str | None:
    if _module is None:
        return (
            "this build has no CUDA kernels "
            f"({'it was installed without nvcc or without a GPU' if 'cannot import' in _missing else _missing}; "
            "-C cmake.define.FUSAE_CUDA=ON builds them)"
        )
    if emulated():
        return None
    if torch.version.hip is not None:
        return "torch is a ROCm build"
    if not torch.cuda.is_available():
        return "no GPU" if torch.version.cuda else "no GPU: torch is a CPU build"
    return None


def by_name_only() -> str | None:
    """Why this backend is never an automatic choice here, or None."""
    return "emulated on the CPU: only when asked for by name" if emulated() else None


def why_not(*args: Any, **kwargs: Any) -> str | None:
    kind = "cpu" if emulated() else "cuda"
    for arg in (*args, *kwargs.values()):
        if not isinstance(arg, Tensor):
            continue
        if arg.device.type != kind:
            return f"a tensor is on {arg.device}" + (", the kernels are emulated" if kind == "cpu" else "")
        if arg.dtype == torch.float64:
            return "float64 is only on the reference"
        if arg.dtype == torch.int32 and arg.numel() >= 2**31:
            return f"at most 2**31 - 1 entries of codes, got {arg.numel()}"
        if kind == "cuda" and _capability(arg.device.index) < LEAST_CAPABILITY:
            return f"compute capability {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} or newer is needed"
    return None


@functools.cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def table(*functions: Callable[..., Any], why: Callable[..., str | None] = why_not) -> dict[str, tuple]:
    """Entries of a TABLE. Every function runs with the device of its first tensor as the current one."""

    def on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if args[0].device.type == "cpu":
                return function(*args, **kwargs)
            with torch.cuda.device(args[0].device):
                return function(*args, **kwargs)

        return run

    return {function.__name__: (on_its_device(function), why) for function in functions}


def ptr(tensor: Tensor | None) -> int:
    """Address of the data; 0 for None. The tensor must be contiguous and kept alive by the caller until the kernel is
    enqueued: torch's allocator gives its memory only to later work of the same stream."""
    return 0 if tensor is None else tensor.data_ptr()


def stream(tensor: Tensor) -> int:
    """Handle of the current stream of the tensor's device, the last argument of every native function."""
    return 0 if tensor.device.type == "cpu" else torch.cuda.current_stream(tensor.device).cuda_stream
