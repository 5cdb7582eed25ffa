# SPDX-License-Identifier: Apache-2.0
"""docs/benchmarks.md and the generated blocks of README.md, from a folder of results files."""

from __future__ import annotations

from pathlib import Path

import figures

from fusae.testing import workloads
from fusae.testing.bench import Row, RowError, read_rows
from fusae.testing.bench_shares import OP as PARTS

FILES = ("bars.json", "scaling.json", "ops.json", "shares.json")
MADE = "<!-- made by `python benchmarks/report.py --all {folder}`; do not edit -->"
BLOCKS = ("figure", "crossover")
_NOT_YET = "Not measured yet on this device: `make bench` does it."


def latest(rows: list[Row]) -> list[Row]:
    """The last row of every (op, shape, dtype, threads, data, device, contender), groups in the order of the file."""
    kept = {(r.op, tuple(sorted(r.shape.items())), r.dtype, r.threads, r.data, r.device, r.name): r for r in rows}
    return list(kept.values())


def read(folder: Path) -> dict[str, list[Row]]:
    """The rows of every file of `FILES` that is there."""
    found = {name: latest(read_rows(folder / name)) for name in FILES if (folder / name).exists()}
    if not found:
        raise RowError(f"{folder}: has none of {', '.join(FILES)}")
    return found


def short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def mib(count: int | None) -> str:
    return "—" if count is None else short(count / 2**20)


def joined(values: list[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def commit(row: Row) -> str:
    if row.git is None:
        return "an unknown commit"
    return f"`{row.git[:12]}`" + (" with local changes" if row.dirty else "")


def against(row: Row) -> str:
    if row.ratio is None:
        return "—"
    sure = "" if row.ratio_low is None or row.name == row.baseline else f" ({row.ratio_low:.2f} – {row.ratio_high:.2f})"
    return f"{row.ratio:.2f}{sure} × {row.baseline}"


def table(rows: list[Row]) -> list[str]:
    lines = [
        "| op | n, d, m, k | dtype | contender | p50 ms (p20 – p80) | × baseline | roofline | peak MiB (parameters) |",
        "|---|---|---|---|---:|---:|---:|---:|",
    ]
    for r in rows:
        name = f"**{r.name}** ({r.backend})" if r.backend else r.name
        lines.append(
            f"| {r.op} | {', '.join(str(r.shape[key]) for key in 'ndmk')} | {r.dtype} | {name} "
            f"| {short(r.p50_ms)} ({short(r.p20_ms)} – {short(r.p80_ms)}) | {against(r)} | {r.roofline:.0%} "
            f"| {mib(r.peak_bytes)} ({mib(r.parameter_bytes)}) |"
        )
    return lines


def origin(rows: list[Row], source: str) -> str:
    days = sorted({r.time[:10] for r in rows})
    absent = {name: why for r in rows for name, why in r.absent.items()}
    left = f" Absent: {'; '.join(f'{name} ({why})' for name, why in absent.items())}." if absent else ""
    torch = joined([r.versions.get("torch", "?") for r in rows])
    return (
        f"From `{source}`: {joined([f'{r.device}, {r.isa}' for r in rows])}, "
        f"{joined([str(r.threads) for r in rows])} threads, torch {torch}, "
        f"inputs {joined([r.data for r in rows])}, commit {joined([commit(r) for r in rows])}, "
        f"{' to '.join(dict.fromkeys((days[0], days[-1])))}.{left}"
    )


def rivals_of(by: dict[str, Row]) -> list[Row]:
    """What does the same work as fusae beside it, and is not fusae."""
    return [r for r in by.values() if not r.name.startswith("fusae") and r.name not in workloads.OTHER_WORK]


def groups_of(rows: list[Row]) -> list[dict[str, Row]]:
    """Contender -> row, for every op and shape."""
    groups: dict[tuple, dict[str, Row]] = {}
    for r in rows:
        if r.op != PARTS:
            groups.setdefault((r.op, tuple(r.shape.values()), r.dtype, r.threads), {})[r.name] = r
    return list(groups.values())


def slower(rows: list[Row]) -> list[tuple[Row, Row]]:
    """(fusae, the fastest contender) wherever a contender that does the same work took less time."""
    found = []
    for by in groups_of(rows):
        own = by.get("fusae") or by.get("fusae 8-bit")
        best = min(rivals_of(by), key=lambda r: r.p50_ms, default=None)
        if own is not None and best is not None and best.p50_ms < own.p50_ms:
            found.append((own, best))
    return found


def crossovers(rows: list[Row]) -> list[str]:
    """One sentence for each op of the sweep over m."""
    lines = []
    for op, plain in figures.PLAIN.items():
        speed = figures.faster(rows, op, plain)
        if not speed:
            continue
        at, shape = figures.crossover(speed), next(r.shape for r in rows if r.op == op)
        where = f"`{op}` ({shape['n']:,} rows, d = {shape['d']}, k = {shape['k']})"
        low, high = min(speed), max(speed)
        ends = f"{speed[low]:.2f} × the speed of {plain} at m = {low:,}, {speed[high]:.2f} × at m = {high:,}"
        if at is None:
            lines.append(f"{where}: slower at the largest m measured; {ends}.")
        elif at == low:
            lines.append(f"{where}: not slower at any m measured; {ends}.")
        else:
            lines.append(f"{where}: faster from m = {at:,} on; {ends}.")
    return lines


def _section(title: str, lines: list[str]) -> list[str]:
    return [f"## {title}", "", *lines, ""]


def _figure(name: str, found: dict[str, list[Row]]) -> list[str]:
    what = figures.FIGURES[name][3]
    return [figures.markdown(name, "figures", what), ""] if figures.rows_of(name, found) else [_NOT_YET, ""]


def page(found: dict[str, list[Row]], folder: str) -> str:
    """docs/benchmarks.md. `folder`: of the results, from the root of the repository."""
    every = [row for rows in found.values() for row in rows]
    behind = slower(every)
    lines = [
        "# How fast, and where not", "", MADE.format(folder=folder), "",
        "Ratios of contenders that took turns in one process on the same inputs; medians of ratios within rounds, in",
        "parentheses where the median lies with 95 %. `make bench` measures all of it on your machine,",
        "`fusae bench` one op at your shape, or a kernel of yours beside fusae's. What a row, a contender and the",
        "roofline are: [benchmarks/README.md](../benchmarks/README.md).", "",
    ]  # fmt: skip
    slow = [
        "Everything measured where something that does the same work was faster than fusae:", "",
        "| op | n, d, m, k | dtype | fusae ms | faster | its ms | fusae takes |", "|---|---|---|---:|---|---:|---:|",
    ] if behind else [f"Nowhere among the {len(groups_of(every))} pairs of op and shape measured here."]  # fmt: skip
    for own, best in behind:
        slow.append(
            f"| {own.op} | {', '.join(str(own.shape[key]) for key in 'ndmk')} | {own.dtype} | {short(own.p50_ms)} "
            f"| {best.name} | {short(best.p50_ms)} | {own.p50_ms / best.p50_ms:.2f} × |"
        )
    if "scaling.json" in found:
        slow += ["", *(f"* {line}" for line in crossovers(found["scaling.json"]))]
    lines += _section("Where fusae is slower", slow)
    lines += _section("Against the number of latents", [*_figure("speedup", found), *_figure("memory", found)][:-1])
    lines += _section("A training step, op by op", _figure("shares", found)[:-1])
    lines += _section("Under the roofline", _figure("roofline", found)[:-1])
    for name, rows in found.items():
        if name != "shares.json":
            lines += _section(f"All of {name}", [*table(rows), "", origin(rows, f"{folder}/{name}")])
    return "\n".join(lines).rstrip() + "\n"


def block(name: str, found: dict[str, list[Row]], folder: str) -> str:
    """What stands between the markers `name` of README.md."""
    rows = found.get("scaling.json")
    if rows is None:
        return f"<!-- results: {folder} -->\n{_NOT_YET}"
    if name == "figure":
        text = figures.markdown("speedup", "docs/figures", "Speed-up over plain torch against m")
        return f"<!-- results: {folder} -->\n{text}"
    return "\n".join([f"<!-- results: {folder} -->", *(f"* {line}" for line in crossovers(rows))])
