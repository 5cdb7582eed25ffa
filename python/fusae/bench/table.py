# SPDX-License-Identifier: Apache-2.0
"""Rows of a benchmark as a table on the terminal."""

from __future__ import annotations

from rich.table import Table

from ..testing.bench_row import Row


def mib(count: int | None) -> str:
    return "—" if count is None else f"{count / 2**20:,.1f} MiB"


def ratio_text(row: Row) -> str:
    if row.ratio is None:
        return "—"
    if row.ratio_low is None or row.ratio_high is None or row.name == row.baseline:
        return f"{row.ratio:.2f}"
    return f"{row.ratio:.2f} ({row.ratio_low:.2f} – {row.ratio_high:.2f})"


def table_of(rows: list[Row]) -> Table:
    """One op at one shape; fusae's contenders stand out."""
    first = rows[0]
    shape = ", ".join(f"{key} {size:,}" for key, size in first.shape.items())
    title = f"{first.op} ({first.mode}): {shape}, {first.dtype}, {first.threads} threads, {first.rounds} rounds"
    table = Table(title=f"{title}, inputs {first.data}")
    table.add_column("contender")
    for column in ("p50 ms", "p20 – p80", f"× {first.baseline or 'baseline'}", "Gflop/s", "GB/s", "of roofline"):
        table.add_column(column, justify="right")
    table.add_column(f"peak memory\n(parameters {mib(first.parameter_bytes)})", justify="right")
    for row in rows:
        table.add_row(
            row.name + (f" ({row.backend})" if row.backend else ""),
            f"{row.p50_ms:.2f}", f"{row.p20_ms:.2f} – {row.p80_ms:.2f}", ratio_text(row),
            f"{row.tflops * 1e3:.1f}", f"{row.gbps:.1f}", f"{row.roofline:.0%}", mib(row.peak_bytes),
            style="bold" if row.name.startswith("fusae") else None,
        )  # fmt: skip
    return table
