# SPDX-License-Identifier: Apache-2.0
"""Large pages under the large matrices of a CPU."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

from torch import Tensor

LEAST = 2**25  # bytes
_HUGE = 2**21
_COLLAPSE = 25  # MADV_COLLAPSE, from Linux 6.1


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    call = ctypes.CDLL(None).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return call


def large_pages(tensor: Tensor) -> Tensor:
    """Ask the system for 2 MB pages under `tensor`, where it is on the CPU and has 32 MB or more; returns it.

    The rows of latents that fire lie scattered over a matrix of gigabytes; with pages of 4 KB the processor looks up
    anew where each of them lies. It is advice: a system that gives none of these pages changes nothing.
    """
    in_memory = type(tensor) is Tensor and tensor.device.type == "cpu"  # and not a fake one
    call = _madvise() if in_memory else None
    if call is None or tensor.nbytes < LEAST:
        return tensor
    start = -(-tensor.data_ptr() // _HUGE) * _HUGE
    length = (tensor.data_ptr() + tensor.nbytes) // _HUGE * _HUGE - start
    if length > 0 and call(start, length, mmap.MADV_HUGEPAGE) == 0:
        call(start, length, _COLLAPSE)  # what is in small pages already
    return tensor
