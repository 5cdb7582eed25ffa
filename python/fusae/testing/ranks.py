# SPDX-License-Identifier: Apache-2.0
"""Several processes of one test, over gloo: a small run for them, and what they hand back."""

from __future__ import annotations

import datetime
import importlib.util
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ..train import TrainConfig, Trainer

_WAIT = datetime.timedelta(seconds=60)
D, M, K, B = 16, 64, 4, 64


def data(rows: int = 2048) -> torch.Tensor:
    """Rows ``[n, 16]``."""
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(0)) + 0.5


def config(**given: Any) -> TrainConfig:
    """Of a run of 100 steps of a moment each, in which latents die."""
    base = {"m": M, "k": K, "batch_size": B, "tokens": B * 100, "dead_window": 300, "lr": 1e-2, "device": "cpu"}
    return TrainConfig(**{**base, "log_every": 10, **given})


def losses(trainer: Trainer, steps: int) -> list[tuple[float, float]]:
    """Of as many further steps: loss and AuxK term."""
    found = []
    for _ in range(steps):
        result = trainer.train_step(trainer.feed.next())
        found.append((float(result.loss.detach()), float(result.aux or 0.0)))
    return found


def _enter(rank: int, size: int, folder: str, file: str, name: str, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=_WAIT)
    spec = importlib.util.spec_from_file_location("work_of_a_rank", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        value = getattr(module, name)(*arguments)
    except Exception:  # the others must not wait for this one
        torch.save(traceback.format_exc(), Path(folder) / f"{rank}.pt")
        os._exit(1)
    torch.save(value, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def spawn(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``work(*arguments)``, a function of a module's top level, returns in each of `size` processes that share a
    gloo group. Raises `AssertionError` with the exit codes and tracebacks where one failed; it waits for the others."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        given = (size, folder, work.__code__.co_filename, work.__name__, arguments)
        # Of a server that has read torch once: what a process of its own would need seconds for.
        multiprocessing.set_forkserver_preload([__name__])
        started = mp.start_processes(_enter, given, nprocs=size, start_method="forkserver", join=False)
        for process in started.processes:
            process.join()
        found = {path.stem: torch.load(path, weights_only=False) for path in Path(folder).glob("*.pt")}
        if any(process.exitcode for process in started.processes):
            codes = [process.exitcode for process in started.processes]
            said = [f"rank {rank}: {value}" for rank, value in found.items() if isinstance(value, str)]
            raise AssertionError("\n".join([f"exit codes {codes}", *said]))
        return [found[str(rank)] for rank in range(size)]
