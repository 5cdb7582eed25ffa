# SPDX-License-Identifier: Apache-2.0
"""Do two runs agree? Ratios to the baseline of the contenders that both hold, side by side.

    python benchmarks/compare.py first.json second.json [--within 0.1]

Exit code 1 where a ratio of fusae's differs by more, 2 where the files cannot be compared. Times are not compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from page import latest
from rich.console import Console
from rich.table import Table

from fusae.testing.bench import Row, RowError, read_rows


def pairs(first: list[Row], second: list[Row]) -> list[tuple[Row, Row]]:
    """Rows of the same contender at the same shape with the same baseline, but for the baselines themselves."""

    def key(r: Row) -> tuple:
        return (r.op, *r.shape.values(), r.dtype, r.threads, r.data, r.device, r.name, r.baseline)

    other = {key(r): r for r in latest(second)}
    found = [(r, other[key(r)]) for r in latest(first) if key(r) in other]
    return [(a, b) for a, b in found if a.ratio and b.ratio and a.name != a.baseline]


def main(
    first: Annotated[Path, typer.Argument()],
    second: Annotated[Path, typer.Argument()],
    within: Annotated[float, typer.Option(min=0, help="share by which ratios may differ")] = 0.10,
) -> None:
    """Compare the ratios of two results files."""
    console = Console(width=120)
    try:
        both = pairs(read_rows(first), read_rows(second))
        if not both:
            raise RowError(f"{first} and {second} hold no contender at the same shape on the same device")
    except RowError as error:
        console.print(f"[red]error[/] {error}")
        raise typer.Exit(2) from None
    table, apart = Table(), 0
    for column in ("op", "contender", "first", "second", "apart"):
        table.add_column(column, justify="left" if column in ("op", "contender") else "right")
    for a, b in both:
        difference = max(a.ratio, b.ratio) / min(a.ratio, b.ratio) - 1
        ours = a.name.startswith("fusae")
        apart += ours and difference > within
        style = "red" if ours and difference > within else None
        where, ratios = f"{a.op} {a.shape['m']}", (f"{a.ratio:.3f}", f"{b.ratio:.3f}")
        table.add_row(where, a.name, *ratios, f"{difference:.1%}", style=style)
    console.print(table)
    console.print(f"{apart} of fusae's ratios differ by more than {within:.0%}")
    if apart:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
