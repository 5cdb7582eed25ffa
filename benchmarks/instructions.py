# SPDX-License-Identifier: Apache-2.0
"""Instructions that the CPU kernels execute on fixed inputs, beside another commit's. Needs no quiet machine.

    python benchmarks/instructions.py                      # beside the last commit (HEAD; HEAD~1 if nothing changed)
    python benchmarks/instructions.py --base v0.1 --band 0.01 --out counts.json
    python benchmarks/instructions.py --no-base            # count alone

Counted by callgrind (valgrind), in user space, one thread, fusae's own GEMM, the instruction sets that valgrind has
(not AVX-512). Both builds use this machine's compiler. A count that leaves the band is flagged: fewer is as much worth
a look as more, and a person decides; only --fail makes it an exit code. Instructions are not time: a kernel that waits
for memory can get slower with fewer of them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import base
import typer
from rich.console import Console
from rich.table import Table

from fusae.testing.bench_row import environment

OPS = ("topk", "encode_topk", "encode_threshold", "encode_batch_topk", "encode_topk_bwd", "decode", "decode_bwd",
       "decode_loss", "codes_from_dense", "adam_rows", "adam_rows_sparse", "adam_rows_8bit")  # fmt: skip
SHAPE = {"n": 64, "d": 96, "m": 1024, "k": 16}

# Requests to callgrind are instructions that mean nothing elsewhere; this is how a process makes them.
_REQUESTS = """
#include <valgrind/callgrind.h>
extern "C" void begin() { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
extern "C" void dump(const char* name) { CALLGRIND_DUMP_STATS_AT(name); CALLGRIND_STOP_INSTRUMENTATION; }
"""

_CHILD = """
import ctypes, json, sys
site, library, spec = sys.argv[1], ctypes.CDLL(sys.argv[2]), json.loads(sys.argv[3])
if site:
    sys.meta_path[:] = [f for f in sys.meta_path
                        if "Editable" not in type(f).__name__ and "Scikit" not in type(f).__name__]
    sys.path.insert(0, site)
import torch
torch.set_num_threads(1)
import fusae
assert not site or fusae.__file__.startswith(site), f"{fusae.__file__} is not the commit that was built in {site}"
from fusae.backends import cpu
from fusae.testing import workloads
cpu.set_isa(spec["isa"])
inputs = workloads.make_inputs(**spec["shape"], batches=1)
with cpu.force_gemm("native"):
    for op in spec["ops"]:
        names = [name for name in workloads.CONTENDERS.get(op, {}) if name in ("fusae", "fusae 8-bit")]
        if not names:
            continue
        call = workloads.CONTENDERS[op][names[0]](inputs, spec["shape"]["k"], "cpu")
        call()
        library.begin()
        call()
        library.dump(op.encode())
"""


def missing() -> str | None:
    """Why nothing can be counted here, or None."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed"
    if not Path("/usr/include/valgrind/callgrind.h").exists():
        return "valgrind/callgrind.h is not installed (a package valgrind-dev or valgrind-devel has it)"
    return None if shutil.which("c++") else "no C++ compiler"


def parse(folder: Path) -> dict[str, int]:
    """Op -> instructions, of the dumps in a folder."""
    found = {}
    for path in folder.glob("callgrind.out*"):
        text = path.read_text(encoding="utf-8", errors="replace")
        op = re.search(r"^desc: Trigger: Client Request: (\w+)$", text, re.M)
        total = re.search(r"^(?:summary|totals): (\d+)", text, re.M)
        if op and total:
            found[op[1]] = int(total[1])
    return found


def count(site: str, isa: str, ops: list[str], shape: dict[str, int] = SHAPE, timeout: float = 1800) -> dict[str, int]:
    """Op -> instructions of one call, the second, of the package in `site` ("": the one that is installed here)."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "requests.so"
        source = library.with_suffix(".cpp")
        source.write_text(_REQUESTS)
        subprocess.run(["c++", "-O1", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
        spec = json.dumps({"isa": isa, "ops": ops, "shape": shape})
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/callgrind.out",
                   sys.executable, "-c", _CHILD, site, str(library), spec]  # fmt: skip
        own = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "MKL_CBWR": "COMPATIBLE"}
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **own}, cwd=folder, timeout=timeout, check=False
        )
        found = parse(Path(folder))
        if done.returncode or not found:
            raise base.BaseError(f"counting {isa} failed:\n{done.stderr.strip()[-2000:]}")
        return found


def flagged(own: int, other: int, band: float) -> bool:
    return abs(own / other - 1) > band


def table_of(counts: dict[str, dict[str, dict[str, int]]], band: float, console: Console) -> list[str]:
    """Prints the counts; what left the band. ``counts[isa]["own" or "base"][op]``."""
    table, found = Table(title=f"instructions of one call, band {band:.1%}"), []
    for column in ("isa", "op", "base", "here", "change"):
        table.add_column(column, justify="left" if column in ("isa", "op") else "right")
    for isa, both in counts.items():
        for op, own in both["own"].items():
            other = both.get("base", {}).get(op)
            change, style = "—", None
            if other:
                change = f"{own / other - 1:+.2%}"
                if flagged(own, other, band):
                    style = "yellow"
                    found.append(f"{isa} {op}: {change}")
            table.add_row(isa, op, "—" if other is None else f"{other:,}", f"{own:,}", change, style=style)
    console.print(table)
    return found


def main(
    rev: Annotated[str | None, typer.Option("--base", help="commit to compare with; default: the last one")] = None,
    compare: Annotated[bool, typer.Option("--compare/--no-base", help="build and count another commit")] = True,
    isa: Annotated[list[str] | None, typer.Option(help="avx2, generic (repeatable)")] = None,
    op: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(OPS)} (repeatable)")] = None,
    band: Annotated[float, typer.Option(min=0, help="share by which a count may differ")] = 0.02,
    fail: Annotated[bool, typer.Option("--fail", help="exit code 1 where a count leaves the band")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
) -> None:
    """Count instructions of the CPU kernels, beside another commit's."""
    console = Console(width=120)
    if reason := missing():
        console.print(f"[red]error[/] nothing can be counted: {reason}")
        raise typer.Exit(2)
    ops, isas = list(op or OPS), list(isa or ("avx2", "generic"))
    if unknown := [each for each in ops if each not in OPS]:
        raise typer.BadParameter(f"must be among {', '.join(OPS)}, got {unknown}", param_hint="--op")
    where = environment(command=" ".join(["python benchmarks/instructions.py", *sys.argv[1:]]))
    counts: dict[str, dict[str, dict[str, int]]] = {each: {"own": count("", each, ops)} for each in isas}
    commit = None
    try:
        if compare:
            with base.built(rev or ("HEAD" if where["dirty"] else "HEAD~1")) as (commit, site):
                for each in isas:
                    counts[each]["base"] = count(str(site), each, ops)
    except base.BaseError as error:
        console.print(f"[red]error[/] {error}", markup=True)
        raise typer.Exit(2) from None
    found = table_of(counts, band, console)
    for line in found:
        console.print(f"[yellow]look at[/] {line}")
    if out is not None:
        out.write_text(json.dumps({"shape": SHAPE, "base": commit, "counts": counts, **where}, indent=1) + "\n")
    if found and fail:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
