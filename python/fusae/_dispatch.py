# SPDX-License-Identifier: Apache-2.0
"""Which backend runs an op on given tensors, and why the others do not.

One ordered table. A backend module (``fusae/backends/<name>.py``) registers one function per op; the first backend in
`ORDER` that has no reason against a call runs it. A backend that was asked for by name (argument, `backend()` context
or the environment variable ``FUSAE_BACKEND``) runs or raises: there is never a substitute.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from . import _vmap

ORDER = ("cuda", "triton", "cpu", "reference")

_lib = torch.library.Library("fusae", "DEF")
_ops: list[str] = []
_public: dict[str, tuple[str, ...]] = {}


class _Forced(threading.local):
    """The backend of the innermost `backend()` context of this thread. (torch.compile traces no ``ContextVar``.)"""

    name: str | None = None


_forced = _Forced()


class _Entry(NamedTuple):
    run: Callable[..., Any]
    why_not: Callable[..., str | None]


class _Backend(NamedTuple):
    unavailable: str | None
    entries: dict[str, _Entry]
    by_name_only: str | None = None  # why it is no automatic choice


_backends: dict[str, _Backend] = {}


class BackendError(RuntimeError):
    """The requested backend cannot run this call. The message says why."""


def define(schema: str, fake: Callable[..., Any], rows: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Define the torch op ``fusae::<schema>`` (last argument: ``str? backend=None``) and return its callable.

    Registered once, for every device: the implementation asks `select`. `fake` gives the outputs' shapes for tracing.
    `rows` names the arguments that ``torch.vmap`` may join into one call; see `_vmap.rule`.
    Raw ops have no autograd formula; the public functions put a ``torch.autograd.Function`` around them. Arguments that
    the schema marks as written to are made known to autograd, so that a graph which saved one of them raises.
    """
    name = schema.split("(", 1)[0]
    _lib.define(schema)
    arguments = torch._C.parse_schema(f"fusae::{schema}").arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]

    def run(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        chosen, device = select(name, args, kwargs, backend), args[0].device.type
        # Inputs were cast in public; sums inside stay float32.
        off = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()
        with off:
            result = chosen(*args, **kwargs)
        # Optional tensors may be None; at the end of a call torch leaves them out.
        torch.autograd.graph.increment_version([args[i] for i in written if i < len(args) and args[i] is not None])
        return result

    torch.library.impl(_lib, name, "CompositeExplicitAutograd")(run)
    torch.library.register_fake(f"fusae::{name}", fake, lib=_lib)
    op = getattr(torch.ops.fusae, name).default
    torch.library.register_vmap(f"fusae::{name}", _vmap.rule(op, rows), lib=_lib)
    _ops.append(name)
    return op


def public(*raw: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a public function with the raw ops that it and its backward pass run."""

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        function.raw_ops = _public[function.__name__] = raw
        return function

    return mark


def ops() -> tuple[str, ...]:
    """Names of all raw ops, in the order of their definition."""
    return tuple(_ops)


def raw_ops(op: Callable[..., Any] | str) -> tuple[str, ...]:
    """The raw ops behind a public function, its name, or the name of one of them; none for anything else."""
    if callable(op):
        return getattr(op, "raw_ops", ())
    return (op,) if op in _ops else _public.get(op, ())


def _load(name: str) -> _Backend:
    """The backend's table, imported on first use (a missing native part is a reason, not an error)."""
    if name not in _backends:
        try:
            module = importlib.import_module(f"fusae.backends.{name}")
        except ModuleNotFoundError as error:
            if error.name not in (f"fusae.backends.{name}", "fusae.kernels"):
                raise
            _backends[name] = _Backend(f"this version of fusae has no {name} kernels", {})
        else:
            entries = {op: _Entry(run, why_not) for op, (run, why_not) in module.TABLE.items()}
            by_name_only = module.by_name_only() if hasattr(module, "by_name_only") else None
            _backends[name] = _Backend(module.unavailable(), entries, by_name_only)
    return _backends[name]


def why_not(op: str, backend: str, args: tuple = (), kwargs: dict | None = None, *, static: bool = False) -> str | None:
    """The reason why `backend` cannot run `op` on these arguments, or None. With `static`, without looking at any."""
    loaded = _load(backend)
    if loaded.unavailable is not None:
        return loaded.unavailable
    entry = loaded.entries.get(op)
    if entry is None:
        return f"no {op} kernel"
    return None if static else entry.why_not(*args, **(kwargs or {}))


def by_name_only(backend: str) -> str | None:
    """The reason why `backend`, though it can run, is never chosen automatically, or None."""
    return _load(backend).by_name_only


def _check_name(name: str, where: str) -> str:
    if name not in ORDER:
        raise ValueError(f"{where} must be one of {', '.join(ORDER)}, got {name!r}")
    return name


def requested(backend: str | None = None) -> str | None:
    """The backend asked for: the argument, else the innermost `backend()` context, else ``FUSAE_BACKEND``, or None."""
    if backend is not None:
        return _check_name(backend, "backend")
    if _forced.name is not None:
        return _forced.name
    name = os.environ.get("FUSAE_BACKEND")
    return _check_name(name, "the environment variable FUSAE_BACKEND") if name else None


def select(op: str, args: tuple, kwargs: dict, backend: str | None = None) -> Callable[..., Any]:
    """The function that runs this call."""
    name = requested(backend)
    if name is not None:
        reason = why_not(op, name, args, kwargs)
        if reason is not None:
            raise BackendError(f"backend {name!r} was asked for but cannot run {op}: {reason}")
        return _load(name).entries[op].run
    for name in ORDER:
        if by_name_only(name) is None and why_not(op, name, args, kwargs) is None:
            return _load(name).entries[op].run
    reasons = "; ".join(f"{name}: {by_name_only(name) or why_not(op, name, args, kwargs)}" for name in ORDER)
    raise BackendError(f"no backend can run {op}: {reasons}")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op inside the ``with`` block on backend `name` ("cuda", "triton", "cpu" or "reference"), or raise.

    It holds for the thread that entered it, and for the backward passes of what was computed inside. An op traced by
    ``torch.compile`` keeps the backend that was in force when it was traced.
    """
    before, _forced.name = _forced.name, _check_name(name, "backend")
    try:
        yield
    finally:
        _forced.name = before
