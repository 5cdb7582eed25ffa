# SPDX-License-Identifier: Apache-2.0
"""What can run here, and why the rest cannot."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable
from typing import Any

import torch

from . import _dispatch


def _or_error(ask: Callable[..., str | None], *args: Any, **kwargs: Any) -> str | None:
    """The answer, or what is wrong with the environment: the report shows it where a call would raise it."""
    try:
        return ask(*args, **kwargs)
    except ValueError as error:
        return str(error)


def explain(op: Callable[..., Any] | str, *args: Any, backend: str | None = None, **kwargs: Any) -> str:
    """Which backend runs a raw op, and why the others do not; or what of a model `fusae.accelerate` swaps.

    Args:
        op: a public op (``fusae.encode_topk``) or the name of a raw op (``"encode_topk_fwd"``); or a model or
            trainer of another tool, or several in a list or dict, which go to `fusae.integrations.describe`.
        *args, **kwargs: the raw op's arguments, to judge a particular call; without any, whether the backend has the op
            at all on this machine.
        backend: as if this backend were asked for. A `fusae.backend` context and ``FUSAE_BACKEND`` count as they do for
            a call.

    Returns:
        One line per backend in the order of choice, for every raw op behind `op`, its backward pass included.
    """
    held = isinstance(op, (torch.nn.Module, dict, list, tuple))
    if held or (hasattr(op, "__dict__") and not callable(op)):
        from .integrations import describe

        return describe(op)
    raw = _dispatch.raw_ops(op)
    if not raw:
        name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
        raise ValueError(f"op must be one of fusae's ops, got {name!r}; raw ops: {', '.join(_dispatch.ops())}")
    asked = _dispatch.requested(backend)
    lines = []
    for r in raw:
        chosen = False
        for name in _dispatch.ORDER:
            if asked not in (None, name):
                verdict = "not asked for"
            else:
                reason = _dispatch.why_not(r, name, args, kwargs, static=not args and not kwargs)
                if asked:
                    verdict = f"cannot: {reason}" if reason else "runs (asked for)"
                else:
                    reason = reason or _dispatch.by_name_only(name)
                    verdict = reason or ("can run" if chosen else "runs")
                chosen = chosen or reason is None
            lines.append(f"{r:16} {name:10} {verdict}")
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


def _cpu() -> str:
    from .backends import cpu  # raises where FUSAE_CPU_ISA names no instruction set of this machine

    return cpu.describe()


def report() -> str:
    """The text of ``python -m fusae``."""
    lines = [f"{name:10} {value}" for name, value in versions().items()]
    lines.append(f"{'CPU':10} {_or_error(_cpu)}")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        lines.append(f"{'GPU':10} {', '.join(names)} (CUDA {torch.version.cuda})")
    else:
        built = torch.version.cuda or torch.version.hip
        lines.append(f"{'GPU':10} none ({'no device found' if built else 'torch is a CPU build'})")
    asked = _or_error(_dispatch.requested)
    lines += [f"{'asked for':10} {asked}"] * bool(asked)
    lines += ["", f"{'op':18}" + "".join(f"{b:12}" for b in _dispatch.ORDER)]
    reasons: dict[str, str] = {}
    for op in _dispatch.ops():
        row = f"{op:18}"
        for backend in _dispatch.ORDER:
            reason = _or_error(_dispatch.why_not, op, backend, static=True)
            reason = reason or _dispatch.by_name_only(backend)
            if reason is not None:
                reasons.setdefault(reason, f"[{len(reasons) + 1}]")
            row += f"{'yes' if reason is None else reasons[reason]:12}"
        lines.append(row)
    lines += [""] * bool(reasons) + [f"{mark} {reason}" for reason, mark in reasons.items()]
    return "\n".join(lines)
