# SPDX-License-Identifier: Apache-2.0
"""Moments in few bits, and the counter-based random bits that round them."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of a row that share an exponent.
BLOCK = 256
# Of an 8-bit code: exponents below the block's, and the bits of their field. 3 bits of mantissa; the first moment has a
# sign, the second reaches twice as many octaves, as it is of squares.
_OCTAVES = {True: (15, 4), False: (31, 5)}
_MASK32, _ONE = 0xFFFFFFFF, 1 << 64


def _signed(a: int) -> int:
    """An unsigned 64-bit number as torch's int64 holds it."""
    a %= _ONE
    return a - _ONE if a >= _ONE // 2 else a


def _shifted(a: Tensor, by: int) -> Tensor:
    """Logical right shift of 64 bits."""
    return (a >> by) & ((1 << (64 - by)) - 1)


def _mix64(a: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), on int64."""
    a = (a ^ _shifted(a, 30)) * _signed(0xBF58476D1CE4E5B9)
    a = (a ^ _shifted(a, 27)) * _signed(0x94D049BB133111EB)
    return a ^ _shifted(a, 31)


def _mix32(a: Tensor) -> Tensor:
    """A 32-bit finaliser (constants of Wellons' search, 2018), on int64 that holds 32 bits."""
    a = ((a ^ (a >> 16)) * 0x7FEB352D) & _MASK32
    a = ((a ^ (a >> 15)) * 0x846CA68B) & _MASK32
    return a ^ (a >> 16)


def random_bits(seed: int, step: int, rows: Tensor, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three lots of 16 random bits ``[u, d]`` (int64) for first moment, second moment and weight: a function of seed,
    step, row and column alone."""
    key = torch.tensor(_signed(seed + step * 0x9E3779B97F4A7C15), device=rows.device)
    row = _mix64(_mix64(key) + rows * _signed(0xD1B54A32D192ED03))
    column = torch.arange(d, device=rows.device) * 0x9E3779B9
    moments, weight = (_mix32((part[:, None] + column) & _MASK32) for part in (row & _MASK32, _shifted(row, 32)))
    return moments & 0xFFFF, moments >> 16, weight & 0xFFFF


def to_bfloat16(a: Tensor, bits: Tensor) -> Tensor:
    """float32 `a` rounded up or down with the probability that keeps its mean; NaN and infinities as they are."""
    raw = a.view(torch.int32).to(torch.int64) & _MASK32
    rounded = ((raw + bits) & 0xFFFF0000).to(torch.int64)
    rounded = torch.where(rounded >= 1 << 31, rounded - (1 << 32), rounded).to(torch.int32).view(torch.float32)
    return torch.where(torch.isfinite(a), rounded, a).to(torch.bfloat16)


def _blocks(d: int) -> Tensor:
    return torch.arange(d) // BLOCK


def read(stored: Tensor, d: int, signed: bool) -> Tensor:
    """Stored moments of some rows, ``[u, d]``, in float32 (float64 as they are)."""
    if stored.dtype != torch.uint8:
        return stored.to(torch.float64 if stored.dtype == torch.float64 else torch.float32)
    code, exponent = stored[:, :d].to(torch.int32), stored[:, d:].to(torch.int32)
    octaves, _ = _OCTAVES[signed]
    magnitude = code & 0x7F if signed else code
    unit = torch.where(
        magnitude < 8,
        magnitude * 2.0 ** (-octaves - 2),
        ((magnitude << 20) + ((127 - octaves) << 23)).view(torch.float32),
    )
    value = unit * (exponent << 23).view(torch.float32)[:, _blocks(d).to(code.device)]
    return torch.where(code >= 128, -value, value) if signed else value


def write(a: Tensor, like: torch.dtype, bits: Tensor | None, signed: bool) -> Tensor:
    """Moments ``[u, d]`` as they are stored in the dtype `like`; 8 bits: a code for every element, then a byte for
    every block of 256, its exponent."""
    if like == torch.bfloat16:
        return to_bfloat16(a, bits)
    if like != torch.uint8:
        return a.to(like)
    d, octaves = a.shape[1], _OCTAVES[signed][0]
    blocks = _blocks(d).to(a.device)
    raw = a.abs().view(torch.int32)
    top = torch.zeros(a.shape[0], -(-d // BLOCK), dtype=torch.int32, device=a.device)
    top = top.scatter_reduce(1, blocks.expand(a.shape[0], -1), raw, "amax")
    # One more where the largest would be rounded beyond the highest code. 255, infinity, marks a block as not finite.
    exponent = ((top.to(torch.int64) + 0xFFFFF) >> 23).clamp(max=253).to(torch.int32)
    exponent = torch.where(top >= 0x7F800000, 255, exponent)
    scale = exponent[:, blocks]
    live = (scale > 0) & (scale < 255)
    unit = raw.view(torch.float32) * torch.where(live, (254 - scale) << 23, 0).view(torch.float32)
    unit = torch.where(live, unit, 0.0)
    fine = (unit * 2.0 ** (octaves + 2) + (bits + 0.5) / 65536).floor().to(torch.int64)
    coarse = ((unit.view(torch.int32).to(torch.int64) + (bits << 4) + 8) >> 20) - ((127 - octaves) << 3)
    highest = 127 if signed else 255
    code = torch.where(unit < 2.0 ** (1 - octaves), fine, coarse).clamp(max=highest)
    if signed:
        code = torch.where(live & torch.signbit(a) & (code > 0), code | 0x80, code)
    else:  # a denominator of 0 would be the largest step of all
        code = torch.where(live & (unit > 0), code.clamp(min=1), code)
    return torch.cat([code, exponent], 1).to(torch.uint8)
