# SPDX-License-Identifier: Apache-2.0
"""The figures of the documentation, drawn from results files: an SVG in light colours and one in dark.

Every figure says in its corner which files and commits it is of, and carries a digest of the numbers that it shows, by
which a test sees that it is of the files as they are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from fusae.bench.figure import PALETTES, against_m, caption, colours, style
from fusae.testing.bench import Row, RowError
from fusae.testing.bench_shares import OP as PARTS
from fusae.testing.bench_shares import STEP

THEMES = tuple(PALETTES)
_DIGEST = re.compile(r"fusae-figure ([0-9a-f]{64})")
PLAIN = {"encode_topk": "torch mm + topk", "train_step": "plain torch"}


def digest(rows: list[Row]) -> str:
    """Of everything that a figure shows of its rows."""
    shown = [
        [r.op, r.name, r.shape, r.dtype, r.threads, r.p50_ms, r.ratio, r.tflops, r.peak_bytes, r.parameter_bytes, r.git]
        for r in rows
    ]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def digest_of(path: Path) -> str | None:
    """The digest that a figure carries."""
    found = _DIGEST.search(path.read_text(encoding="utf-8"))
    return found[1] if found else None


def _note(rows: list[Row], sources: list[str]) -> str:
    commits = dict.fromkeys((r.git or "unknown")[:12] + " (changed)" * bool(r.dirty) for r in rows)
    first = rows[0]
    return (
        f"{', '.join(sources)} · commit {', '.join(commits)}\n{first.device}, {first.threads} threads, {first.dtype}, "
        f"torch {first.versions.get('torch', '?')}, inputs {first.data}, {first.time[:10]}"
    )


def _sized(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.3 / height, 1, 1 - 0.3 / height))
    return figure


def _at(rows: list[Row], op: str) -> dict[int, dict[str, Row]]:
    found: dict[int, dict[str, Row]] = {}
    for r in rows:
        if r.op == op:
            found.setdefault(r.shape["m"], {})[r.name] = r
    return dict(sorted(found.items()))


def faster(rows: list[Row], op: str, name: str) -> dict[int, float]:
    """m -> how many times faster fusae is than a contender, by the medians."""
    return {
        m: by[name].p50_ms / by["fusae"].p50_ms for m, by in _at(rows, op).items() if name in by and "fusae" in by
    }


def crossover(speed: dict[int, float]) -> int | None:
    """The least m from which on fusae is never slower; None where it is slower at the largest."""
    found = None
    for m, value in sorted(speed.items(), reverse=True):
        if value < 1:
            break
        found = m
    return found


def speedup(rows: list[Row], sources: list[str], theme: str) -> Figure:
    """How many times faster than the same in plain torch, against m; a line at 1, below which fusae is slower."""
    palette, ops = PALETTES[theme], [op for op in PLAIN if _at(rows, op)]
    with style(palette):
        figure = _sized(9.2, 4.0)
        for axes, op in zip(figure.subplots(1, len(ops), squeeze=False)[0], ops, strict=True):
            names = [r.name for r in rows if r.op == op and not r.name.startswith("fusae") and r.name != "gemm"]
            look = colours(names := list(dict.fromkeys(names)), palette)
            ms: set[int] = set()
            for name in names:
                speed = faster(rows, op, name)
                ms |= set(speed)
                axes.plot(*zip(*speed.items(), strict=True), marker=look[name][1], color=look[name][0], label=name)
            axes.axhline(1, color=palette["ink"], linewidth=1, linestyle="--")
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted(ms), [f"{m // 1024}k" if m >= 1024 else str(m) for m in sorted(ms)])
            axes.minorticks_off()
            axes.set_ylim(0, None)
            shape = next(r.shape for r in rows if r.op == op)
            axes.set_title(f"{op}: {shape['n']:,} rows, d = {shape['d']}, k = {shape['k']}")
            axes.set_xlabel("m, latents")
            axes.legend(fontsize=9, title="times faster than", title_fontsize=9)
        figure.axes[0].set_ylabel("times faster (under 1: slower)")
        caption(figure, _note(rows, sources), palette)
    return figure


def memory(rows: list[Row], sources: list[str], theme: str) -> Figure:
    """Peak memory of a call above inputs and parameters, against m."""
    palette, ops = PALETTES[theme], [op for op in PLAIN if _at(rows, op)]
    with style(palette):
        figure = _sized(9.2, 4.0)
        for axes, op in zip(figure.subplots(1, len(ops), squeeze=False)[0], ops, strict=True):
            own = [r for r in rows if r.op == op and r.name != "fusae ops"]
            names = list(dict.fromkeys(r.name for r in own))
            against_m(axes, own, lambda r: (r.peak_bytes or 0) / 2**20 or None, palette, names)
            axes.set_title(op)
            axes.legend(fontsize=9)
        figure.axes[0].set_ylabel("MiB above inputs, weights, moments")
        caption(figure, _note(rows, sources), palette)
    return figure


def roofline(rows: list[Row], sources: list[str], theme: str) -> Figure:
    """Useful operations a second against useful operations a byte, under the rates measured in the same run."""
    palette = PALETTES[theme]
    points = [r for r in rows if r.name in ("fusae", "fusae 8-bit") and r.op != PARTS and r.flops and r.bytes]
    with style(palette):
        figure = _sized(9.2, 5.0)
        axes = figure.subplots()
        peak = sorted(r.peak_tflops for r in points)[len(points) // 2] * 1e3
        rate = sorted(r.memory_gbps for r in points)[len(points) // 2]
        spots = [(r.flops / r.bytes, r.tflops * 1e3, r) for r in points]
        left, right = min(x for x, *_ in spots) / 2, max(x for x, *_ in spots) * 4
        axes.plot([left, peak / rate, right], [left * rate, peak, peak], color=palette["ink"], linewidth=1.4)
        for x, y, row in spots:
            axes.plot(x, y, marker="o", color=palette["fusae"], linestyle="none")
            axes.annotate(row.op, (x, y), (5, -3), textcoords="offset points", fontsize=7.5, color=palette["muted"])
        axes.set(xscale="log", yscale="log", xlabel="useful flop a byte that must move", ylabel="Gflop/s")
        axes.set_title(f"fusae under the roofline: {peak:,.0f} Gflop/s, {rate:,.0f} GB/s, measured in the same run")
        caption(figure, _note(points, sources), palette)
    return figure


def shares(rows: list[Row], sources: list[str], theme: str) -> Figure:
    """What of a training step is spent in each op, at several m."""
    palette, steps = PALETTES[theme], _at(rows, PARTS)
    names = [name for name in next(iter(steps.values())) if name != STEP]
    tones = dict(zip(names, (palette["fusae"], *palette["others"]), strict=False))
    with style(palette):
        figure = _sized(9.2, 1.7 + 0.45 * len(steps))
        axes = figure.subplots()
        for place, by in enumerate(steps.values()):
            start = 0.0
            for name in names:
                share = by[name].ratio or 0.0
                axes.barh(place, share, left=start, color=tones[name], height=0.62, label=name if place == 0 else None)
                start += share
        axes.set_yticks(range(len(steps)), [f"m = {m:,}   {by[STEP].p50_ms:,.3g} ms" for m, by in steps.items()])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
        shape = next(iter(steps.values()))[STEP].shape
        axes.set_title(f"a training step of the public ops: {shape['n']:,} rows, d = {shape['d']}, k = {shape['k']}")
        axes.legend(fontsize=8.5, ncols=3, loc="upper center", bbox_to_anchor=(0.45, -0.12))
        caption(figure, _note([r for r in rows if r.op == PARTS], sources), palette)
    return figure


#: figure -> (results files that it is of, the rows of them that it takes, what draws it, what it shows)
FIGURES: dict[str, tuple[tuple[str, ...], Callable[[Row], bool], Callable[..., Figure], str]] = {
    "speedup": (("scaling.json",), lambda r: r.op in PLAIN, speedup, "Speed-up over plain torch against m"),
    "memory": (
        ("scaling.json",), lambda r: r.op in PLAIN and r.peak_bytes is not None, memory, "Peak memory against m",
    ),
    "roofline": (("ops.json",), lambda r: r.op != PARTS, roofline, "Every op under the roofline"),
    "shares": (("shares.json",), lambda r: r.op == PARTS, shares, "The share of a training step in each op"),
}


def rows_of(name: str, found: dict[str, list[Row]]) -> list[Row]:
    """The rows of a figure among those of the files that are there; none where a file is missing."""
    files, takes, *_ = FIGURES[name]
    return [r for file in files for r in found[file] if takes(r)] if all(file in found for file in files) else []


def write(name: str, rows: list[Row], sources: list[str], folder: Path) -> list[Path]:
    """Both colours of one figure."""
    _, takes, draw, _ = FIGURES[name]
    rows = [r for r in rows if takes(r)]
    if not rows:
        raise RowError(f"{', '.join(sources)}: has no rows for the figure {name}")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for theme in THEMES:
        path = folder / f"{name}-{theme}.svg"
        about = {"Date": None, "Description": f"fusae-figure {digest(rows)}"}
        draw(rows, sources, theme).savefig(path, metadata=about)
        path.write_text(re.sub(r"[ \t]+$", "", path.read_text(encoding="utf-8"), flags=re.M), encoding="utf-8")
        written.append(path)
    return written


def stale(name: str, rows: list[Row], folder: Path) -> list[Path]:
    """Files of a figure that are missing or show other numbers."""
    wanted = digest([r for r in rows if FIGURES[name][1](r)])
    paths = [folder / f"{name}-{theme}.svg" for theme in THEMES]
    return [path for path in paths if not path.exists() or digest_of(path) != wanted]


def markdown(name: str, folder: str, what: str) -> str:
    """The figure in a page, in the reader's colours."""
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{folder}/{name}-dark.svg">'
        f'<img alt="{what}" src="{folder}/{name}-light.svg"></picture>'
    )
