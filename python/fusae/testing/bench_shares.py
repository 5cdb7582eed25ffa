# SPDX-License-Identifier: Apache-2.0
"""What a training step spends in each of its ops, seen by torch's profiler within real steps."""

from __future__ import annotations

import shlex
import sys

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from . import workloads
from .bench import Measurement, probes, threads_of
from .bench_clock import Times, interleaved, interval, percentiles, ratio
from .bench_inputs import label
from .bench_row import Row, environment

OP = "train_step_parts"
STEP, REST = "step", "everything else"
# The raw ops of a step -> the ops whose cost is theirs (`workloads.cost`); the optimiser runs over both matrices.
_COSTS = {
    "encode_topk_fwd": ("encode_topk",), "decode_fwd": ("decode",), "decode_bwd": ("decode_bwd",),
    "encode_bwd": ("encode_topk_bwd",), "adam_rows_": ("adam_rows_sparse", "adam_rows_sparse"),
}  # fmt: skip


def _profiled(call: workloads.Call, steps: int, device: str) -> Times:
    """Seconds of every step, and of all calls of each raw op within it."""
    on_gpu = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    times: Times = {name: [] for name in (STEP, *_COSTS, REST)}
    for _ in range(steps):
        with profile(activities=activities) as seen, record_function("fusae step"):
            call()
            if on_gpu:
                torch.cuda.synchronize(device)
        spent = dict.fromkeys(times, 0.0)
        for event in seen.events():
            name = event.name.removeprefix("fusae::")
            if event.name == "fusae step" and event.cpu_time_total > 0:
                spent[STEP] = event.cpu_time_total * 1e-6
            elif event.name.startswith("fusae::") and name in spent:
                spent[name] += (event.device_time_total if on_gpu else event.cpu_time_total) * 1e-6
        spent[REST] = max(0.0, spent[STEP] - sum(spent[name] for name in _COSTS))
        for name, seconds in spent.items():
            times[name].append(seconds)
    return times


def measure_shares(
    n: int, d: int, m: int, k: int, *, backend: str | None = None, dtype: str = "float32", device: str = "cpu",
    threads: int | None = None, rounds: int = 7, warmup: int = 2, data: str | None = None, command: str | None = None,
) -> Measurement:  # fmt: skip
    """Rows "step" and one for each raw op of the step; `ratio` is the share of the step. Arguments as of `measure`."""
    backend = workloads.choose_backend("train_step", device, backend)
    where = environment(device, command or shlex.join(["python", *sys.argv[1:]]))
    shape = {"n": n, "d": d, "m": m, "k": k}
    with threads_of(threads):
        inputs = workloads.make_inputs(**shape, dtype=dtype, device=device, data=data)
        call = workloads.CONTENDERS["train_step"]["fusae ops"](inputs, k, backend)
        for _ in range(warmup):
            call()
        limits = probes(dtype, device)
        work = {name: probe() for name, probe in limits.items()}
        rates = {name: work[name] / percentiles(t).p50 for name, t in interleaved(limits, 3, device=device).items()}
        times = _profiled(call, rounds, device)
        used = torch.get_num_threads()
    rows, itemsize = [], inputs.W_enc.element_size()
    for name, seconds in times.items():
        parts = [workloads.cost(op, **shape, itemsize=itemsize) for op in _COSTS.get(name, ())]
        if name == STEP:
            parts = [workloads.cost("train_step", **shape, itemsize=itemsize)]
        flops, moved = (sum(part[i] for part in parts) for i in range(2))
        spread = percentiles(seconds)
        ideal, middle = max(flops / rates["compute"], moved / rates["memory"]), max(spread.p50, 1e-12)
        low, high = interval(times, name, STEP)
        rows.append(Row(
            op=OP, mode="step", name=name, backend=backend, shape=shape, dtype=dtype, threads=used, rounds=rounds,
            p20_ms=spread.p20 * 1e3, p50_ms=spread.p50 * 1e3, p80_ms=spread.p80 * 1e3, baseline=STEP,
            ratio=ratio(times, name, STEP), ratio_low=low, ratio_high=high, flops=flops, bytes=moved,
            tflops=flops / middle / 1e12, gbps=moved / middle / 1e9, peak_tflops=rates["compute"] / 1e12,
            memory_gbps=rates["memory"] / 1e9, roofline=ideal / middle, peak_bytes=None,
            parameter_bytes=inputs.parameter_bytes, data=label(data), **where,
        ))  # fmt: skip
    return Measurement(rows, times)


__all__ = ["OP", "REST", "STEP", "measure_shares"]
