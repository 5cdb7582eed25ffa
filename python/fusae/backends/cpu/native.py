# SPDX-License-Identifier: Apache-2.0
"""The native module `fusae._C`, the instruction set it uses, and how tensors cross to it."""

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

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


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


def ptr(tensor: Tensor | None) -> int:
    """Address of the data; 0 for None. The tensor must be contiguous and kept alive by the caller."""
    return 0 if tensor is None else tensor.data_ptr()


def offset(tensor: Tensor | None, items: int) -> int:
    return 0 if tensor is None else tensor.data_ptr() + items * tensor.element_size()


def fma_burst() -> float:
    """Multiply-adds on registers alone, on all threads: some tens of ms. The floating-point operations done, which over
    the time taken is the rate that no float32 GEMM on this processor can pass."""
    return _C.fma_burst(4_000_000, torch.get_num_threads())
