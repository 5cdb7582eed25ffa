# SPDX-License-Identifier: Apache-2.0
"""What a whole training run costs beside its bare training step, on activations as `fusae.data` caches them.

    python benchmarks/trainer.py ACTIVATIONS [--m 16384 --k 32 --n 4096] [--out results.json]

ACTIVATIONS is a folder that `fusae.data.collect` wrote. Blocks of steps of `fusae.train.Trainer` (its producer thread
reading, converting and checking rows, counters, metrics, progress) and blocks of the bare training step of `run.py`
take turns; the bar is on the median over the blocks of the ratio of their times per step.
"""

from __future__ import annotations

import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy
import torch
import typer

from fusae.data import Activations
from fusae.formats.native import write_json
from fusae.testing import workloads
from fusae.testing.bench_row import environment
from fusae.train import TrainConfig, Trainer

BAR, WAIT_BAR = 1.10, 0.05


def main(
    activations: Annotated[Path, typer.Argument(help="folder of cached activations")],
    m: Annotated[int, typer.Option(help="latents")] = 16384,
    k: Annotated[int, typer.Option(help="latents active per token")] = 32,
    n: Annotated[int, typer.Option(help="tokens a step")] = 4096,
    steps: Annotated[int, typer.Option(help="steps in a block")] = 10,
    blocks: Annotated[int, typer.Option(help="blocks of each")] = 6,
    threads: Annotated[int | None, typer.Option(help="of torch; default: as it comes")] = None,
    k_aux: Annotated[int, typer.Option(help="latents in the AuxK term; the bare step has none")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
) -> None:
    if threads:
        torch.set_num_threads(threads)
    data = Activations(activations, verify=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        numpy.save(path, data.take(slice(0, min(len(data), 3 * n))).numpy())
        inputs = workloads.activations(path, n, data.shape[1], m)
    bare = workloads.CONTENDERS["train_step"]["fusae"](inputs, k, workloads.choose_backend("train_step"))
    config = TrainConfig(m=m, k=k, batch_size=n, tokens=n * steps * (blocks + 1), k_aux=k_aux, log_every=steps)
    ratios, trained, alone, waits = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, data, folder, show=False)
        trainer.run(until=steps)
        for _ in range(3):
            bare()
        for block in range(2, blocks + 2):
            start = time.perf_counter()
            for _ in range(steps):
                bare()
            alone.append((time.perf_counter() - start) / steps)
            before = trainer.seconds
            trainer.run(until=block * steps, on_log=lambda row: waits.append(row["wait"]))
            # Without the checkpoint at the end of a block, which a run writes every thousand steps.
            trained.append((trainer.seconds - before) / steps)
            ratios.append(trained[-1] / alone[-1])
            print(f"block {block - 1}: bare {1e3 * alone[-1]:.1f} ms, trainer {1e3 * trained[-1]:.1f} ms, "
                  f"ratio {ratios[-1]:.3f}, waited {100 * waits[-1]:.1f} %", flush=True)  # fmt: skip
    ratio, wait = statistics.median(ratios), statistics.median(waits)
    missed = ratio > BAR or wait > WAIT_BAR
    for what, value, bar in (("time of a step over the bare step", ratio, BAR), ("share of waiting", wait, WAIT_BAR)):
        print(f"{'reached' if value <= bar else 'MISSED '} {what}: {value:.3f}, bar ≤ {bar}")
    if out is not None:
        write_json(out, {
            "shape": {"n": n, "d": data.shape[1], "m": m, "k": k}, "storage": data.meta["storage"], "rows": len(data),
            "steps": steps, "blocks": blocks, "threads": torch.get_num_threads(), "k_aux": k_aux,
            "bare_ms": [1e3 * s for s in alone], "trainer_ms": [1e3 * s for s in trained], "ratios": ratios,
            "ratio": ratio, "waits": waits, "wait": wait, "bars": {"ratio": BAR, "wait": WAIT_BAR},
            **environment(command=shlex.join(["python", "benchmarks/trainer.py", *sys.argv[1:]])),
        })  # fmt: skip
    if missed:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
