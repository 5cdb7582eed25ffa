# SPDX-License-Identifier: Apache-2.0
"""What every kernel shares: ordered keys, types, sizes.

Addresses. ``n·m``, ``m·d``, ``n·k·d`` and the storage of codes pass 2³¹: whatever is multiplied by a stride is int64
(`tl.program_id` and `tl.arange` are int32: ``pid.to(tl.int64)`` first). Latents and rows themselves fit int32.

Specialisation. A kernel is compiled anew for an integer argument of 1, and for multiples of 16. What changes from call
to call (n, k) is in ``do_not_specialize``; widths and strides aren't, as the alignment of addresses follows from them.

Masked loads always pass ``other``: the interpreter gives 0 without it, a GPU anything.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether the kernels of this process run in Triton's interpreter on the CPU; decided when they are imported."""

LOWEST = tl.constexpr(-(2**63))
"""Below every key: no candidate."""

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def blocks(n: int, size: int, limit: int = 65_535) -> int:
    """Programs for n items, `size` a program; those beyond `limit` are for a loop in the kernel."""
    return max(1, min(limit, cdiv(n, size)))


@triton.jit
def ordered(value):
    """float32 -> int32 in the same order: -0.0 equals +0.0, NaN (of either sign) is the largest."""
    value = value.to(tl.float32)
    value = tl.where(value == 0.0, 0.0, value)
    bits = value.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(value != value, 0x7FFFFFFF, bits)


@triton.jit
def from_ordered(key):
    """The float32 of an ordered int32 (+0.0 for both zeros, one NaN for all)."""
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def pack(value, index):
    """The unique int64 key of an entry: larger value first, equal values by the lower index (0 <= index < 2³¹)."""
    return (ordered(value).to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def raw_entry(value, index):
    """A float32 and an index side by side in an int64: what a key is made of, without the arithmetic."""
    return (index.to(tl.int64) << 32) | (value.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def key_index(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def key_value(key):
    return from_ordered((key >> 32).to(tl.int32))


@triton.jit
def halfway(low, high):
    """``floor((low + high) / 2)`` without overflow."""
    return (low & high) + ((low ^ high) >> 1)
