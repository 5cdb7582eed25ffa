# SPDX-License-Identifier: Apache-2.0
"""Where the kernels can run, and the entry of a function in the backend's table."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

OLDEST, TOO_NEW = (3, 6), (3, 8)
LEAST_CAPABILITY = (8, 0)


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU. As Triton reads the variable itself."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'fusae[triton]')"
    found = version("triton")
    numbers = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in found.split(".")[:2])
    if not OLDEST <= numbers < TOO_NEW:
        return f"triton >={OLDEST[0]}.{OLDEST[1]},<{TOO_NEW[0]}.{TOO_NEW[1]} is needed, {found} is installed"
    if not interpreting() and not torch.cuda.is_available():
        return "no GPU (TRITON_INTERPRET=1 interprets the kernels on the CPU, for tests)"
    return None


def by_name_only() -> str | None:
    """Why this backend is never an automatic choice here, or None."""
    if unavailable() is None and interpreting():
        return "interpreted on the CPU (TRITON_INTERPRET=1): only when asked for by name"
    return None


def why_not(*args: Any, **kwargs: Any) -> str | None:
    kind = "cpu" if interpreting() else "cuda"
    for arg in (*args, *kwargs.values()):
        if not isinstance(arg, Tensor):
            continue
        if arg.device.type != kind:
            return f"a tensor is on {arg.device}" + (", the kernels are interpreted" if kind == "cpu" else "")
        if arg.dtype == torch.float64:
            return "float64 is only on the reference"
        if kind == "cuda" and torch.version.hip is None and _capability(arg.device.index) < LEAST_CAPABILITY:
            return f"compute capability {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} or newer is needed"
    return None


@functools.cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def table(*functions: Callable[..., Any], why: Callable[..., str | None] = why_not) -> dict[str, tuple]:
    """Entries of a TABLE. Every function runs with the device of its first tensor as the current one."""

    def on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if args[0].device.type == "cpu":
                return function(*args, **kwargs)
            with torch.cuda.device(args[0].device):
                return function(*args, **kwargs)

        return run

    return {function.__name__: (on_its_device(function), why) for function in functions}
