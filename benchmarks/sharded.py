# SPDX-License-Identifier: Apache-2.0
"""One dictionary on 1, 2, 4, ... processes of this machine: what each holds, how a step's time goes, the same losses.

    python benchmarks/sharded.py measure --m 131072 --out sharded.json
    python benchmarks/sharded.py page sharded.json --page docs/distributed.md

The processes are those of torchrun, with gloo, and share the machine's cores: on one machine they gain memory per
process, not time. Memory is the high-water mark of each process over what it held after its imports, moments included.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fusae.formats.native import write_json
from fusae.plan import needs
from fusae.testing.bench_row import environment
from fusae.train import TrainConfig, Trainer

START, END = "<!-- results:start -->", "<!-- results:end -->"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def _status(field: str) -> int:
    """Bytes, of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status says nothing of {field}")


def _config(given: dict[str, Any]) -> TrainConfig:
    steps = given.pop("steps")
    return TrainConfig(**given, tokens=steps * given["batch_size"], device="cpu", log_every=10**9, prefetch=0)


@app.command(hidden=True)
def rank(given: str, out: Path) -> None:
    """One process: trains, and says what it held."""
    from fusae.train.sharded import ShardedTrainer, is_launched

    fields = json.loads(given)
    d = fields["d"]
    threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    torch.set_num_threads(threads)
    config = _config(fields)
    rows = torch.randn(8 * config.batch_size, d, generator=torch.Generator().manual_seed(0))
    before = _status("VmRSS")
    trainer = (ShardedTrainer if is_launched() else Trainer)(config, rows, None, show=False)
    losses, seconds = [], []
    for _ in range(config.steps):
        x = trainer.feed.next()
        start = time.perf_counter()
        losses.append(float(trainer.train_step(x).loss.detach()))
        seconds.append(time.perf_counter() - start)
    weights = sum(p.numel() * p.element_size() for p in trainer.coder.parameters())
    moments = sum(
        v.numel() * v.element_size() for state in trainer.optimizer.state.values() for v in state.values()
        if isinstance(v, torch.Tensor)
    )  # fmt: skip
    number = int(os.environ.get("RANK", 0))
    write_json(out / f"{number}.json", {
        "peak_bytes": _status("VmHWM") - before, "weight_bytes": weights, "moment_bytes": moments,
        "step_seconds": statistics.median(seconds[1:] or seconds), "losses": losses, "threads": threads,
    })  # fmt: skip


@app.command()
def measure(
    m: Annotated[int, typer.Option(help="latents")] = 131072,
    d: Annotated[int, typer.Option(help="width")] = 384,
    k: Annotated[int, typer.Option(help="active in a row")] = 32,
    n: Annotated[int, typer.Option(help="rows of a batch")] = 1024,
    steps: Annotated[int, typer.Option(help="steps of each run")] = 12,
    grids: Annotated[str, typer.Option(help="data x latents of each run")] = "1x1,1x2,1x4,2x2",
    form: Annotated[str, typer.Option(help="form of the coder")] = "topk",
    out: Annotated[Path, typer.Option(help="file to write")] = Path("sharded.json"),
) -> None:
    """Train for some steps on every grid of processes."""
    fields = {"m": m, "d": d, "k": k, "batch_size": n, "steps": steps, "form": form}
    found = []
    for grid in grids.split(","):
        rows, latents = map(int, grid.split("x"))
        given = {**fields, "shard_latents": latents}
        with tempfile.TemporaryDirectory() as folder:
            script = [__file__, "rank", json.dumps(given), folder]
            if rows * latents == 1:
                command = [sys.executable, *script]
            else:
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                           str(rows * latents), *script]  # fmt: skip
            subprocess.run(command, check=True)
            ranks = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))]
        planned = needs(_config(dict(given)).resolve(d, None)).total
        found.append({"data": rows, "latents": latents, "planned_bytes": planned, "ranks": ranks})
        print(f"{grid}: {max(r['peak_bytes'] for r in ranks) / 1e6:,.0f} MB on each, planned {planned / 1e6:,.0f}, "
              f"{ranks[0]['step_seconds']:.3f} s a step", file=sys.stderr)  # fmt: skip
    alone = found[0]["ranks"][0]["losses"]
    for run in found:
        run["loss_off"] = max(abs(a / b - 1) for a, b in zip(run["ranks"][0]["losses"], alone, strict=True))
    about = {"command": shlex.join(sys.argv), "environment": environment("cpu", shlex.join(sys.argv)), "given": fields}
    write_json(out, {**about, "runs": found})


def _kept(rank: dict[str, Any]) -> int:
    return rank["weight_bytes"] + rank["moment_bytes"]


@app.command()
def page(
    results: Annotated[Path, typer.Argument(help="what `measure` wrote")],
    page: Annotated[Path, typer.Option(help="Markdown file with the marks of results")] = Path("docs/distributed.md"),
) -> None:
    """Write the table into a page."""
    held = json.loads(results.read_text(encoding="utf-8"))
    given = held["given"]
    lines = [
        f"m {given['m']:,}, d {given['d']}, k {given['k']}, {given['batch_size']:,} rows a step, "
        f"{given['steps']} steps, form `{given['form']}`, on one machine. Losses: the largest relative "
        "distance from those of one process.",
        "",
        "| data x latents | weights and moments of a rank, MB | its peak, MB | planned, MB | s a step | losses |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for run in held["runs"]:
        ranks = run["ranks"]
        kept, peak = (max(map(of, ranks)) / 1e6 for of in (_kept, lambda r: r["peak_bytes"]))
        seconds, planned = statistics.median(r["step_seconds"] for r in ranks), run["planned_bytes"] / 1e6
        grid = f"{run['data']} x {run['latents']}"
        lines.append(f"| {grid} | {kept:,.0f} | {peak:,.0f} | {planned:,.0f} | {seconds:.3f} | {run['loss_off']:.1e} |")
    lines += ["", f"`{held['command']}`"]
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(START)
    page.write_text(before + START + "\n" + "\n".join(lines) + "\n" + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    app()
