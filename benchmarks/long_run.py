# SPDX-License-Identifier: Apache-2.0
"""One command from raw text to a report, watched from outside: it says no warning and its memory stays flat.

    python benchmarks/long_run.py [--tokens 1000000] [--store stream] [--out results.json]

Runs ``fusae train CONFIG`` on the demo's model and text in a process of its own and reads the private memory of that
process (RssAnon of /proc) five times a second. Memory comes and goes within a batch (logits, the activations of a
layer), so what must be flat are the high-water marks: of the windows of 10 s of a stage, the first fifth of the stage
left out (buffers and moments are made there), each has its highest reading within 5 % of the median of those readings.
The lowest and the highest single reading are in the results too.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fusae.data import fetch_demo
from fusae.formats.native import write_json
from fusae.testing.bench_row import environment

BAND = 0.05
WARM = 0.2
WINDOW = 10.0  # seconds


def config_text(files: Any, tokens: int, m: int, store: str, module: str, cache: Path) -> str:
    return f"""
m = {m}
k = 32
batch_size = 4096
lr = 1e-3
epochs = 1
tokens = {tokens}
checkpoint_every = 50

[data]
model = "{files.model}"
module = "{module}"
text = "{files.news}"
train_tokens = {tokens}
held_out_tokens = 20000
loss_tokens = 5000
store = "{store}"
cache = "{cache}"
features = 100
"""


def watch(process: subprocess.Popen, samples: list[tuple[float, int]]) -> None:
    """Private memory of the process in bytes, with the time, until it ends."""
    path = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            found = re.search(r"RssAnon:\s+(\d+) kB", path.read_text())
        except OSError:
            return
        if found:
            samples.append((time.monotonic(), 1024 * int(found[1])))
        time.sleep(0.2)


def stages_of(lines: list[tuple[float, str]], samples: list[tuple[float, int]], end: float) -> list[dict[str, Any]]:
    """Memory by stage, from the times at which the stages were announced."""
    starts = [(when, m[1]) for when, line in lines if (m := re.match(r"\d/\d (\w+):", line))]
    found = []
    for (start, name), stop in zip(starts, [*(when for when, _ in starts[1:]), end], strict=True):
        warm = start + WARM * (stop - start)
        inside = [(when, size) for when, size in samples if warm <= when < stop]
        windows = int((stop - warm) / WINDOW)  # whole ones
        if windows < 3:
            continue
        marks = [max(size for when, size in inside if 0 <= when - warm - i * WINDOW < WINDOW) for i in range(windows)]
        sizes, level = [size for _, size in inside], statistics.median(marks)
        found.append({
            "stage": name, "seconds": round(stop - start, 1), "marks_bytes": marks, "level_bytes": level,
            "low": min(marks) / level - 1, "high": max(marks) / level - 1,
            "lowest_bytes": min(sizes), "highest_bytes": max(sizes),
        })  # fmt: skip
    return found


def main(
    tokens: Annotated[int, typer.Option(help="of activations to train on")] = 1_000_000,
    m: Annotated[int, typer.Option(help="latents")] = 8192,
    store: Annotated[str, typer.Option(help="of the activations: 'stream', 'float16', ...")] = "float16",
    module: Annotated[str, typer.Option(help="site in the model")] = "model.layers.5",
    run: Annotated[Path | None, typer.Option(help="directory of the run; default: a temporary one")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
) -> None:
    files = fetch_demo()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "run.toml").write_text(config_text(files, tokens, m, store, module, folder / "cache"))
        command = [sys.executable, "-W", "default", "-m", "fusae", "train", str(folder / "run.toml")]
        command += ["--out", str(run or folder / "run")]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"})
        samples: list[tuple[float, int]] = []
        lines: list[tuple[float, str]] = []
        begun = time.monotonic()
        watcher = threading.Thread(target=watch, args=(process, samples), daemon=True)
        watcher.start()
        for line in process.stderr:
            lines.append((time.monotonic(), line.rstrip()))
            print(line, end="", file=sys.stderr, flush=True)
        status, end = process.wait(), time.monotonic()
        report = (run or folder / "run") / "report.html"
        size = report.stat().st_size if report.exists() else 0
        metrics = (run or folder / "run") / "metrics.jsonl"
        last = json.loads(metrics.read_text().splitlines()[-1]) if metrics.exists() else None
    warnings = [line for _, line in lines if "warning" in line.lower()]
    stages = stages_of(lines, samples, end)
    uneven = []
    for stage in stages:
        flat = max(-stage["low"], stage["high"]) <= BAND
        print(f"{'flat' if flat else 'NOT FLAT'} {stage['stage']}: {stage['level_bytes'] / 2**20:,.0f} MiB "
              f"{100 * stage['low']:+.1f} % {100 * stage['high']:+.1f} %, {stage['seconds']:,.0f} s; single readings "
              f"{stage['lowest_bytes'] / 2**20:,.0f} to {stage['highest_bytes'] / 2**20:,.0f} MiB")  # fmt: skip
        uneven += [] if flat else [stage["stage"]]
    print(f"exit {status}, {len(warnings)} warnings, report of {size / 2**20:.1f} MiB, {end - begun:,.0f} s")
    if out is not None:
        write_json(out, {
            "tokens": tokens, "m": m, "store": store, "module": module, "exit": status, "warnings": warnings,
            "stages": stages, "report_bytes": size, "seconds": round(end - begun, 1), "last": last,
            **environment(command=shlex.join(["python", "benchmarks/long_run.py", *sys.argv[1:]])),
        })  # fmt: skip
    if status or warnings or uneven:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
