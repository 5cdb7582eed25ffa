# SPDX-License-Identifier: Apache-2.0
"""Timing and memory of contenders side by side.

A machine's speed drifts by more than the differences that matter. So contenders run in turns (`interleaved`), the order
rotated from round to round, and what counts is the median of the ratios taken within each round (`ratio`). Times of
different runs are not comparable; ratios are. Memory is measured in a fresh process for each contender (`peak_memory`).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import importlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backends import cpu
from .bench_clock import Percentiles, Times, interleaved, interval, percentiles, ratio, settled
from .bench_inputs import label
from .bench_row import Row, RowError, append_rows, environment, parse_rows, read_rows

__all__ = [
    "Measurement", "Percentiles", "Row", "RowError", "append_rows", "interleaved", "interval", "measure", "parse_rows",
    "peak_memory", "percentiles", "ratio", "read_rows", "train_step_rows",
]  # fmt: skip

_WORKLOADS = "fusae.testing.workloads"
_WARM = {"n": 8, "d": 16, "m": 64, "k": 4}


def _status(key: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def _peak(call: Callable[[], Any], device: str) -> int | None:
    """Bytes that two calls need above what is held before; None where the system does not tell."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with contextlib.suppress(AttributeError, OSError):  # not glibc: freed memory may then hide a little
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the high-water mark, back to VmRSS
        before = _status("VmRSS")
        call()
        call()
        return max(0, _status("VmHWM") - before)
    except (OSError, KeyError):
        return None


def _child() -> None:
    """What `peak_memory` runs: build, measure, print one line of JSON."""
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    module, name = spec["factory"].split(":")
    factory, arguments = getattr(importlib.import_module(module), name), spec["arguments"]
    if spec["warm"]:  # thread pool, BLAS, lazy imports
        factory(**{**arguments, **spec["warm"]})()
    call = factory(**arguments)
    print(json.dumps({"peak": _peak(call, spec["device"])}))


def peak_memory(
    factory: str,
    arguments: Mapping[str, Any],
    *,
    warm: Mapping[str, Any] | None = None,
    device: str = "cpu",
    threads: int | None = None,
    timeout: float = 1800.0,
) -> int | None:
    """Peak memory of a call above the level before it, in bytes, measured in a fresh process.

    Args:
        factory: ``"module:function"``; called with `arguments` it builds the inputs and returns the call to measure.
        arguments: keyword arguments, JSON values.
        warm: arguments to change for a small call first, so that libraries and thread pools are there already.
        device: "cuda" counts what torch allocates; on the CPU it is the high-water mark of resident memory (Linux).
        threads: for ``torch.set_num_threads`` (default: as here).
        timeout: seconds.

    Memory that the call only reserves counts when it is first written: an output allocated by the factory but not
    written there is part of the peak. Returns None where the system does not give the numbers.
    """
    spec = {"factory": factory, "arguments": dict(arguments), "warm": dict(warm or {}), "device": device}
    spec["threads"] = threads or torch.get_num_threads()
    code = f"from {__name__} import _child; _child()"
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(spec)],
        capture_output=True, text=True, timeout=timeout, check=False, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    if done.returncode != 0:
        told = done.stderr.strip()[-2000:]
        raise RuntimeError(f"measuring the memory of {factory} {dict(arguments)} failed:\n{told}")
    return json.loads(done.stdout.splitlines()[-1])["peak"]


def contender(module: str, op: str, name: str, backend: str, **inputs: Any) -> Callable[[], Any]:
    """The call of ``module.CONTENDERS[op][name]`` on `workloads.make_inputs(**inputs)`. A factory for `peak_memory`."""
    from .workloads import make_inputs

    build = importlib.import_module(module).CONTENDERS[op][name]
    return build(make_inputs(**inputs), inputs["k"], backend)


def probes(dtype: str, device: str, *, size: int = 8192, length: int | None = None) -> dict[str, Callable[[], float]]:
    """What this machine can do: calls that return how much they did, to be timed among the contenders.

    'compute' (flop): on a CPU with the native module, multiply-adds on registers; elsewhere a GEMM of `size` cubed.
    'memory' (bytes read and written): a pass in place over `length` bytes. (A copy is slower on a CPU: it also reads
    what it overwrites.)
    """
    on_cpu = torch.device(device).type == "cpu"
    length = length or (2**27 if on_cpu else 2**30)
    buffer = torch.ones(length // 4, device=device)

    def memory() -> float:
        buffer.add_(1.0)
        return 2.0 * length

    if on_cpu and cpu.unavailable() is None:
        return {"compute": cpu.fma_burst, "memory": memory}
    size = min(size, 1024) if on_cpu else size
    a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    out = torch.empty_like(a)

    def gemm() -> float:
        torch.mm(a, a.T, out=out)
        return 2.0 * size**3

    return {"compute": gemm, "memory": memory}


@contextlib.contextmanager
def threads_of(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Rows of one run, and the seconds of every call behind them."""

    rows: list[Row]
    times: Times

    def ratio(self, name: str, baseline: str) -> float:
        return ratio(self.times, name, baseline)


def measure(
    op: str,
    n: int,
    d: int,
    m: int,
    k: int,
    *,
    names: list[str] | None = None,
    baseline: str | None = None,
    rivals: str | None = None,
    backend: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    threads: int | None = None,
    rounds: int = 7,
    warmup: int = 2,
    batches: int = 3,
    data: str | None = None,
    memory: bool = True,
    budget: float | None = None,
    within: float | None = None,
    others: Mapping[str, Callable[[], Any]] | None = None,
    absent: Mapping[str, str] | None = None,
    command: str | None = None,
) -> Measurement:
    """Time the contenders of `op` in turns on the same inputs.

    Args:
        op: one of `workloads.CONTENDERS`; n, d, m, k: the shape.
        names: contenders to run (default: all).
        baseline: the contender that ratios are against (default: the op's own, if it runs).
        rivals: name of a further module with a table CONTENDERS like that of `workloads`.
        backend: backend of the fusae contenders (default: the first that can run every op in them on `device`).
        rounds, warmup: as in `interleaved`; batches: how many inputs are rotated.
        data: activations instead of planted inputs: a file or folder, or "demo"; see `bench_inputs.activations`.
        memory: measure peak memory as well: one more process for each contender.
        budget: seconds for the rounds, as in `interleaved`.
        within: stop before `rounds` where all ratios are known to this share of themselves (`settled`).
        others: further calls that take part, by name, made elsewhere: a user's own, another commit's.
        absent: contenders that do not take part, and why, for the rows.
    """
    from . import workloads

    known = {name: (_WORKLOADS, build) for name, build in workloads.contenders(op).items()}
    if rivals is not None:
        table = importlib.import_module(rivals).CONTENDERS.get(op, {})
        known.update({name: (rivals, build) for name, build in table.items()})
    names = list(known) if names is None else names
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"names must be among {', '.join(map(repr, known))} for {op}, got {unknown}")
    baseline = baseline or workloads.BASELINE[op]
    backend = workloads.choose_backend(op, device, backend)
    where = environment(device, command or shlex.join([Path(sys.argv[0]).name or "python", *sys.argv[1:]]))
    shape = {"n": n, "d": d, "m": m, "k": k}
    arguments = {**shape, "dtype": dtype, "device": device, "data": data, "batches": batches}
    with threads_of(threads):
        inputs = workloads.make_inputs(**arguments)
        peaks: dict[str, int | None] = dict.fromkeys(names)
        if memory:
            for name in names:
                spec = {"module": known[name][0], "op": op, "name": name, "backend": backend, **arguments}
                warm = {**_WARM, "data": None}
                peaks[name] = peak_memory(f"{__name__}:contender", spec, warm=warm, device=device)
        calls = {name: known[name][1](inputs, k, backend) for name in names}
        limits = probes(dtype, device)
        work = {name: probe() for name, probe in limits.items()}
        enough = None if within is None or baseline not in calls else settled(baseline, within)
        calls.update(others or {})
        times = interleaved(
            {**calls, **limits}, rounds, warmup, device=device, budget=budget,
            enough=enough and (lambda found: enough({name: found[name] for name in calls})),
        )  # fmt: skip
        compute_rate, memory_rate = (work[name] / percentiles(times.pop(name)).p50 for name in limits)
        used_threads = torch.get_num_threads()
    itemsize = inputs.W_enc.element_size()
    rows = []
    peaks.update(dict.fromkeys(set(calls) - set(names)))
    for name in calls:
        flops, moved = workloads.cost("gemm" if name == "gemm" else op, **shape, itemsize=itemsize)
        spread = percentiles(times[name])
        ideal = max(flops / compute_rate, 0 if name == "gemm" else moved / memory_rate)
        rows.append(Row(
            op=op, mode=workloads.MODE[op], name=name, backend=backend if name.startswith("fusae") else None,
            shape=shape, dtype=dtype, threads=used_threads, rounds=len(times[name]),
            p20_ms=spread.p20 * 1e3, p50_ms=spread.p50 * 1e3, p80_ms=spread.p80 * 1e3,
            baseline=baseline if baseline in times else None,
            ratio=ratio(times, name, baseline) if baseline in times else None,
            flops=flops, bytes=moved, tflops=flops / spread.p50 / 1e12, gbps=moved / spread.p50 / 1e9,
            peak_tflops=compute_rate / 1e12, memory_gbps=memory_rate / 1e9, roofline=ideal / spread.p50,
            peak_bytes=peaks[name], parameter_bytes=inputs.parameter_bytes,
            data=label(data), **where, absent=dict(absent or {}),
            **dict(zip(("ratio_low", "ratio_high"), interval(times, name, baseline), strict=True))
            if baseline in times else {},
        ))  # fmt: skip
    return Measurement(rows, times)


def train_step_rows(
    n: int, d: int, m: int, k: int, rounds: int = 5, data: Tensor | str | Path | None = None, **options: Any
) -> list[Row]:
    """fusae's training step and the same step in plain torch, in turns: two rows, ratios against plain torch.

    Args:
        n, d, m, k: rows a step, width, latents, active a row.
        rounds: timed steps of each.
        data: activations ``[rows, d]`` with rows >= n, as a tensor or a ``.npy`` file; planted inputs by default.
        **options: further options of `measure` (backend, dtype, device, threads, warmup, memory).
    """
    options = {"names": ["fusae", "plain torch"], "baseline": "plain torch", "rounds": rounds, **options}
    if isinstance(data, Tensor):
        import numpy

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "activations.npy"
            numpy.save(path, data[: 3 * n].detach().float().cpu().numpy())
            return measure("train_step", n, d, m, k, data=str(path), **options).rows
    return measure("train_step", n, d, m, k, data=None if data is None else str(data), **options).rows
