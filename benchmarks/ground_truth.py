# SPDX-License-Identifier: Apache-2.0
"""Does every training form find a known dictionary again, as well as its plain-torch statement does?

    python benchmarks/ground_truth.py --out benchmarks/results/my-cpu/ground_truth.json            # all forms, 3 seeds
    python benchmarks/ground_truth.py jumprelu gated --seeds 1                                     # some of them
    python benchmarks/ground_truth.py --quick                                                      # seconds; see below
    python benchmarks/parity.py --report --out benchmarks/results/my-cpu/parity.json    # the table of docs/quality.md

Two contenders train on the same batches from the same weights: `fusae.train.Trainer`, and the dense loss of
`fusae.testing.losses` under autograd and ``torch.optim.Adam``, in the same dtype. Their learning rates and ramps are
those of one `TrainConfig`; dead latents, projection, clipping and unit rows are stated again in plain torch. What is
trained alike rounds differently, and a run can settle on another latent for that: so the bar is of means over seeds.

A results file is ``{"schema": 1, "runs": [run, ...]}`` and is written after every run; a run that is in it (form, seed,
fields, data) is not done again. A run has ``form``, ``seed``, ``fields`` of the `TrainConfig`, ``data``, ``contenders``
{"fusae" | "plain torch": {"mcc", "mmcs", "fvu", "l0", "dead_fraction", "loss" {"1", "10", "100"}, "seconds" (of the
CPU)}}, and where and when it was, as in `fusae.testing.Row`. ``--quick`` trains for 60 steps: does everything work?
"""

from __future__ import annotations

import copy
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from ground_truth_report import read_runs, verdicts
from results_file import ReportError, write_results
from rich.console import Console
from torch import Tensor

from fusae.eval import ReconstructionMetrics, recovery
from fusae.nn import Moment, SparseCoder
from fusae.testing import losses
from fusae.testing.bench_row import environment
from fusae.testing.known import known_dictionary
from fusae.train import TrainConfig, Trainer
from fusae.train.forms import prefixes_of

console = Console(width=None if sys.stdout.isatty() else 140)

LOSSES_AT = (1, 10, 100)
HELD_OUT = 8_192
#: what all runs share: the toy of `fusae.testing.known`, and a recipe that finds it (dictionary_learning's, lr 3e-3)
SHARED: dict[str, Any] = {
    "m": 64, "k": 3, "batch_size": 256, "lr": 3e-3, "decay": 0.2, "warmup_steps": 50, "clip_norm": 1.0,
    "dead_window": 20_000, "device": "cpu", "prefetch": 0,
}  # fmt: skip
#: the fields that make a form
FORMS: dict[str, dict[str, Any]] = {
    "topk": {"form": "topk"},
    "multi-topk": {"form": "topk", "multi_topk": 1 / 8},
    "batch-topk": {"form": "batch_topk"},
    "relu": {"form": "relu", "sparsity": 0.15, "unit_decoder": False},
    "jumprelu": {"form": "jumprelu", "penalty": "l0_mean_squared", "threshold_init": 0.3, "bandwidth": 0.3},
    "gated": {"form": "gated", "sparsity": 0.5},
    "matryoshka": {"form": "matryoshka", "prefixes": "16,32,64"},
    "hierarchical": {"form": "hierarchical"},
    "abs": {"form": "abs"},
    "group-max": {"form": "group_max", "k": 4},
}


class Plain:
    """The recipe of a `TrainConfig` in dense plain torch.

    Args:
        config: resolved.
        coder: holds the initial weights; is changed.
        variance: of the rows.
    """

    def __init__(self, config: TrainConfig, coder: SparseCoder, variance: float) -> None:
        self.config, self.coder, self.variance, self.done = config, coder, variance, 0
        self.optimizer = torch.optim.Adam(coder.parameters(), betas=(config.beta1, config.beta2), eps=config.eps)
        self.unused = torch.zeros(config.m, dtype=torch.int64)

    def loss(self, x: Tensor, moment: Moment) -> Tensor:
        c, config = self.coder, self.config
        aux = config.aux_coefficient
        if config.form == "relu":
            return losses.relu(c, x, x, moment, config.sparsity, by_norm=not config.unit_decoder)
        if config.form == "gated":
            return losses.gated(c, x, x, moment, config.sparsity)
        if config.form == "jumprelu":
            return losses.jump_relu(
                c, x, x, moment, config.penalty, config.sparsity, config.bandwidth, config.straight_through,
                preact=config.preact_coefficient,
            )  # fmt: skip
        if config.form == "matryoshka":
            prefixes = prefixes_of(config)
            return losses.matryoshka(c, x, x, moment, prefixes, [1.0] * len(prefixes), aux)
        if config.form == "hierarchical":
            return losses.hierarchical(c, x, x, moment, range(1, config.k + 1), aux)
        return losses.top_k(c, x, x, moment, aux, config.multi_topk)

    @torch.no_grad()
    def active(self, x: Tensor) -> Tensor:
        """bool ``[n, m]``: the latents that fire."""
        c, p = self.coder, losses.pre_of(self.coder, x)
        if c.config.select == "threshold":
            return p > c.threshold
        if c.config.gated:
            return (p > 0) & (c.r_mag.exp() * (p - c.b_enc) + c.b_mag > 0)
        return (p if c.config.select == "relu" else losses.chosen(c, p, c.config.k)) != 0

    def step(self, x: Tensor) -> float:
        config, c, W = self.config, self.coder, self.coder.W_dec
        dead = self.unused >= config.dead_window if config.k_aux or config.preact_coefficient else None
        fired = self.active(x).any(0)
        loss = self.loss(x, Moment(dead, None, self.variance, config.ramp_at(self.done + 1), self.done))
        self.optimizer.zero_grad()
        loss.backward()
        if config.unit_decoder:
            along = torch.nn.functional.normalize(W.detach(), dim=1)
            W.grad -= (W.grad * along).sum(1, keepdim=True) * along
        torch.nn.utils.clip_grad_norm_(c.parameters(), config.clip_norm)
        self.optimizer.param_groups[0]["lr"] = config.lr_at(self.done + 1)
        self.optimizer.step()
        with torch.no_grad():
            if config.unit_decoder:
                W.copy_(torch.nn.functional.normalize(W, dim=1))
            if c.config.select == "threshold":
                c.threshold.clamp_(min=0)
        self.unused = torch.where(fired, 0, self.unused + len(x))
        self.done += 1
        return float(loss.detach())


@torch.no_grad()
def measure(coder: SparseCoder, rows: Tensor, truth: Tensor) -> dict[str, float]:
    """Of a coder in training mode: a batch top-k selects the largest of 2,048 rows, not by its threshold."""
    metrics = ReconstructionMetrics(coder.config.m)
    for x in rows.split(2048):
        codes = coder.encode(x)
        metrics.update(x, coder.decode(codes), codes)
    found = metrics.result()
    return {
        "mcc": recovery.mcc(coder.W_dec, truth),
        "mmcs": recovery.mmcs(coder.W_dec, truth),
        **{name: float(found[name]) for name in ("fvu", "l0", "dead_fraction")},
    }


def compare(fields: dict[str, Any], data: dict[str, Any], seed: int) -> dict[str, dict[str, Any]]:
    """Train both contenders with ``{**SHARED, **fields}`` on rows of a known dictionary, and measure them.

    `data`: ``{"rows", "d", "m", "k"}`` of `fusae.testing.known.known_dictionary`.
    """
    rows, truth = known_dictionary(data["rows"] + HELD_OUT, data["d"], data["m"], data["k"])
    rows, held_out = rows[: data["rows"]], rows[data["rows"] :]
    trainer = Trainer(TrainConfig(**{**SHARED, **fields, "seed": seed}), rows, show=False)
    scaling, dtype = trainer.scaling, trainer.coder.b_dec.dtype
    plain = Plain(trainer.config, copy.deepcopy(trainer.coder), scaling.variance)
    steps = {
        "fusae": lambda x: float(trainer.train_step(x).loss.detach()),
        "plain torch": lambda x: plain.step(scaling.apply(x)),
    }
    told: dict[str, dict[str, Any]] = {name: {"loss": {}, "seconds": 0.0} for name in steps}
    for i in range(1, trainer.config.steps + 1):
        x = trainer.feed.next().to(dtype)
        for name, step in steps.items():
            start = time.process_time()
            loss = step(x)
            told[name]["seconds"] += time.process_time() - start
            if i in LOSSES_AT:
                told[name]["loss"][str(i)] = loss
    for name, coder in (("fusae", trainer.coder), ("plain torch", plain.coder)):
        told[name] |= measure(coder, scaling.apply(held_out.to(dtype)), truth)
        told[name]["seconds"] = round(told[name]["seconds"], 2)
    return told


def main(
    forms: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(FORMS)}; default: all")] = None,
    seeds: Annotated[int, typer.Option(help="seeds 0, 1, ... to run", min=1)] = 3,
    steps: Annotated[int, typer.Option(help="steps of a run", min=1)] = 1000,
    quick: Annotated[bool, typer.Option("--quick", help="60 steps and one seed: does everything work?")] = False,
    threads: Annotated[int, typer.Option(help="of torch", min=1)] = 1,
    out: Annotated[Path | None, typer.Option(help="results file to add to")] = None,
) -> None:
    """Train FORMS with fusae and in plain torch, and compare how well they find the dictionary of the data."""
    unknown = [name for name in forms or [] if name not in FORMS]
    if unknown:
        console.print(f"error: FORMS must be of {', '.join(FORMS)}, got {unknown[0]!r}", style="red", markup=False)
        raise typer.Exit(2)
    if quick:
        seeds, steps = 1, 60
    torch.set_num_threads(threads)
    data = {"rows": 131_072, "d": 32, "m": 64, "k": 3}
    where = environment(command=f"python benchmarks/{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}")
    try:
        runs = read_runs(out) if out is not None and out.exists() else []
    except ReportError as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(2) from None
    for name in forms or FORMS:
        fields = {**FORMS[name], "tokens": steps * SHARED["batch_size"], **({"warmup_steps": 5} if quick else {})}
        for seed in range(seeds):
            key = {"form": name, "seed": seed, "fields": {**SHARED, **fields}, "data": data}
            done = next((run for run in runs if all(run[part] == key[part] for part in key)), None)
            if done is None:
                done = {**key, "contenders": compare(fields, data, seed), **where}
                runs.append(done)
                if out is not None:
                    write_results(out, runs)
            told = ", ".join(
                f"{who}: MCC {m['mcc']:.4f}, FVU {m['fvu']:.4f}, L0 {m['l0']:.2f}, {m['seconds']:.0f} s"
                for who, m in done["contenders"].items()
            )
            console.print(f"{name}, seed {seed}: {told}", markup=False, soft_wrap=True)
    for name, told in verdicts(runs).items():
        console.print(f"{name}: {told}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
