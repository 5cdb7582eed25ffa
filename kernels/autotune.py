# SPDX-License-Identifier: Apache-2.0
"""Tiles by measurement: the gate of `encode_topk`, which is nearly all of its time, with each of some candidates.

``FUSAE_AUTOTUNE=1`` runs this once for a device, a dtype and a power of two of widths, at the first encoder that meets
them, and `tuning` keeps the result in the user's cache. It takes a minute or two, nearly all of it compilation.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable

import torch

from .common import INTERPRETED
from .encode_plan import Sample, Tiles

ROWS, LATENTS, CAP = (4096, 16_384, 256) if not INTERPRETED else (70, 600, 64)
MARGIN = 0.98
"""A candidate has to take less than this part of the default's time: noise must not choose."""
ACCUMULATORS = 128
"""Of a thread. Beside more of them there are no registers for the epilogue."""

Timer = Callable[[Callable[[], None]], float]


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block can have."""
    return 99 << 10 if INTERPRETED else torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def candidates(dtype: torch.dtype, default: Tiles, shared: int) -> list[Tiles]:
    """The default first, then every tile whose operands fit `shared` bytes and whose accumulators fit the registers."""
    sizes = ((64, 128), (128, 256), (32, 64), (4, 8), (2, 3, 4))
    found = [default]
    for BM, BN, BK, warps, stages in itertools.product(*sizes):
        accumulators = BM * BN // (32 * warps)
        operands = stages * (BM + BN) * BK * dtype.itemsize
        # Scores of float32 take FMAs, one product at a time: large blocks have no registers left for operands.
        most = ACCUMULATORS if dtype != torch.float32 else ACCUMULATORS // 4
        if most // 4 <= accumulators <= most and operands <= shared:
            tiles = default._replace(BM=BM, BN=BN, BK=BK, warps=warps, stages=stages, parts=min(8, BN // 32))
            found += [tiles] if tiles != default else []
    return found


def gate_of(device: torch.device, dtype: torch.dtype, d: int) -> Callable[[Tiles], Callable[[], None]]:
    """For tiles, a function that runs the gate once: random operands of width d, one score in 500 passes."""
    from .encode_tile import Operands
    from .encode_topk import Candidates, run_gate

    gen = torch.Generator(device).manual_seed(0)
    x = torch.randn(ROWS, d, generator=gen, device=device).to(dtype)
    W = torch.randn(LATENTS, d, generator=gen, device=device).div_(d**0.5).to(dtype)

    def prepare(tiles: Tiles) -> Callable[[], None]:
        operands = Operands(x, W, None, tiles=tiles)
        buffers = Candidates(operands, 1, Sample(1, 1, CAP))
        buffers.value.fill_(2.9)
        buffers.index.fill_(2**31 - 1)

        def run() -> None:
            buffers.tally.zero_()
            run_gate(operands, buffers, None)

        return run

    return prepare


def milliseconds(run: Callable[[], None], rounds: int = 10) -> float:
    """Median time of a run on the current stream, by CUDA events, the L2 cache emptied before each."""
    run()
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for begin, end in events:
        flush.zero_()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def fastest(tiles: list[Tiles], prepare: Callable[[Tiles], Callable[[], None]], timer: Timer) -> Tiles:
    """The tiles of the least time; the first ones, unless another is clearly faster. What does not run is left out."""
    from triton.runtime.errors import OutOfResources, PTXASError

    times = {}
    for candidate in tiles:
        try:
            times[candidate] = timer(prepare(candidate))
        except (OutOfResources, PTXASError):
            if candidate == tiles[0]:
                raise
    best = min(times, key=times.__getitem__)
    return best if times[best] < MARGIN * times[tiles[0]] else tiles[0]


def search(device: torch.device, dtype: torch.dtype, d: int, default: Tiles, timer: Timer = milliseconds) -> Tiles:
    """The best tiles for encoders of width d on this device."""
    with torch.no_grad():
        return fastest(candidates(dtype, default, shared_memory(device)), gate_of(device, dtype, d), timer)
