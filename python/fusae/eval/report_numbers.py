# SPDX-License-Identifier: Apache-2.0
"""Numbers as a reader wants them."""

from __future__ import annotations

import math

THIN = "\u202f"  # narrow no-break space, between a number and its unit


def count(value: float) -> str:
    """12345.0 → '12,345'."""
    return f"{value:,.0f}" if math.isfinite(value) else str(value)


def sig(value: float, digits: int = 3) -> str:
    """`digits` significant digits, no exponent where that is readable; whole numbers keep all their digits."""
    if not math.isfinite(value) or value == 0:
        return "0" if value == 0 else {"nan": "NaN", "inf": "∞", "-inf": "−∞"}[str(float(value))]
    exponent = int(f"{value:.{digits - 1}e}".split("e")[1])  # after rounding: 9.999 has the exponent of 10.0
    if exponent < -4:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("-", "−")
    return f"{value:,.{max(0, digits - 1 - exponent)}f}".replace("-", "−")


def big(value: float) -> str:
    """20_000_000 → '20.0 M'."""
    for scale, unit in ((1e9, "G"), (1e6, "M")):
        if math.isfinite(value) and value >= scale:
            return f"{sig(value / scale)}{THIN}{unit}"
    return count(value)


def percent(value: float) -> str:
    """0.0503 → '5.03 %'; small shares keep two digits."""
    if not math.isfinite(value):
        return sig(value)
    return f"{sig(100 * value, 3 if abs(value) >= 0.01 else 2)}{THIN}%"


def milliseconds(value: float) -> str:
    return sig(value, 3)


def size(value: float) -> str:
    for scale, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= scale:
            return f"{sig(value / scale)}{THIN}{unit}"
    return f"{count(value)}{THIN}B"


def duration(seconds: float) -> str:
    seconds = round(seconds)
    hours, minutes, rest = seconds // 3600, seconds // 60 % 60, seconds % 60
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    first = next((i for i, (n, _) in enumerate(parts) if n), 2)
    return " ".join(f"{n}{THIN}{unit}" for n, unit in parts[first : first + 2])
