# SPDX-License-Identifier: Apache-2.0
"""Figures of benchmark rows: bars at one shape, lines against the number of latents. Drawn in light or dark colours."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ..testing.bench_row import Row

PALETTES = {
    "light": {"ink": "#1f2328", "muted": "#59636e", "rule": "#d1d9e0", "paper": "#ffffff", "fusae": "#0969da",
              "base": "#8c959f", "others": ("#bc4c00", "#8250df", "#1a7f37", "#bf3989", "#9a6700", "#0f766e")},
    "dark": {"ink": "#e6edf3", "muted": "#9198a1", "rule": "#3d444d", "paper": "#0d1117", "fusae": "#58a6ff",
             "base": "#7d8590", "others": ("#ff9b5e", "#b392f0", "#56d364", "#f778ba", "#e3b341", "#5eead4")},
}  # fmt: skip
MARKS = ("s", "^", "D", "v", "P", "X")


@contextlib.contextmanager
def style(palette: dict[str, Any]) -> Iterator[None]:
    """Fonts as paths and a fixed salt, so that the same numbers give the same bytes."""
    ink, muted, rule = (palette[role] for role in ("ink", "muted", "rule"))
    with matplotlib.rc_context({
        "svg.hashsalt": "fusae", "font.size": 10.5, "text.color": ink, "axes.labelcolor": muted,
        "axes.titlecolor": ink, "axes.titlesize": 11.5, "axes.titlelocation": "left", "axes.edgecolor": rule,
        "xtick.color": muted, "ytick.color": muted, "axes.grid": True, "grid.color": rule, "grid.linewidth": 0.6,
        "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
        "legend.labelcolor": ink, "figure.facecolor": palette["paper"], "axes.facecolor": palette["paper"],
        "savefig.facecolor": palette["paper"], "lines.linewidth": 1.8, "lines.markersize": 5.5,
    }):  # fmt: skip
        yield


def colours(names: list[str], palette: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Colour and mark of each contender: fusae's own colour, grey for the bare product, others in turn."""
    others, found = 0, {}
    for name in names:
        if name.startswith("fusae"):
            found[name] = (palette["fusae"], "o" if name == "fusae" else "h")
        elif name == "gemm":
            found[name] = (palette["base"], ".")
        else:
            found[name] = (palette["others"][others % len(palette["others"])], MARKS[others % len(MARKS)])
            others += 1
    return found


def caption(figure: Figure, text: str, palette: dict[str, Any]) -> None:
    figure.text(0.008, 0.012, text, fontsize=7.5, color=palette["muted"], ha="left", va="bottom")


def bars(rows: list[Row], source: str, theme: str = "light") -> Figure:
    """Times of the contenders of one op at one shape, p50 with p20 – p80 as a line."""
    palette = PALETTES[theme]
    with style(palette):
        figure = Figure(figsize=(7.6, 1.5 + 0.42 * len(rows)), layout="constrained")
        figure.get_layout_engine().set(rect=(0, 0.07, 1, 0.93))
        axes = figure.subplots()
        look, first = colours([row.name for row in rows], palette), rows[0]
        for place, row in enumerate(rows):
            low, high = row.p50_ms - row.p20_ms, row.p80_ms - row.p50_ms
            axes.barh(place, row.p50_ms, color=look[row.name][0], height=0.62,
                      xerr=[[low], [high]], error_kw={"ecolor": palette["ink"], "elinewidth": 1})  # fmt: skip
            against = "" if row.ratio is None else f"   {row.ratio:.2f} × {row.baseline}"
            axes.annotate(f"{row.p50_ms:,.4g} ms{against}", (row.p80_ms, place), (5, 0), textcoords="offset points",
                          va="center", fontsize=9, color=palette["ink"])  # fmt: skip
        axes.set_yticks(range(len(rows)), [f"{r.name} ({r.backend})" if r.backend else r.name for r in rows])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, 1.55 * max(row.p80_ms for row in rows))
        axes.set_xlabel("ms a call (lower is better)")
        shape = ", ".join(f"{key} = {size:,}" for key, size in first.shape.items())
        axes.set_title(f"{first.op}: {shape}, {first.dtype}")
        caption(figure, source, palette)
    return figure


def against_m(
    axes: Axes, rows: list[Row], value: Callable[[Row], float | None], palette: dict[str, Any], names: list[str]
) -> None:
    """A line for each contender over m, both axes logarithmic; rows without a value leave a gap."""
    look = colours(names, palette)
    for name in names:
        points = sorted((r.shape["m"], value(r)) for r in rows if r.name == name and value(r) is not None)
        if points:
            colour, mark = look[name]
            wide = 2.6 if name.startswith("fusae") else 1.6
            axes.plot(*zip(*points, strict=True), marker=mark, color=colour, label=name, linewidth=wide)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ms = sorted({r.shape["m"] for r in rows})
    axes.set_xticks(ms, [f"{m // 1024}k" if m >= 1024 and m % 1024 == 0 else str(m) for m in ms])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}"))
    axes.set_xlabel("m, latents")


def times_against_m(rows: list[Row], source: str, theme: str = "light") -> Figure:
    """One op at several m: milliseconds of every contender."""
    palette, first = PALETTES[theme], rows[0]
    with style(palette):
        figure = Figure(figsize=(7.6, 4.4), layout="constrained")
        figure.get_layout_engine().set(rect=(0, 0.045, 1, 0.955))
        axes = figure.subplots()
        against_m(axes, rows, lambda r: r.p50_ms, palette, list(dict.fromkeys(r.name for r in rows)))
        axes.set_ylabel("ms a call (lower is better)")
        shape = ", ".join(f"{key} = {first.shape[key]:,}" for key in "ndk")
        axes.set_title(f"{first.op}: {shape}, {first.dtype}")
        axes.legend(fontsize=9)
        caption(figure, source, palette)
    return figure
