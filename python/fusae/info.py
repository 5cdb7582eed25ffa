# SPDX-License-Identifier: Apache-2.0
"""What can run here, and why the rest cannot."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable
from typing import Any

import torch

from . import _dispatch


def explain(op: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> str:
    """Which backend runs a raw op, and why the others do not.

    Args:
        op: a public op (``fusae.encode_topk``) or the name of a raw op (``"encode_topk_fwd"``).
        *args, **kwargs: the raw op's arguments, to judge a particular call; without any, whether the backend has the op
            at all on this machine.

    Returns:
        One line per backend in the order of choice, for every raw op behind `op`.
    """
    name = op if isinstance(op, str) else op.__name__
    raw = [r for r in _dispatch.ops() if r == name or r in (f"{name}_fwd", f"{name}_bwd")]
    if not raw:
        raise ValueError(f"op must be one of fusae's ops, got {name!r}; raw ops: {', '.join(_dispatch.ops())}")
    lines = []
    for r in raw:
        chosen = False
        for backend in _dispatch.ORDER:
            reason = _dispatch.why_not(r, backend, args, kwargs, static=not args and not kwargs)
            verdict = reason or ("can run" if chosen else "runs")
            chosen = chosen or reason is None
            lines.append(f"{r:16} {backend:10} {verdict}")
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Versions that decide a result: package, torch, triton, Python, platform."""
    from importlib.metadata import version

    has_triton = importlib.util.find_spec("triton") is not None
    return {
        "fusae": version("fusae"),
        "torch": torch.__version__,
        "triton": version("triton") if has_triton else "not installed",
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def report() -> str:
    """The text of ``python -m fusae``."""
    lines = [f"{name:10} {value}" for name, value in versions().items()]
    try:
        from .backends import cpu

        lines.append(f"{'CPU':10} {cpu.describe()}")
    except ImportError as error:
        lines.append(f"{'CPU':10} native module missing: {error}")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        lines.append(f"{'GPU':10} {', '.join(names)} (CUDA {torch.version.cuda})")
    else:
        built = torch.version.cuda or torch.version.hip
        lines.append(f"{'GPU':10} none ({'no device found' if built else 'torch is a CPU build'})")
    lines += ["", f"{'op':18}" + "".join(f"{b:12}" for b in _dispatch.ORDER)]
    reasons: dict[str, str] = {}
    for op in _dispatch.ops():
        row = f"{op:18}"
        for backend in _dispatch.ORDER:
            reason = _dispatch.why_not(op, backend, static=True)
            if reason is not None:
                reasons.setdefault(reason, f"[{len(reasons) + 1}]")
            row += f"{'yes' if reason is None else reasons[reason]:12}"
        lines.append(row)
    lines += [""] * bool(reasons) + [f"{mark} {reason}" for reason, mark in reasons.items()]
    return "\n".join(lines)
