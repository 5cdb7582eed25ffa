# SPDX-License-Identifier: Apache-2.0
"""Very wide dictionaries on one machine: memory, time of a step, and how well `fusae plan` foresaw both.

    python benchmarks/wide.py train --m 1048576 --out wide.json        # one width: every phase of a run
    python benchmarks/wide.py growth --out wide.json                   # from 2^14 to 2^20 latents
    python benchmarks/wide.py optimiser --m 1048576 --out wide.json    # lazy steps beside dense ones
    python benchmarks/wide.py quality ACTIVATIONS --out wide.json      # moments in few bits beside float32
    python benchmarks/wide.py page wide.json --page docs/wide.md       # what the file holds, and a figure beside it

Every width is measured in a process of its own. Time is compared within rounds, in which a step, its bare product and
the pieces that `fusae plan` times take turns; what counts is the median of the ratios. Memory is what the process holds
beside mapped files, over what it held after its imports; the moments are made resident first, as they are in the end.
"""

from __future__ import annotations

import ctypes
import gc
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fusae._pages import large_pages
from fusae.formats.native import write_json
from fusae.nn import SparseCoder
from fusae.optim import Adam
from fusae.plan import measure_rates, needs, speed
from fusae.testing.bench_row import environment
from fusae.train import TrainConfig, Trainer

BARS = {"peak over weights and moments": 1.15, "step over its bare product": 1.4, "memory off the plan": 0.05,
        "time off the plan": 0.25}  # fmt: skip
OPTIMISER_BAR, QUALITY_BAR = 8.0, 0.005
START, END = "<!-- results:start -->", "<!-- results:end -->"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def held() -> int:
    """Bytes of this process that are not mapped files."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not tell how much memory a process holds")


class Peak:
    """The most that is held, looked at every few milliseconds; `take` begins anew."""

    def __init__(self) -> None:
        self.base = held()
        self.most = self.base
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.most = max(self.most, held())
            time.sleep(0.003)

    def take(self) -> int:
        most, self.most = max(self.most, held()), held()
        return most - self.base


def product(x: torch.Tensor, weight: torch.Tensor, columns: int = 4096) -> None:
    """``x weightᵀ`` in chunks of columns, by torch."""
    out = torch.empty(len(x), columns)
    for part in weight.split(columns):
        torch.mm(x, part.T, out=out[:, : len(part)] if len(part) == columns else torch.empty(len(x), len(part)))


def config_of(m: int, d: int, k: int, n: int, steps: int, **fields: Any) -> TrainConfig:
    options = {"optimizer": "masked", "device": "cpu", "checkpoint_every": 0, "dead_window": n, "init_rows": n}
    return TrainConfig(m=m, k=k, d=d, batch_size=n, tokens=n * (steps + 1), **{**options, **fields})


def measure(m: int, d: int, k: int, n: int, rounds: int, threads: int, phases: bool, fields: dict) -> dict[str, Any]:
    """One width, in this process."""
    torch.set_num_threads(threads)
    x = torch.randn(4 * n, d, generator=torch.Generator().manual_seed(0))
    peak, found = Peak(), {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config_of(m, d, k, n, 2 * rounds + 2, **fields), x, folder, show=False)
        config, need = trainer.config, needs(trainer.config)
        made = need.parts["weights"] + need.parts["moments"]
        found |= {"init": peak.take()}

        def step() -> float:
            start = time.perf_counter()
            trainer.take(x[trainer.step % 4 * n :][:n], start, 0.0)
            return time.perf_counter() - start

        step()
        for state in trainer.optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    value.add_(0)  # resident, as it is once every latent has fired
        peak.take()
        steps, bare, foreseen = [], [], []
        for _ in range(rounds):
            predicted = speed(config, measure_rates(config, rounds=1))
            # AuxK is at work: next to all latents of a wide dictionary are dead to so few tokens.
            foreseen.append(sum(predicted.seconds.values()) + predicted.aux_seconds)
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what timing the pieces took is no part of a step
            peak.take()
            steps.append(step())
            found["train"] = max(found.get("train", 0), peak.take())
            start = time.perf_counter()
            product(x[:n], trainer.coder.W_enc.detach())
            bare.append(time.perf_counter() - start)
        if phases:
            peak.take()
            trainer.save_checkpoint()
            found["checkpoint"] = peak.take()
            del trainer, step
            peak.take()
            trainer = Trainer(None, x, folder, show=False, resume=True)
            found["resume"] = peak.take()
            trainer.step = config.steps - 1
            trainer.run()
            found["last step and save"] = peak.take()
            del trainer
            peak.take()
            SparseCoder.load(Path(folder) / "coder")
            found["load"] = peak.take()
    ratio = statistics.median(a / b for a, b in zip(steps, bare, strict=True))
    off = statistics.median(a / b for a, b in zip(foreseen, steps, strict=True)) - 1
    return {
        "m": m, "d": d, "k": k, "n": n, "threads": threads, "fields": fields, "k_aux": config.k_aux,
        "weights_and_moments": made, "planned": need.total, "planned_parts": need.parts, "peak": found,
        "step_s": steps, "bare_s": bare, "foreseen_s": foreseen,
        "peak over weights and moments": max(found.values()) / made,
        "step over its bare product": ratio,
        "memory off the plan": found["train"] / need.total - 1,
        "time off the plan": off,
    }  # fmt: skip


def child(arguments: dict[str, Any]) -> dict[str, Any]:
    """`measure` in a fresh process."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import json, wide; " \
           "print(json.dumps(wide.measure(**json.loads(sys.argv[1]))))"  # fmt: skip
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring {arguments} failed:\n{done.stderr.strip()[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _judge(result: dict[str, Any]) -> bool:
    good = True
    for what, bar in BARS.items():
        reached = abs(result[what]) <= bar
        good &= reached
        print(f"{'reached' if reached else 'MISSED '} {what}: {result[what]:.3f}, bar {bar}")
    return good


def _finish(out: Path | None, name: str, value: dict[str, Any], good: bool) -> None:
    """Put a result into the file beside those of the other commands."""
    if out is not None:
        command = shlex.join(["python", "benchmarks/wide.py", *sys.argv[1:]])
        held_so_far = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
        write_json(out, {**held_so_far, name: {**value, **environment(command=command)}})
    if not good:
        raise SystemExit(1)


M = Annotated[int, typer.Option(help="latents")]
OUT = Annotated[Path | None, typer.Option(help="JSON file to write")]


@app.command()
def train(
    m: M = 1 << 20, d: int = 384, k: int = 32, n: int = 2048, rounds: int = 3, threads: int = 2,
    optimizer: str = "masked", moments: str = "float32", k_aux: int | None = None, out: OUT = None,
) -> None:  # fmt: skip
    """Every phase of a run: initial weights, steps, checkpoint, resuming, saving, loading."""
    fields: dict[str, Any] = {"optimizer": optimizer, "moments": moments}
    fields |= {} if k_aux is None else {"k_aux": k_aux}
    fields |= {"beta1": 0.0} if optimizer == "lazy" else {}
    result = child(dict(m=m, d=d, k=k, n=n, rounds=rounds, threads=threads, phases=True, fields=fields))
    for phase, most in result["peak"].items():
        print(f"{phase}: {most / 1e9:.3f} GB, {most / result['weights_and_moments']:.3f} of weights and moments")
    _finish(out, "train", result, _judge(result))


@app.command()
def growth(
    d: int = 384, k: int = 32, n: int = 2048, rounds: int = 3, threads: int = 2, first: int = 14, last: int = 20,
    out: OUT = None,
) -> None:  # fmt: skip
    """Step time and memory from 2**first to 2**last latents."""
    results = []
    for power in range(first, last + 1):
        arguments = dict(m=1 << power, d=d, k=k, n=n, rounds=rounds, threads=threads, phases=False, fields={})
        one = child(arguments)
        results.append(one)
        step, bare = statistics.median(one["step_s"]), statistics.median(one["bare_s"])
        print(f"m 2^{power}: step {step:.3f} s, bare product {bare:.3f} s, peak {one['peak']['train'] / 1e9:.3f} GB, "
              f"off the plan: memory {one['memory off the plan']:+.3f}, time {one['time off the plan']:+.3f}",
              flush=True)  # fmt: skip
    # Per latent, the widest against the middle: linear growth keeps it.
    each = [statistics.median(r["step_s"]) / r["m"] for r in results]
    print(f"seconds per latent and step: {', '.join(f'{1e6 * t:.2f}' for t in each)} (millionths)")
    _finish(out, "growth", {"results": results}, True)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Step time and memory over m."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    m = [r["m"] for r in results]
    left.plot(m, [statistics.median(r["step_s"]) for r in results], "o-", label="training step")
    left.plot(m, [statistics.median(r["bare_s"]) for r in results], "s--", label="its bare product (torch)")
    left.plot(m, [statistics.median(r["foreseen_s"]) for r in results], ":", label="fusae plan")
    right.plot(m, [r["peak"]["train"] / 1e9 for r in results], "o-", label="peak of a step")
    right.plot(m, [r["weights_and_moments"] / 1e9 for r in results], "s--", label="weights and moments")
    right.plot(m, [r["planned"] / 1e9 for r in results], ":", label="fusae plan")
    for axes, name in ((left, "seconds a step"), (right, "GB")):
        axes.set(xscale="log", yscale="log", xlabel="latents m", ylabel=name)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    one = results[0]
    figure.suptitle(f"d {one['d']}, k {one['k']}, {one['n']} tokens a step, {one['threads']} CPU threads, masked Adam")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


@app.command()
def optimiser(
    m: M = 1 << 20, d: int = 384, k: int = 32, n: int = 2048, rounds: int = 5, threads: int = 2, out: OUT = None,
) -> None:  # fmt: skip
    """The optimiser's share of a step: lazy beside dense, beta1 = 0, on the latents that n·k entries touch."""
    torch.set_num_threads(threads)
    rows = torch.randint(m, (n * k,), generator=torch.Generator().manual_seed(0)).unique()
    param = large_pages(torch.zeros(m, d)).requires_grad_()  # as those of a coder are
    param.data[:, 0] = 1
    grad = torch.sparse_coo_tensor(rows[None], torch.randn(len(rows), d), (m, d), is_coalesced=True,
                                   check_invariants=False)  # fmt: skip
    options = {"lr": 1e-4, "betas": (0.0, 0.999), "project": True, "renormalise": True}
    contenders = {"dense": Adam([param], **options), "lazy": Adam([param], lazy=True, **options)}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, optimizer in contenders.items():
            param.grad = grad
            start = time.perf_counter()
            optimizer.step()
            if turn:
                times[name].append(time.perf_counter() - start)
    ratio = statistics.median(a / b for a, b in zip(times["dense"], times["lazy"], strict=True))
    reached = ratio >= OPTIMISER_BAR
    print(f"{len(rows):,} of {m:,} latents touched; dense {1e3 * statistics.median(times['dense']):.0f} ms, lazy "
          f"{1e3 * statistics.median(times['lazy']):.0f} ms a matrix")  # fmt: skip
    print(f"{'reached' if reached else 'MISSED '} dense over lazy: {ratio:.1f}, bar {OPTIMISER_BAR}")
    _finish(out, "optimiser", {"m": m, "d": d, "touched": len(rows), "seconds": times, "ratio": ratio}, reached)


@app.command()
def quality(
    activations: Annotated[Path, typer.Argument(help="folder of cached activations, or a .npy file")],
    m: M = 4096, k: int = 32, n: int = 1024, tokens: int = 120_000, lr: float = 1e-3, seeds: int = 3,
    threads: int = 2, out: OUT = None,
) -> None:  # fmt: skip
    """FVU of held-out rows after runs that differ in the moments (and in lazy steps) alone."""
    from fusae.train import open_data

    torch.set_num_threads(threads)
    source = open_data(activations if activations.is_dir() else str(activations))
    count = source.shape[0]
    rows = source.take(slice(0, count))
    rows = rows[torch.randperm(count, generator=torch.Generator().manual_seed(0))].float()
    held_out, rows = rows[: count // 20], rows[count // 20 :]
    modes: dict[str, dict[str, Any]] = {
        "float32": {}, "bfloat16": {"moments": "bfloat16"}, "8bit": {"moments": "8bit"},
        "beta1 = 0": {"beta1": 0.0}, "beta1 = 0, lazy, 8bit": {"beta1": 0.0, "optimizer": "lazy", "moments": "8bit"},
    }  # fmt: skip
    fvu: dict[str, list[float]] = {name: [] for name in modes}
    for seed in range(seeds):
        for name, fields in modes.items():
            config = TrainConfig(m=m, k=k, batch_size=n, tokens=tokens, lr=lr, seed=seed, device="cpu", **fields)
            coder = Trainer(config, rows, show=False).run()
            with torch.no_grad():
                error = torch.cat([part - coder(part) for part in held_out.split(4096)])
            fvu[name].append(float(error.square().sum() / (held_out - held_out.mean(0)).square().sum()))
            print(f"seed {seed}, {name}: FVU {fvu[name][-1]:.5f}", flush=True)
    good, worse = True, {}
    for name, against in (("bfloat16", "float32"), ("8bit", "float32"), ("beta1 = 0, lazy, 8bit", "beta1 = 0")):
        worse[name] = statistics.mean(fvu[name]) / statistics.mean(fvu[against]) - 1
        reached = worse[name] <= QUALITY_BAR
        good &= reached
        print(f"{'reached' if reached else 'MISSED '} {name}: FVU {100 * worse[name]:+.3f} % of that of {against}, bar "
              f"{100 * QUALITY_BAR} %")  # fmt: skip
    value = {"m": m, "k": k, "n": n, "tokens": tokens, "lr": lr, "fvu": fvu, "relative": worse}
    _finish(out, "quality", value, good)


@app.command()
def page(
    results: Annotated[Path, typer.Argument(help="file that the other commands have written")],
    page: Annotated[Path, typer.Option(help="Markdown to write between its marks")] = Path("docs/wide.md"),
) -> None:
    """Put the results into the page, and draw the growth beside it."""
    held_so_far = json.loads(results.read_text(encoding="utf-8"))
    text = page.read_text(encoding="utf-8")
    head, rest = text.split(START)
    if "growth" in held_so_far:
        draw(held_so_far["growth"]["results"], page.with_suffix(".svg"))
    body = "\n\n".join(lines for name, write in SECTIONS.items() if name in held_so_far
                       for lines in [write(held_so_far[name])])  # fmt: skip
    page.write_text(f"{head}{START}\n{body}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def _made(one: dict[str, Any]) -> str:
    changes = " with local changes" if one["dirty"] else ""
    return f"`{one['command']}` on {one['device']}, {one['isa']}, commit {(one['git'] or '')[:10]}{changes}."


def _train_lines(one: dict[str, Any]) -> str:
    rows = [f"| {phase} | {most / 1e9:.2f} GB | {most / one['weights_and_moments']:.3f} |"
            for phase, most in one["peak"].items()]  # fmt: skip
    step, bare = statistics.median(one["step_s"]), statistics.median(one["bare_s"])
    return "\n".join([
        f"**One width**: m {one['m']:,}, d {one['d']}, k {one['k']}, {one['n']} tokens a step. {_made(one)}", "",
        "| phase | peak | over weights and moments |", "|---|---:|---:|", *rows, "",
        f"A step takes {one['step over its bare product']:.2f} times its bare product ({step:.1f} s beside {bare:.1f} "
        "s, with AuxK at work); "
        f"`fusae plan` was off by {100 * one['memory off the plan']:+.1f} % of the memory and "
        f"{100 * one['time off the plan']:+.0f} % of the time.",
    ])  # fmt: skip


def _growth_lines(one: dict[str, Any]) -> str:
    rows = [f"| {r['m']:,} | {statistics.median(r['step_s']):.3f} | {statistics.median(r['bare_s']):.3f} | "
            f"{statistics.median(r['foreseen_s']):.3f} | {r['peak']['train'] / 1e9:.3f} | {r['planned'] / 1e9:.3f} |"
            for r in one["results"]]  # fmt: skip
    return "\n".join([
        f"**Growth.** {_made(one)}", "", "![step time and memory over m](wide.svg)", "",
        "| m | step, s | bare product, s | foreseen, s | peak, GB | foreseen, GB |", "|---:|---:|---:|---:|---:|---:|",
        *rows,
    ])  # fmt: skip


def _optimiser_lines(one: dict[str, Any]) -> str:
    dense, lazy = (1e3 * statistics.median(one["seconds"][name]) for name in ("dense", "lazy"))
    return (f"**Lazy steps**: {one['touched']:,} of {one['m']:,} latents touched: {lazy:.0f} ms a matrix, dense "
            f"{dense:.0f} ms, {one['ratio']:.1f} times as much. {_made(one)}")  # fmt: skip


def _quality_lines(one: dict[str, Any]) -> str:
    rows = [f"| {name} | {statistics.mean(fvu):.5f} | {', '.join(f'{v:.5f}' for v in fvu)} | "
            f"{100 * one['relative'][name]:+.3f} % |" if name in one["relative"] else
            f"| {name} | {statistics.mean(fvu):.5f} | {', '.join(f'{v:.5f}' for v in fvu)} | |"
            for name, fvu in one["fvu"].items()]  # fmt: skip
    return "\n".join([
        f"**Quality**: m {one['m']:,}, k {one['k']}, {one['tokens']:,} tokens. {_made(one)}", "",
        "| moments | FVU, held out | of each seed | against float32 |", "|---|---:|---|---:|", *rows,
    ])  # fmt: skip


SECTIONS = {"train": _train_lines, "growth": _growth_lines, "optimiser": _optimiser_lines, "quality": _quality_lines}


if __name__ == "__main__":
    app()
