# SPDX-License-Identifier: Apache-2.0
"""A function of the user's, named ``module:function``: found, and matched with an op."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from ..testing.bench_calls import CALLS, SIGNATURES


class OwnError(ValueError):
    """A function that cannot be found or matched with an op. The message says what to do."""


def load(name: str) -> Callable[..., Any]:
    """The function ``module:function``; the working directory counts as a place of modules."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise OwnError(f"a function is named module:function, got {name!r}")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module, module.partition(".")[0]):
            raise OwnError(f"{module} needs {error.name}, which is not installed") from error
        raise OwnError(f"no module {module!r} in {here} or where Python looks (is it installed?)") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = sorted(key for key, value in vars(found).items() if callable(value) and not key.startswith("_"))
            raise OwnError(f"{module} has no {attribute!r}; it has {', '.join(known) or 'no functions'}")
        found = getattr(found, part)
    if not callable(found):
        raise OwnError(f"{name} must be a function, got {type(found).__name__}")
    return found


def op_of(name: str, asked: str | None) -> str:
    """The op that a function is for: as asked, or the longest name of an op that is in the function's."""
    if asked is not None:
        if asked not in CALLS:
            raise OwnError(f"--op must be one of {', '.join(CALLS)} for a function of yours, got {asked!r}")
        return asked
    function = name.partition(":")[2].rpartition(".")[2].lower()
    fitting = [op for op in sorted(CALLS, key=len, reverse=True) if op in function]
    if not fitting:
        raise OwnError(
            f"the name {function!r} says no op; give --op, one of {', '.join(CALLS)}. The function is called as\n"
            + "\n".join(f"  {op}: {text}" for op, text in SIGNATURES.items())
        )
    return fitting[0]
