# SPDX-License-Identifier: Apache-2.0
"""A tool beside itself with fusae under it: times in turns, and the peak memory of each in a process of its own.

A module of a tool (`rivals_sparsify`, `rivals_dictionary_learning`) holds a table ``CONTENDERS[work][name]`` as
`fusae.testing.workloads` does; the first name is the tool as it is, "gemm" the bare matrix product of its encoder.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from statistics import median

# Before torch starts its threads: idle ones sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

sys.path.insert(0, str(Path(__file__).parent))
from fusae.formats.native import write_json
from fusae.testing.bench import interleaved, peak_memory, ratio
from fusae.testing.bench_row import environment
from fusae.testing.workloads import CONTENDERS as OURS
from fusae.testing.workloads import Build, make_inputs

TOOLS = {  # the package of a module here
    "rivals_saelens": "sae-lens",
    "rivals_sparsify": "eai-sparsify",
    "rivals_dictionary_learning": "dictionary-learning",
}
GEMM = OURS["train_step"]["gemm"]


def besides_gemm(works: dict[str, dict[str, Build]]) -> dict[str, dict[str, Build]]:
    """The same table with the encoder's bare matrix product last in every row."""
    return {work: {**table, "gemm": GEMM} for work, table in works.items()}


def compare(module: str, work: str, shape: dict[str, int], rounds: int, memory: bool, batches: int = 2) -> list[dict]:
    """One dict for each contender: milliseconds, times over the tool and over the bare product, peak bytes."""
    table = sys.modules[module].CONTENDERS[work] if module in sys.modules else __import__(module).CONTENDERS[work]
    inputs = make_inputs(**shape, batches=batches)
    calls = {name: build(inputs, shape["k"], "") for name, build in table.items()}
    times = interleaved(calls, rounds, 1)
    tool, rows = next(iter(table)), []
    del calls
    for name in table:
        spec = {"module": module, "op": work, "name": name, "backend": "", "batches": batches, **shape}
        peak = peak_memory("fusae.testing.bench:contender", spec) if memory else None
        rows.append({
            "work": work, "name": name, "shape": shape, "rounds": rounds, "threads": torch.get_num_threads(),
            "p50_ms": 1e3 * median(times[name]), "speedup": ratio(times, tool, name),
            "over_gemm": ratio(times, name, "gemm"), "peak_bytes": peak,
        })  # fmt: skip
    return rows


def main(module: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("n", 2048), ("d", 768), ("m", 32768), ("k", 32), ("rounds", 7), ("threads", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--work", nargs="*", help="which of the table (default: all)")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = []
    for work in args.work or __import__(module).CONTENDERS:
        rows += compare(module, work, {c: getattr(args, c) for c in "ndmk"}, args.rounds, not args.no_memory)
        for row in (r for r in rows if r["work"] == work):
            peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:8.0f} MiB"
            print(f"{work:12} {row['name']:36} {row['p50_ms']:9.1f} ms  {row['speedup']:5.2f}x the tool  "
                  f"{row['over_gemm']:5.2f} gemm  {peak}", flush=True)  # fmt: skip
    if args.json:
        command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
        found = {"rows": rows, "tool": TOOLS[module], **environment(command=command)}
        found["versions"] = {**found["versions"], TOOLS[module]: version(TOOLS[module])}
        write_json(args.json, found)
