# SPDX-License-Identifier: Apache-2.0
"""Contenders in turns, and what is made of their times: medians, ratios within rounds, how sure they are."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

Times = dict[str, list[float]]
LEAST, SURE = 3, 9  # rounds: before a budget stops them, before they are asked whether they are enough


class Percentiles(NamedTuple):
    p20: float
    p50: float
    p80: float


def percentiles(seconds: list[float]) -> Percentiles:
    """The 20th, 50th and 80th percentile, interpolated linearly, in the unit of the input."""
    ordered = torch.tensor(seconds, dtype=torch.float64)
    return Percentiles(*torch.quantile(ordered, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist())


def ratio(times: Times, name: str, baseline: str) -> float:
    """Median over the rounds of ``times[name][r] / times[baseline][r]``."""
    pairs = zip(times[name], times[baseline], strict=True)
    return percentiles([own / other for own, other in pairs]).p50


def interval(times: Times, name: str, baseline: str) -> tuple[float, float]:
    """Between which ratios of single rounds the true median lies with about 95 %, whatever their distribution (order
    statistics). Of fewer than six rounds: between the least and the largest."""
    ordered = sorted(own / other for own, other in zip(times[name], times[baseline], strict=True))
    low = max(0, math.floor(len(ordered) / 2 - 0.98 * len(ordered) ** 0.5))
    return ordered[low], ordered[len(ordered) - 1 - low]


def settled(baseline: str, within: float) -> Callable[[Times], bool]:
    """For `interleaved`: whether every ratio to `baseline` is known to `within` (a share of it) to either side."""

    def check(times: Times) -> bool:
        for name in times:
            (low, high), middle = interval(times, name, baseline), ratio(times, name, baseline)
            if high - middle > within * middle or middle - low > within * middle:
                return False
        return True

    return check


def _timer(device: str) -> Callable[[Callable[[], Any]], float]:
    """A function that runs a call and gives its seconds: wall clock on the CPU, events on a GPU."""
    if torch.device(device).type != "cuda":

        def wall(call: Callable[[], Any]) -> float:
            start = time.perf_counter()
            call()
            taken = time.perf_counter() - start
            return getattr(call, "seconds", taken)  # a call in another process knows better

        return wall

    def events(call: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return events


def interleaved(
    contenders: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    *,
    device: str = "cpu",
    budget: float | None = None,
    enough: Callable[[Times], bool] | None = None,
) -> Times:
    """Seconds of every call: `rounds` rounds in which each contender runs once, each round starting one further on.

    Args:
        contenders: name -> call without arguments. For cold caches a call takes other inputs each time.
        rounds: timed rounds, at least 1.
        warmup: rounds before them that are not counted.
        device: "cuda" times with CUDA events, each call waited for.
        budget: seconds after which no further round begins, once there are three.
        enough: asked after every round from the ninth on whether there are enough.

    The garbage collector stands still meanwhile.
    """
    if not contenders:
        raise ValueError("contenders must have at least one entry, got none")
    for name, value, least in (("rounds", rounds, 1), ("warmup", warmup, 0)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an int >= {least}, got {value!r}")
    timed, names = _timer(device), list(contenders)
    times: Times = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    begin = time.perf_counter()
    try:
        for turn in range(-warmup, rounds):
            over = budget is not None and time.perf_counter() - begin > budget
            if (turn >= LEAST and over) or (turn >= SURE and enough is not None and enough(times)):
                break
            if turn < 0 and over and turn > -warmup:  # slow calls: one round is warm-up enough
                continue
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                seconds = timed(contenders[name])
                if turn >= 0:
                    times[name].append(seconds)
    finally:
        if collecting:
            gc.enable()
    return times
