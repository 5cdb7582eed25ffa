# SPDX-License-Identifier: Apache-2.0
"""`Row`: one line of a benchmark, its JSON schema, and where a measurement was taken.

A results file is ``{"rows": [row, ...]}``. Every row carries ``"schema": 1``; the version rises when a field changes
its meaning or goes, and a reader refuses versions it does not know.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1
MODES = ("fwd", "bwd", "step")
_NEW = "benchmarks/run.py writes such files"
_LATER = ("ratio_low", "ratio_high", "absent")


class RowError(ValueError):
    """A results file does not hold benchmark rows of this schema. The message names file, row and field."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What one contender took for one op at one shape. Times are of single calls; see `fusae.testing.bench`."""

    op: str  #: a key of `fusae.testing.workloads.CONTENDERS`
    mode: str  #: "fwd", "bwd" or "step"
    name: str  #: the contender: "fusae", "plain torch", "gemm", ...
    backend: str | None  #: the fusae backend that ran it; None for a contender that is not fusae
    shape: dict[str, int]  #: n rows, d width, m latents, k active a row
    dtype: str  #: "float32", "bfloat16", ...
    threads: int  #: torch.get_num_threads() of the run
    rounds: int  #: number of timed calls
    p20_ms: float
    p50_ms: float
    p80_ms: float
    baseline: str | None  #: the contender that `ratio` is against; None where the run had no such contender
    ratio: float | None  #: median over the rounds of (time of this call / time of the baseline's call in that round)
    flops: int  #: useful work of the op, the same for all contenders: `fusae.testing.workloads.cost`
    bytes: int  #: memory the op must move at least, the same for all contenders
    tflops: float  #: flops / p50
    gbps: float  #: bytes / p50, in 1e9 bytes a second
    peak_tflops: float  #: compute rate in this run: on a CPU, multiply-adds in registers; on a GPU, a large GEMM
    memory_gbps: float  #: rate of a pass over a large buffer in place (bytes read + written) in this run
    roofline: float  #: max(flops / compute rate, bytes / memory rate) / p50: 1 is as fast as this machine could be
    peak_bytes: int | None  #: peak of one call above the level before it, in a fresh process; None: not measured
    parameter_bytes: int  #: weights and biases, without optimiser state
    data: str  #: "planted" (see `fusae.testing.workloads.planted`) or the name of a file of activations
    device: str  #: CPU or GPU name
    isa: str  #: instruction set of the CPU kernels
    versions: dict[str, str]
    git: str | None  #: commit of the package's working tree; None outside one
    dirty: bool | None  #: whether tracked files differed from that commit
    time: str  #: start of the run, UTC, ISO 8601
    command: str
    schema: int = SCHEMA
    # Later fields: a file of before does not have them.
    ratio_low: float | None = None  #: the ratio lies between these with 95 % (of the rounds, not of other machines)
    ratio_high: float | None = None
    absent: dict[str, str] = dataclasses.field(default_factory=dict)  #: contenders that did not run, and why

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {value!r}"


def _problem(field: str, wanted: str, value: Any) -> str | None:
    """Why `value` is not of the annotated type `wanted`, or None."""
    if value is None:
        return None if wanted.endswith("| None") else f"{field} must not be null"
    base = wanted.removesuffix(" | None")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if base == "str" and not (isinstance(value, str) and value):
        return f"{field} must be a non-empty string, got {_kind(value)}"
    if base == "bool" and not isinstance(value, bool):
        return f"{field} must be true or false, got {_kind(value)}"
    if base == "int" and not (number and isinstance(value, int) and value >= 0):
        return f"{field} must be an integer >= 0, got {_kind(value)}"
    if base == "float" and not (number and math.isfinite(value) and value >= 0):
        return f"{field} must be a finite number >= 0, got {_kind(value)}"
    if base.startswith("dict") and not isinstance(value, Mapping):
        return f"{field} must be an object, got {_kind(value)}"
    return None


def problems(value: Any) -> list[str]:
    """Everything that keeps `value` (decoded JSON) from being a `Row`; empty if nothing does."""
    if not isinstance(value, Mapping):
        return [f"must be an object, got {_kind(value)}"]
    if value.get("schema") != SCHEMA:
        return [f"schema must be {SCHEMA}, got {_kind(value.get('schema'))}: written by another version of fusae?"]
    fields = {f.name: str(f.type) for f in dataclasses.fields(Row)}
    found = [f"{name} is missing" for name in fields if name not in value and name not in _LATER]
    found += [f"{name} is not a field of a benchmark row" for name in value if name not in fields]
    typed = [_problem(name, wanted, value[name]) for name, wanted in fields.items() if name in value]
    found += [problem for problem in typed if problem]
    if found:
        return found
    if value["mode"] not in MODES:
        found.append(f"mode must be one of {', '.join(MODES)}, got {value['mode']!r}")
    if set(value["shape"]) != set("ndmk"):
        keys = ", ".join(map(str, value["shape"])) or "none"
        found.append(f"shape must have exactly the keys n, d, m, k, got {keys}")
    found += [
        f"shape.{key} must be an integer >= 1, got {_kind(size)}"
        for key, size in value["shape"].items()
        if not isinstance(size, int) or isinstance(size, bool) or size < 1
    ]
    if ("ratio_low" in value) != ("ratio_high" in value):
        found.append("ratio_low and ratio_high must be given together")
    found += [
        f"absent.{key} must be a string, got {_kind(text)}"
        for key, text in value.get("absent", {}).items()
        if not isinstance(text, str)
    ]
    found += [
        f"versions.{key} must be a string, got {_kind(text)}"
        for key, text in value["versions"].items()
        if not isinstance(text, str)
    ]
    if not value["p20_ms"] <= value["p50_ms"] <= value["p80_ms"]:
        found.append(f"p20_ms <= p50_ms <= p80_ms must hold, got {[value[f'p{q}_ms'] for q in (20, 50, 80)]}")
    if (value["ratio"] is None) != (value["baseline"] is None):
        found.append("ratio and baseline must be given together, or both be null")
    return found


def parse_rows(value: Any, where: str) -> list[Row]:
    """Rows of a decoded results file; `RowError` lists every problem with the number of its row."""
    if not isinstance(value, Mapping) or not isinstance(value.get("rows"), list):
        raise RowError(f'{where}: must be {{"rows": [...]}}; {_NEW}')
    found = [f"rows[{i}]: {problem}" for i, row in enumerate(value["rows"]) for problem in problems(row)]
    if found:
        raise RowError(f"{where}: " + "; ".join(found[:10]) + (f"; and {len(found) - 10} more" * (len(found) > 10)))
    return [Row(**row) for row in value["rows"]]


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a results file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RowError(f"{path}: no such file; {_NEW}") from None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise RowError(f"{path}: is not JSON ({error}); {_NEW}") from None
    return parse_rows(value, str(path))


def append_rows(path: str | os.PathLike[str], rows: Iterable[Row]) -> None:
    """Add rows to a results file, made if absent. What is in it already must be valid; it is replaced in one move."""
    path = Path(path)
    both = (read_rows(path) if path.exists() else []) + list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps({"rows": [row.to_json() for row in both]}, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def _git(*arguments: str) -> str | None:
    """Output of git in the directory of this file, None where git, a repository or the answer is missing."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor() or platform.machine()} ({os.cpu_count()} CPUs)"


def _isa() -> str:
    torch_isa = f"torch {torch.backends.cpu.get_cpu_capability()}"
    try:
        from ..backends import cpu
    except ImportError:  # no native module here: only torch's own kernels run
        return torch_isa
    return f"{cpu.describe().partition(';')[0]}, {torch_isa}"


def environment(device: str = "cpu", command: str = "") -> dict[str, Any]:
    """The fields of a `Row` that say where and when: device, isa, versions, git, dirty, time, command."""
    from ..info import versions

    # An installed copy may lie inside another repository (a virtual environment does): only a tracked file counts.
    tracked = _git("ls-files", "--error-unmatch", Path(__file__).name) is not None
    changed = _git("status", "--porcelain", "--untracked-files=no") if tracked else None
    return {
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else _cpu_name(),
        "isa": _isa(),
        "versions": versions(),
        "git": _git("rev-parse", "HEAD") if tracked else None,
        "dirty": None if changed is None else bool(changed),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command or "python",
    }
