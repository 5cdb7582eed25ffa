# SPDX-License-Identifier: Apache-2.0
"""Checks of the plain values of a configuration. Every message names the field, what was wanted and what came."""

from __future__ import annotations

import math


def whole(name: str, value: object, low: int = 0, high: int | None = None, high_name: str | None = None) -> int:
    """An int in ``[low, high]``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {type(value).__name__} {value!r}")
    if value < low or (high is not None and value > high):
        upper = f"{high_name} = {high}" if high_name else high
        wanted = f"at least {low}" if high is None else f"between {low} and {upper}"
        raise ValueError(f"{name} must be {wanted}, got {value}")
    return value


def number(name: str, value: object, low: float = 0.0, high: float = math.inf, *, above: bool = False) -> float:
    """A finite number, at least `low` (above `low`, with `above`) and below `high`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a plain number, got {type(value).__name__} {value!r}")
    if not math.isfinite(value) or not (value > low if above else value >= low) or value >= high:
        wanted = f"{'greater than' if above else 'at least'} {low:g}"
        wanted += " and finite" if high == math.inf else f" and less than {high:g}"
        raise ValueError(f"{name} must be {wanted}, got {value}")
    return value


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {type(value).__name__} {value!r}")
    return value


def choice(name: str, value: object, options: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")
    return value


def known(what: str, given: object, names: list[str]) -> None:
    """All keys of `given` are among `names`; a near miss is pointed out."""
    import difflib

    for key in given:
        if key not in names:
            close = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has: {', '.join(names)}"
            raise ValueError(f"{what} has no field {key!r}; {hint}")
