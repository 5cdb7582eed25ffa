# SPDX-License-Identifier: Apache-2.0
"""Runs of ground_truth.py -> what they say, and their part of docs/quality.md."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from results_file import origin, read_results

FIELDS = ("form", "seed", "fields", "data", "contenders", "command", "device", "git", "dirty", "time", "versions")
OWN, PLAIN = "fusae", "plain torch"
#: what the mean MCC may be below plain torch's: this, or two standard errors of the difference
MCC_BAR = 0.001


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The runs of a results file of ground_truth.py."""
    return read_results(path, FIELDS)


def groups(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Runs that differ only in their seed, by form; of several settings of a form, those that came last."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        group = found.setdefault(run["form"], [])
        if group and any(group[0][part] != run[part] for part in ("fields", "data")):
            group.clear()
        group.append(run)
    return found


def summary(group: list[dict[str, Any]]) -> dict[str, float]:
    """``difference``: of the MCC, fusae less plain torch, mean over the seeds; ``limit``: what it must at least be."""
    values = [run["contenders"][OWN]["mcc"] - run["contenders"][PLAIN]["mcc"] for run in group]
    twice = 2 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {"difference": statistics.fmean(values), "limit": -max(MCC_BAR, twice)}


def verdict(group: list[dict[str, Any]]) -> str:
    """What to say of the seeds of a form."""
    found = summary(group)
    reached = "reached" if found["difference"] >= found["limit"] else "**missed**"
    return f"{found['difference']:+.4f} (at least {found['limit']:+.4f}): {reached}"


def verdicts(runs: list[dict[str, Any]]) -> dict[str, str]:
    return {form: verdict(group) for form, group in groups(runs).items()}


def section(runs: list[dict[str, Any]], source: str) -> list[str]:
    """The lines of the page."""
    first = runs[0]
    data, fields = first["data"], first["fields"]
    lines = [
        "## Does every form find a known dictionary?",
        "",
        f"Written from `{source}`, which `benchmarks/ground_truth.py` makes. Sums of exactly {data['k']} of "
        f"{data['m']} known directions in {data['d']} dimensions (`fusae.testing.known`), "
        f"{fields['tokens'] // fields['batch_size']:,} steps of {fields['batch_size']} rows, lr {fields['lr']:g}. "
        "*plain torch*: the dense loss of `fusae.testing.losses` under autograd and `torch.optim.Adam`, from the same "
        "weights, on the same batches, by the same recipe; *fusae*: `fusae.train.Trainer`. MCC against the truth, "
        f"mean over seeds (their span). Bar: a mean MCC at most {MCC_BAR:g}, or two standard errors of the "
        "difference, below plain torch's. Dead: active on none of 8,192 held-out rows. Forms are not to be compared "
        "with each other: of their recipes, the weights of the sparsity terms and the JumpReLU's thresholds were tried "
        "in a few values, the rest is shared.",
        "",
        "| form | seeds | MCC, plain torch | MCC, fusae | difference (bar) | MMCS | FVU | L0 | dead | CPU seconds |",
        "|---|---:|---|---|---|---|---|---|---|---|",
    ]
    for form, group in groups(runs).items():
        plain, own = ([run["contenders"][who] for run in group] for who in (PLAIN, OWN))
        pairs = [
            " / ".join(format(statistics.fmean(m[measure] for m in side), how) for side in (plain, own))
            for measure, how in (
                ("mmcs", ".4f"), ("fvu", ".4f"), ("l0", ".2f"), ("dead_fraction", ".1%"), ("seconds", ".0f"),
            )
        ]  # fmt: skip
        cells = [form, str(len(group)), _span(plain), _span(own), verdict(group), *pairs]
        lines.append(f"| {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "MMCS, FVU, L0, dead and seconds of a run: plain torch / fusae. On a dictionary this small plain torch is as "
        "fast or faster. The fields of every recipe are in the results file.",
        "",
        origin(runs),
        "",
    ]


def _span(side: list[dict[str, Any]]) -> str:
    values = [measured["mcc"] for measured in side]
    return f"{statistics.fmean(values):.4f} ({min(values):.4f} – {max(values):.4f})"
