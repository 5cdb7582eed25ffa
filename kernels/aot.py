# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel for GPUs that aren't there, and checks what a launch on them would need.

    python -m fusae.kernels.aot [--arch 80 90 100] [--only NAME] [--processes 2]

A job is a kernel in one of the configurations that it is launched in (`JOBS` of the ``aot_*.py`` beside this file). It
passes when it compiles, its shared memory fits a block of that GPU (Triton itself doesn't mind), its instructions are
those that are wanted, and, if it is a hot one, nothing is spilled. Runs with ``TRITON_INTERPRET`` unset only.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes of shared memory that a block can have, by compute capability."""

STACK = 8
"""Bytes of stack that pass: one 64-bit scalar put aside, with registers to spare, is no spilling inner loop."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One compilation.

    Attributes:
        module, kernel: ``module`` of `fusae.kernels` and the name of the function in it.
        types: Triton types of the arguments that are no constants: ``"*bf16"``, ``"i32"``, ``"i64"``.
        constants: values of the constexpr arguments.
        aligned: integer arguments that are multiples of 16 (pointers are anyway).
        hot: registers must not spill.
        archs: compute capabilities to compile for.
        want: by capability, a string that the PTX must hold ("wgmma").
    """

    name: str
    module: str
    kernel: str
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...] = ()
    warps: int = 4
    stages: int = 3
    hot: bool = True
    archs: tuple[int, ...] = (80, 90, 100)
    want: dict[int, str] = dataclasses.field(default_factory=dict)


def families() -> list[str]:
    return sorted(p.stem for p in Path(__file__).parent.glob("aot_*.py"))


def jobs() -> list[Job]:
    return [job for name in families() for job in importlib.import_module(f".{name}", __package__).JOBS]


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of stack) of a kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", out.stdout)
    if found is None:
        raise ValueError(f"no resource usage in: {out.stdout!r}")
    return int(found[1]), int(found[2])


def check(job: Job, arch: int) -> tuple[str, list[str]]:
    """A line about the compiled kernel, and what is wrong with it."""
    fn = getattr(importlib.import_module(f".{job.module}", __package__), job.kernel)
    signature, constants, attributes = {}, {}, {}
    unknown = [name for name in fn.arg_names if name not in job.constants and name not in job.types]
    if unknown:
        return "does not compile", [f"the job has neither type nor value of {', '.join(unknown)}"]
    for i, name in enumerate(fn.arg_names):
        if name in job.constants:
            signature[name], constants[(i,)] = "constexpr", job.constants[name]
        else:
            signature[name] = job.types[name]
            if signature[name].startswith("*") or name in job.aligned:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": job.warps, "num_stages": job.stages}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:
        return "does not compile", [f"{type(error).__name__}: {str(error)[-1500:]}"]
    registers, stack = resources(compiled.asm["cubin"])
    wrong = []
    if compiled.metadata.shared > SHARED[arch]:
        wrong.append(f"{compiled.metadata.shared} bytes of shared memory, {SHARED[arch]} fit")
    if job.hot and stack > STACK:
        wrong.append(f"{stack} bytes of stack: registers spill")
    if arch in job.want and job.want[arch] not in compiled.asm["ptx"]:
        wrong.append(f"no {job.want[arch]} in its PTX")
    return f"{registers:3} registers, stack {stack}, shared {compiled.metadata.shared}", wrong


def _line(job: Job, arch: int) -> tuple[str, bool]:
    about, wrong = check(job, arch)
    return f"{'FAIL' if wrong else 'ok':4} sm_{arch:<3} {job.name}: {'; '.join([about, *wrong])}", not wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels ahead of time and check their resources.")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--only", default="", help="jobs whose name contains this")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        sys.exit("unset TRITON_INTERPRET: the interpreter's functions can't be compiled")
    todo = [(job, arch) for job in jobs() if options.only in job.name for arch in job.archs if arch in options.arch]
    if not todo:
        sys.exit(f"no job has {options.only!r} in its name")
    failed = 0
    with ProcessPoolExecutor(options.processes) as pool:
        for line, good in pool.map(_line, *zip(*todo, strict=True)):
            failed += not good
            print(line, flush=True)
    print(f"{len(todo) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
