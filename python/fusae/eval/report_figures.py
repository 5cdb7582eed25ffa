# SPDX-License-Identifier: Apache-2.0
"""The figures of the report as inline SVG whose colours are CSS variables, so one file serves light, dark and print."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

# matplotlib wants real colours: each role is drawn in a colour of its own, which _svg swaps for the page's variable.
ROLES = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--rule)",
    "#040404": "var(--blue)",
    "#050505": "var(--orange)",
    "#060606": "var(--bar)",
    "#070707": "var(--paper)",
}
INK, MUTED, RULE, BLUE, ORANGE, BAR, PAPER = ROLES
STYLE = {
    "svg.fonttype": "none",
    "font.size": 11.5,
    "axes.labelsize": 11.5,
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "axes.linewidth": 0.8,
    "xtick.major.width": 0.8,
    "ytick.major.width": 0,
    "ytick.minor.width": 0,
    "xtick.minor.width": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.unicode_minus": True,
}
MAX_POINTS = 600  # more than the panel has pixels


def _figure(width: float, height: float, **margins: float):
    """A figure of `width` x `height` SVG units with absolute margins in the same units."""
    figure = Figure(figsize=(width / 72, height / 72))
    box = {"left": 54, "right": 10, "bottom": 44, "top": 10} | margins
    figure.subplots_adjust(
        box["left"] / width, box["bottom"] / height, 1 - box["right"] / width, 1 - box["top"] / height
    )
    return figure, figure.subplots()


def _svg(figure: Figure, name: str, title: str) -> Markup:
    """Serialise without prolog, metadata, fonts or fixed size; ids get the prefix `name`, so figures do not clash."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font-family:[^;\"]*;?", "", text)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    for colour, variable in ROLES.items():
        text = text.replace(colour, variable)
    box = re.search(r'viewBox="[^"]*"', text).group(0)
    label = str(Markup.escape(title))
    head = f'<svg {box} role="img" aria-label="{label}" data-figure="{name}">'
    return Markup(re.sub(r"<svg[^>]*>", lambda _: head, text, count=1).replace("xlink:href", "href"))


def _running_median(y: np.ndarray) -> np.ndarray:
    half = max(1, len(y) // 40)
    return np.array(
        [np.nanmedian(y[max(0, i - half) : i + half + 1]) if np.isfinite(y[i]) else np.nan for i in range(len(y))]
    )


def _thin(*arrays: np.ndarray) -> list[np.ndarray]:
    step = max(1, math.ceil(len(arrays[0]) / MAX_POINTS))
    return [np.concatenate([a[:-1:step], a[-1:]]) for a in arrays]


def _power(exponent: int) -> str:
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def token_axis(tokens: Sequence[int]) -> tuple[np.ndarray, str]:
    """Token counts in a readable unit, and that unit's axis label."""
    values = np.asarray(tokens, dtype=float)
    for scale, word in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if values.max() >= 2 * scale:
            return values / scale, f"training tokens ({word})"
    return values, "training tokens"


def curve(
    name: str,
    title: str,
    tokens: Sequence[int],
    values: Sequence[float],
    ylabel: str,
    *,
    smooth: bool = False,
    zero: bool = False,
    reference: tuple[float, str] | None = None,
    second: tuple[str, str, Sequence[float]] | None = None,
) -> Markup:
    """One quantity against training tokens.

    Args:
        smooth: draw the values thin and their running median bold.
        zero: let the axis begin at 0 (counts).
        reference: a dashed horizontal line and its label.
        second: (label of the values, label of the second line, its values), both named at their ends.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(340, 218)
        x, xlabel = token_axis(tokens)
        y = np.asarray(values, dtype=float)
        lines = [(y, BLUE)] + ([(np.asarray(second[2], dtype=float), ORANGE)] if second else [])
        for line, colour in lines:
            bold = _running_median(line) if smooth and len(line) >= 20 else line
            thin_x, thin_y, thin_bold = _thin(x, line, bold)
            if bold is not line:
                axes.plot(thin_x, thin_y, color=colour, lw=0.7, alpha=0.35)
            axes.plot(thin_x, thin_bold, color=colour, lw=1.8, marker="o" if len(line) == 1 else None, ms=4)
        seen = np.concatenate([line for line, _ in lines] + ([np.array([reference[0]])] if reference else []))
        seen = seen[np.isfinite(seen)]
        if not zero and len(seen) and seen.min() > 0 and seen.max() / seen.min() > 4:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        elif zero and len(seen):
            axes.set_ylim(0, max(seen.max() * 1.15, 1))
            axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        if reference:
            axes.axhline(reference[0], color=INK, lw=1, dashes=(4, 3))
            # The label takes the right part of the width; there it is put on the side where the curve is not.
            below = len(y) and np.nanmedian(y[int(0.6 * len(y)) :]) > reference[0]
            axes.margins(y=0.16)
            axes.annotate(
                reference[1],
                (1, reference[0]),
                xycoords=("axes fraction", "data"),
                xytext=(0, -4 if below else 4),
                textcoords="offset points",
                ha="right",
                va="top" if below else "bottom",
                fontsize=11.5,
            )
        if second:
            for (line, colour), label in zip(lines, second[:2], strict=True):
                good = np.flatnonzero(np.isfinite(line))
                if len(good):
                    at = good[int(0.98 * (len(good) - 1))]
                    axes.annotate(
                        label,
                        (x[at], line[at]),
                        xytext=(0, 8),
                        textcoords="offset points",
                        ha="right",
                        color=colour,
                        fontsize=11.5,
                    )
        axes.set_xlim(0, x.max() or 1)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        return _svg(figure, name, title)


def learning_rate(tokens: Sequence[int], rates: Sequence[float]) -> Markup:
    """The schedule, with the power of ten moved to the axis label."""
    peak = max(rates)
    exponent = math.floor(math.log10(peak)) if peak > 0 and math.isfinite(peak) else 0
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(340, 218)
        x, xlabel = token_axis(tokens)
        x, y = _thin(x, np.asarray(rates, dtype=float) / 10.0**exponent)
        axes.plot(x, y, color=BLUE, lw=1.8, marker="o" if len(x) == 1 else None, ms=4)
        axes.set_xlim(0, x.max() or 1)
        axes.set_ylim(0, max(peak / 10.0**exponent * 1.15, 1e-9))
        axes.set_xlabel(xlabel)
        axes.set_ylabel(f"learning rate (× {_power(exponent)})" if exponent else "learning rate")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        return _svg(figure, "lr", "Learning rate against training tokens")


def density_histogram(density: Sequence[float], mean: float, shown: Sequence[float] = ()) -> Markup:
    """log10 of the latents' densities; `mean` = L0 / m is marked, and the densities `shown` get a triangle."""
    live = np.asarray([v for v in density if v > 0 and math.isfinite(v)])
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(420, 268, top=26, right=16)
        if len(live):
            logs = np.log10(live)
            low, high = math.floor(logs.min() * 2) / 2, min(0.0, math.ceil(logs.max() * 2) / 2)
            axes.hist(logs, bins=np.linspace(low, max(high, low + 0.5), 57), color=BLUE, edgecolor=PAPER, linewidth=0.5)
            axes.set_xlim(low, max(high, low + 0.5))
        else:
            axes.text(0.5, 0.5, "no latent fired on the held-out tokens", transform=axes.transAxes, ha="center")
        if mean > 0:
            axes.axvline(math.log10(mean), color=INK, lw=1, dashes=(4, 3))
            axes.annotate(
                f"mean {mean:.2g}",
                (math.log10(mean), 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=11.5,
            )
        marks = [math.log10(v) for v in shown if v > 0]
        axes.set_ylim(0, axes.get_ylim()[1] * 1.06)
        axes.plot(
            marks,
            [0.975] * len(marks),
            "v",
            transform=axes.get_xaxis_transform(),
            color=ORANGE,
            ms=5,
            markeredgecolor=PAPER,
            markeredgewidth=0.6,
            clip_on=False,
            zorder=5,
        )
        axes.set_xlabel("log₁₀ density (share of held-out tokens)")
        axes.set_ylabel("latents per bin")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}".replace("-", "−")))
        return _svg(figure, "density", "Histogram of latent densities, log scale")


def activation_bars(latent: int, width: float, counts: Sequence[int]) -> Markup | None:
    """A small histogram of one latent's activations; the height of a bar is the square root of its count.

    Drawn here and not by matplotlib: a report has hundreds of them. None where the latent was never active.
    """
    if not any(counts):
        return None
    w, h, top = 200, 40, math.sqrt(max(counts))
    step = w / len(counts)
    path = "".join(
        f"M{i * step:.1f} {h}v{-max(1.0, h * math.sqrt(n) / top):.1f}h{step * 0.85:.1f}V{h}z"
        for i, n in enumerate(counts)
        if n
    )
    title = f"activations of latent {latent}, 0 to {width * len(counts):.3g}"
    return Markup(
        '<svg class="hist" viewBox="0 0 {} {}" role="img" aria-label="{}" preserveAspectRatio="none">'
        '<path fill="var(--blue)" d="{}"/></svg>'
    ).format(w, h, title, path)


def bars(name: str, title: str, rows: Sequence[tuple[str, float, float, float, str, bool]]) -> Markup:
    """Horizontal bars, one a row of (name, p20, p50, p80, label, emphasised), in milliseconds."""
    height = 48 * len(rows) + 50
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "x", "xtick.major.width": 0}):
        figure, axes = _figure(430, height, left=4, right=104, top=6)
        for i, (row, p20, p50, p80, label, strong) in enumerate(rows):
            axes.barh(i + 0.2, p50, height=0.4, color=BLUE if strong else BAR, linewidth=0)
            axes.plot([p20, p80], [i + 0.2] * 2, color=INK, lw=1.1, solid_capstyle="butt")
            axes.annotate(
                row,
                (0, i),
                xytext=(0, 3),
                textcoords="offset points",
                va="bottom",
                color=INK,
                weight="bold" if strong else "normal",
                parse_math=False,
            )
            axes.annotate(
                label,
                (max(p50, p80), i + 0.2),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                color=INK,
                weight="bold" if strong else "normal",
                parse_math=False,
            )
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, max(max(r[2], r[3]) for r in rows) or 1)
        axes.set_yticks([])
        axes.spines["bottom"].set_visible(False)
        axes.set_xlabel("milliseconds")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
        return _svg(figure, name, title)
