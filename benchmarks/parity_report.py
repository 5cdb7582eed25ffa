# SPDX-License-Identifier: Apache-2.0
"""Runs of parity.py -> docs/quality.md, or a check that it is up to date."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import ground_truth_report
from results_file import ReportError, origin, read_results

ROOT = Path(__file__).resolve().parent.parent
FIELDS = (
    "recipe", "peer", "peer_version", "data", "about", "data_sha256", "settings", "seed", "contenders", "differences",
    "command", "git", "dirty", "time", "versions",
)  # fmt: skip
#: largest relative difference of the loss at a step
LOSS_BARS = {"1": 1e-5, "10": 1e-4, "100": 1e-3}
FVU_BAR = (0.99, 1.01)
#: what a dead fraction may be above the peer's: half a percentage point, or two standard errors of the difference
DEAD_BAR = 0.005
#: what the MCC may be below the peer's where the truth is known: this, or two standard errors of the difference
MCC_BAR = 0.001
#: the contender of parity.py that is the peer, from initial weights a rounding away
TWIN = "library, nudged"
_SOURCE = re.compile(r"from `([^`]+\.json)`")


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The runs of a results file of parity.py."""
    return read_results(path, FIELDS)


def quality_page(results: Path | None, page: Path, check: bool) -> None:
    """Write the page from the results (with `check` and no results: those that the page names), or compare."""
    if results is None:
        named = _SOURCE.search(page.read_text(encoding="utf-8")) if page.exists() else None
        if named is None:
            raise ReportError(f"{page} names no results file; give one with --out")
        results = page.resolve().parent.parent / named.group(1)
    results, root = results.resolve(), page.resolve().parent.parent

    def relative(path: Path) -> str:
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()

    source, known = relative(results), results.with_name("ground_truth.json")
    fresh = markdown(read_runs(results), source)
    if known.exists():
        section = ground_truth_report.section(ground_truth_report.read_runs(known), relative(known))
        fresh += "\n" + "\n".join(section).rstrip() + "\n"
    if not check:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(fresh, encoding="utf-8")
    elif not page.exists() or page.read_text(encoding="utf-8") != fresh:
        raise ReportError(f"{page} differs from {source}; run: python benchmarks/parity.py --report --out {source}")


def groups(runs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Runs that differ only in their seed, in the order of the file."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        key = json.dumps([run["recipe"], run["data"], run["settings"]], sort_keys=True)
        found.setdefault(key, []).append(run)
    return list(found.values())


def summary(group: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """One contender against the peer, over the seeds of a group.

    ``ratios``: FVU over the peer's, for each seed; ``ratio``: of the means. ``dead``: mean difference of the dead
    fraction; ``dead_limit``: what it may be. ``loss``: the largest relative difference at each step of `LOSS_BARS`.
    ``mcc`` and ``mcc_limit``, where the truth is known: mean difference of the MCC, and what it must at least be.
    """
    runs = [run["contenders"] for run in group if name in run["contenders"]]
    own, peer = ([run[who] for run in runs] for who in (name, "peer"))
    mean = statistics.fmean

    def difference(measure: str) -> tuple[float, float]:
        """Mean over the seeds, and two standard errors."""
        values = [a[measure] - b[measure] for a, b in zip(own, peer, strict=True)]
        return mean(values), 2 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0

    dead, error = difference("dead_fraction")
    found = {}
    if "mcc" in own[0]:
        found["mcc"], twice = difference("mcc")
        found["mcc_limit"] = -max(MCC_BAR, twice)
    return {
        **found,
        "ratios": [a["fvu"] / b["fvu"] for a, b in zip(own, peer, strict=True)],
        "ratio": mean(a["fvu"] for a in own) / mean(b["fvu"] for b in peer),
        "dead": dead,
        "dead_limit": max(DEAD_BAR, error),
        "loss": {
            at: max(abs(a["loss"][at] / b["loss"][at] - 1) for a, b in zip(own, peer, strict=True))
            for at in LOSS_BARS
            if all(at in a["loss"] for a in own)
        },
    }


def verdict(found: dict[str, Any]) -> str:
    """Which bars a contender misses, or "all"."""
    if "mcc" in found:
        missed = [] if found["mcc"] >= found["mcc_limit"] else ["MCC"]
    else:
        missed = [] if FVU_BAR[0] <= found["ratio"] <= FVU_BAR[1] else ["FVU"]
    missed += [] if found["dead"] <= found["dead_limit"] else ["dead"]
    missed += [f"loss at step {at}" for at, value in found["loss"].items() if value > LOSS_BARS[at]]
    return f"**misses** {', '.join(missed)}" if missed else "all"


def markdown(runs: list[dict[str, Any]], source: str) -> str:
    """The whole page."""
    if not runs:
        raise ReportError(f"{source}: has no runs")
    lines = [
        "# Quality beside other libraries",
        "",
        f"Written by `python benchmarks/parity.py --report` from `{source}`. Each library's own trainer and fusae "
        "train on the same batches in the same order, from the same initial weights, by the same recipe, for the same "
        "number of steps; `fusae.eval` measures all of them on the same rows. `benchmarks/parity.py` says how to run "
        "it.",
        "",
        "- *fusae*: the library's recipe, step by step, on `SparseCoder` and `fusae.optim.Adam`. *fusae Trainer*: "
        "`fusae.train.Trainer` set as near to the recipe as its configuration comes. *library, nudged*: the library "
        "again, from initial weights of which half are moved to the next number of their dtype; what rounding alone "
        "makes of a run.",
        f"- Bars: FVU over the library's in [{FVU_BAR[0]}, {FVU_BAR[1]}], means over seeds; loss at steps "
        f"{', '.join(LOSS_BARS)} within {', '.join(f'{bar:g}' for bar in LOSS_BARS.values())} of the library's; dead "
        "fraction at most half a percentage point, or two standard errors, above. Dead: active on none of 32,768 "
        "training rows, by the final weights.",
        "- Where the truth is known, MCC at most 0.001, or two standard errors, below the library's, in place of FVU: "
        "with 64 directions, one more or less that is found moves FVU by an eighth, and rounding can decide that. The "
        "same recipe in float64 shows what is rounding.",
        "- Why single runs part, where they do: the two sides add up the same numbers in another order, and where that "
        "decides which latent is the last one selected, or which is dead, they go on with other latents. The library "
        f"can part as far from its own repetition (*{TWIN}*, below, where that was run), and in float64 the two sides "
        "stay together. So the recipes are the same where that was run; over more seeds the ratios lie on both sides "
        "of 1. SAELens' BatchTopK and Matryoshka on activations were not run in float64.",
        "",
    ]
    lines += [
        "| recipe | data | seeds | FVU × the library's | dead, less the library's | MCC, less the library's | bars |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for group in groups(runs):
        found = summary(group, "fusae")
        cells = [
            group[0]["recipe"],
            f"{group[0]['data']}, {group[0]['settings']['dtype']}",
            str(len(group)),
            f"{found['ratio']:.4f}",
            f"{found['dead']:+.2%}",
            f"{found['mcc']:+.4f}" if "mcc" in found else "—",
            verdict(found),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for group in groups(runs):
        lines += _section(group)
    return "\n".join(lines).rstrip() + "\n"


def _section(group: list[dict[str, Any]]) -> list[str]:
    first = group[0]
    s, names = first["settings"], list(dict.fromkeys(name for run in group for name in run["contenders"]))
    known = "mcc" in first["contenders"]["peer"]
    library = f"{first['peer']} {first['peer_version']}"
    lines = [
        f"## {first['recipe']}, {first['data']}, {s['dtype']}",
        "",
        f"Data: {first['about']}; m {s['m']}, k {s['k']}, {s['steps']} steps of {s['batch_size']} rows, lr "
        f"{s['lr']:g}, {s['warmup_steps']} steps of warm-up, decay from step {s['decay_start']}, a latent is dead "
        f"after {s['dead_steps']} batches; {len(group)} seeds.",
        "",
        "| | FVU (seeds) | × the library's (seeds) | dead | L0 | loss, steps 1 / 10 / 100 | MCC to the library's |"
        + (" MCC, MMCS to the truth |" if known else "")
        + " bars reached |",
        "|---|---|---|---:|---:|---|---:|" + ("---|" if known else "") + "---|",
    ]
    for name in names:
        own = [run["contenders"][name] for run in group if name in run["contenders"]]
        found = summary(group, name)
        mean = {key: statistics.fmean(o[key] for o in own) for key in own[0] if key != "loss"}
        cells = [
            library if name == "peer" else name if len(own) == len(group) else f"{name} ({len(own)} seeds)",
            f"{mean['fvu']:.4f} ({_span(o['fvu'] for o in own)})",
            "—" if name == "peer" else f"{found['ratio']:.4f} ({_span(found['ratios'])})",
            f"{mean['dead_fraction']:.2%}",
            f"{mean['l0']:.2f}",
            "—" if name == "peer" else " / ".join(f"{value:.0e}" for value in found["loss"].values()),
            "—" if name == "peer" else f"{mean['mcc_to_peer']:.4f}",
            *([f"{mean['mcc']:.4f}, {mean['mmcs']:.4f}"] if known else []),
            "—" if name == "peer" else verdict(found),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *_beside_itself(group)]
    lines += [
        "Not the same on both sides:",
        "",
        *(f"- {difference}" for difference in first["differences"]),
        "",
        origin(group),
        "",
    ]
    return lines


def _beside_itself(group: list[dict[str, Any]]) -> list[str]:
    """fusae and the nudged library, for the seeds that have both."""
    lines = []
    for run in group:
        if TWIN not in run["contenders"]:
            continue
        peer, told = run["contenders"]["peer"], []
        for name in ("fusae", TWIN):
            own = run["contenders"][name]
            at = [f"{abs(value / peer['loss'][step] - 1):.0e}" for step, value in own["loss"].items()]
            told.append(f"*{name}* {own['fvu'] / peer['fvu']:.4f}, {' / '.join(at)}")
        lines.append(f"Seed {run['seed']}, FVU × the library's and difference of the loss: {'; '.join(told)}.")
        lines.append("")
    return lines


def _span(values: Any) -> str:
    values = list(values)
    return f"{min(values):.4f} – {max(values):.4f}"
