# SPDX-License-Identifier: Apache-2.0
"""From text to report, in stages. Each leaves whole files or none, so a later run takes up where an earlier one
stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from ..data import Activations, ActivationStream, TokenChunks, hooks, weights_sha256
from ..eval import write_features, write_report
from ..formats.native import read_json, write_json
from ..info import versions
from ..nn import SparseCoder, load
from ..train import TrainConfig, Trainer, checkpoint, shards
from ..train.run_dir import CONFIG, METRICS, locked, merge
from ..train.setup import device_of
from . import evaluate
from .config import DataConfig
from .errors import PipelineError
from .inputs import HELD_OUT_TOKENS, Inputs, load_inputs, rows_in
from .live import LiveRows

SETTINGS = "pipeline.json"
EVAL, FEATURES, REPORT = "eval.json", "features.json", "report.html"
CODER = ("coder/coder.json", "coder/coder.safetensors")
TRAINING = (CONFIG, METRICS, checkpoint.NAME, shards.FOLDER, "coder", "tensorboard")
_NEEDED = ("transformers", "tokenizers", "jinja2", "matplotlib")


class Pipeline:
    """A run from text to report.

    Args:
        train: a `TrainConfig`; to resume also a dict of the fields given, or None.
        data: a `DataConfig` that names model, module and text; to resume also a dict of the fields given, or None.
        out: directory of the run: pipeline.json, what training writes, eval.json, features.json and report.html.
        inputs: gives model and text; default: `load_inputs` of the files that `data` names.
        resume: go on with the run in `out`, in whatever stage it stopped.
        overwrite: begin anew where `out` holds a run. Activations in the cache are kept.
        show: say what is done, with progress bars, on stderr.

    Raises:
        ValueError, TypeError, FileExistsError, FileNotFoundError: bad arguments, or `out` holds another run; before any
            work.
    """

    stages = ("text", "activations", "training", "evaluation", "latents", "report")
    results = (EVAL, FEATURES, REPORT)

    def __init__(
        self,
        train: TrainConfig | dict[str, Any] | None,
        data: DataConfig | dict[str, Any] | None,
        out: str | Path,
        *,
        inputs: Callable[[], Inputs] | None = None,
        resume: bool = False,
        overwrite: bool = False,
        show: bool = True,
    ) -> None:
        self.out, self.show = Path(out), show
        self._given = train
        if resume:
            self.train, self.data = self._resume(train, data)
        else:
            for name, value, kind in (("train", train, TrainConfig), ("data", data, DataConfig)):
                if not isinstance(value, kind):
                    raise TypeError(f"{name} must be a fusae {kind.__name__}, got {type(value).__name__}")
            self.train, self.data = train, data.absolute()
        if inputs is None:
            self.data.require_text()
        self.load = inputs or (lambda: load_inputs(self.data, self.device))
        self.device = device_of(self.train.device)
        self.console = Console(stderr=True, quiet=not show, highlight=False, soft_wrap=True)
        self.seconds: dict[str, float] = {}
        if not resume:
            self._claim(overwrite)

    # ---- the directory -----------------------------------------------------------------------------------------------

    def _claim(self, overwrite: bool) -> None:
        marker = self.out / SETTINGS
        every = (SETTINGS, *TRAINING, *self.results)
        present = [name for name in every if (self.out / name).exists()]
        if present and not overwrite:
            raise FileExistsError(
                f"out: {self.out} holds a run ({', '.join(present)}); resume it, overwrite it, or take another one"
            )
        # The mark goes first: without it, what is left of a removal cut short is not taken for this run's.
        with locked(self.out):
            remove(self.out, every)
        write_json(marker, {"train": self.train.to_dict(), "data": self.data.to_dict(), "versions": _versions()})

    def _resume(self, train: Any, data: Any) -> tuple[TrainConfig, DataConfig]:
        stored, theirs = read_settings(self.out)
        given = list(data) if isinstance(data, dict) else [] if data is None else list(theirs.to_dict())
        mine = (DataConfig.from_dict(data or {}) if not isinstance(data, DataConfig) else data).absolute().to_dict()
        kept = theirs.to_dict()
        for name in given:
            value = mine[name]
            if value != kept[name]:
                raise ValueError(
                    f"{name} is {value!r}, the run to resume has {kept[name]!r}; start a new run to change it"
                )
        if stored.tokens is not None:  # whole batches, as `merge` compares them
            stored = dataclasses.replace(stored, tokens=stored.tokens - stored.tokens % stored.batch_size)
        return merge(train, stored), theirs

    @property
    def finished(self) -> bool:
        """Whether all files but the report are there, whole."""
        done = all((self.out / name).exists() for name in (CONFIG, METRICS, *CODER, EVAL, FEATURES))
        return done and not (self.out / checkpoint.NAME).exists()

    # ---- the stages --------------------------------------------------------------------------------------------------

    def run(self) -> Path:
        """All stages that are not done yet. Returns the path of the report.

        Raises:
            PipelineError: a stage failed. What was done before is kept.
            KeyboardInterrupt: Ctrl-C or SIGTERM; what was done before is kept.
        """
        with terminated_as_interrupted():
            if not self.finished:
                self.work()
            with self.stage("report", "One HTML file with all of it; it needs no network."):
                return write_report(self.out)

    def work(self) -> None:
        """Every stage before the report."""
        with self.stage("text", "The language model is loaded, and documents become tokens."):
            _check_installed()
            inputs = self.load()
            train_chunks, held_chunks = self.chunks(inputs)
            self.console.print(
                f"{inputs.model_name}; {inputs.text_name}: {train_chunks.tokens:,} tokens to train on, "
                f"{held_chunks.tokens:,} held out",
                markup=False,
            )
            self._check_width(inputs, train_chunks)
        where = "straight from the model" if self.data.store == "stream" else "kept on disk"
        with self.stage("activations", f"What the model computes at {', '.join(self.data.sites)}, {where}."):
            model_sum = weights_sha256(inputs.model)
            source, rows, held = self.activations(inputs, train_chunks, held_chunks, model_sum)
        with self.stage("training", f"{self.train.m:,} latents, {self.train.k} active per token, learn to rebuild it."):
            coder = self.training(inputs, source, rows_in(train_chunks, self.data))
        with self.stage("evaluation", "How much is rebuilt of held-out text, and what the model loses with it."):
            evaluation = self.evaluation(inputs, coder, held, held_chunks)
        with self.stage("latents", f"Where {self.data.features} of the latents are most active, in the training text."):
            self.latents(inputs, coder, evaluation["density"], rows, train_chunks)
        self.further(inputs, rows)
        self.describe(inputs)

    def further(self, inputs: Inputs, rows: Activations | LiveRows) -> None:
        """Stages of a kind of run that has more."""

    @contextlib.contextmanager
    def stage(self, name: str, what: str) -> Iterator[None]:
        """Announce a stage, time it, and name it where it fails."""
        number = self.stages.index(name) + 1
        self.console.print(f"\n[bold]{number}/{len(self.stages)} {name}[/]: {escape(what)}")
        start = time.perf_counter()
        try:
            yield
        except Exception as error:
            raise PipelineError(f"stage '{name}' failed: {type(error).__name__}: {error}") from error
        self.seconds[name] = round(time.perf_counter() - start, 1)
        self.console.print(f"[dim]{name} took {self.seconds[name]:,.1f} s[/]")

    def chunks(self, inputs: Inputs) -> tuple[TokenChunks, TokenChunks]:
        """The chunks of the training part and of the held-out part, as many as asked for."""
        made = []
        for part, field, most in (("train", "train_tokens", None), ("held_out", "held_out_tokens", HELD_OUT_TOKENS)):
            asked = getattr(self.data, field)
            chunks = inputs.chunks(self.data, part, asked or most, self.show)
            if asked is not None and (rows := rows_in(chunks, self.data)) < asked:
                raise ValueError(f"{field} must be at most {rows:,}, which is all this text has, got {asked:,}")
            made.append(chunks)
        return made[0], made[1]

    def _check_width(self, inputs: Inputs, chunks: TokenChunks) -> None:
        """That module and training fit together, before the model reads all of the text."""
        sites = hooks.Sites.find(inputs.model, self.data.sites)
        with hooks.evaluating(inputs.model):
            ids, mask = hooks.batch_of(hooks.check_chunks(chunks, inputs.model), slice(0, 1), self.device)
            width = hooks.run_to(inputs.model, sites, ids, mask).shape[-1]
        if self.train.is_transcoder:
            half = len(sites.names) // 2
            for name in sites.names[half:]:
                if name.endswith(":in") and not all(other.endswith(":in") for other in sites.names[:half]):
                    raise ValueError(
                        f"module: all inputs come first and then all targets, got {', '.join(sites.names)}; the input "
                        f"{name} is among the targets"
                    )
        rows = rows_in(chunks, self.data)
        self.train.resolve(width, rows - rows % self.train.batch_size, sites.widths)

    def activations(
        self, inputs: Inputs, train_chunks: TokenChunks, held_chunks: TokenChunks, model_sum: str
    ) -> tuple[Any, Activations | LiveRows, Activations | LiveRows]:
        """(what to train on, the same rows to look through, the held-out rows)."""
        data, nonfinite = self.data, self.train.nonfinite
        if data.store != "stream":
            rows, held = (
                evaluate.stored_or_live(
                    inputs, data, chunks, part, model_sum, nonfinite=nonfinite, show=self.show
                )
                for chunks, part in ((train_chunks, "train"), (held_chunks, "held-out"))
            )  # fmt: skip
            if data.store != "float32":
                self.console.print(f"stored as {data.store}, which loses FVU {rows.storage['fvu']:.2g}", markup=False)
            return rows, rows, held
        source = ActivationStream(
            inputs.model,
            train_chunks,
            data.sites if len(data.sites) > 1 else data.sites[0],
            buffer_rows=data.buffer_rows,
            batch_size=data.chunk_batch,
            skip_positions=data.skip_positions,
            outlier_factor=data.outlier_factor or None,
            drop_special=data.drop_special,
            nonfinite=nonfinite,
            source=f"{inputs.model_name}, {inputs.text_name}",
            model_sha256=model_sum,
        )
        rows, held = (
            evaluate.stored_or_live(
                inputs, data, chunks, "", model_sum, nonfinite=nonfinite, limits=limits
            )
            for chunks, limits in ((train_chunks, source.norm_limit), (held_chunks, None))
        )  # fmt: skip
        return source, rows, held

    def training(self, inputs: Inputs, source: Any, rows: int) -> SparseCoder:
        """Train, or go on with it, or read what is trained already; the coder of plain inputs on the device."""
        unfinished = (self.out / checkpoint.NAME).exists()
        if unfinished or not all((self.out / name).exists() for name in CODER):
            remove(self.out, self.results)  # of another dictionary
            config: Any = self.train
            if unfinished:
                config = self._given
            elif config.tokens is None and source.shape[0] is None:
                config = dataclasses.replace(config, tokens=config.epochs * rows)
            trainer = Trainer(
                config, source, self.out, resume=unfinished, overwrite=not unfinished, show=self.show,
                about={"pipeline": self.about(inputs)},
            )  # fmt: skip
            trainer.run()
            if not trainer.finished:
                raise KeyboardInterrupt
            remove(self.out, self.results)  # what `fusae eval` may have measured meanwhile
        return load(self.out / "coder", self.device).eval()

    def evaluation(
        self, inputs: Inputs, coder: SparseCoder, held: Activations | LiveRows, chunks: TokenChunks
    ) -> dict[str, Any]:
        path = self.out / EVAL
        if path.exists():
            return read_json(path, "an evaluation")
        evaluation = evaluate.evaluate_text(
            coder, inputs, self.data, held, chunks, nonfinite=self.train.nonfinite, show=self.show
        )
        evaluation["source"] |= {"passages": "the training text", "effects": evaluate.EFFECTS}
        write_json(path, evaluation)
        return evaluation

    def latents(self, inputs: Inputs, coder: SparseCoder, density: list[float], rows: Any, chunks: TokenChunks) -> None:
        path = self.out / FEATURES
        if path.exists():
            return
        found = evaluate.features(
            coder, inputs, self.data, density, rows, chunks, seed=self.train.seed, show=self.show
        )  # fmt: skip
        write_features(path, found)

    def about(self, inputs: Inputs) -> dict[str, Any]:
        """What config.json says of the run under "pipeline"."""
        return {"data": self.data.to_dict(), "sha256": inputs.sha256, "threads": torch.get_num_threads()}

    def describe(self, inputs: Inputs) -> None:
        """What is known at the end, in config.json."""
        path = self.out / CONFIG
        about = json.loads(path.read_text(encoding="utf-8"))
        before = about.get("pipeline", {})
        seconds = {**before.get("stage_seconds", {}), **self.seconds}
        about["pipeline"] = {**before, **self.about(inputs), "stage_seconds": seconds}
        about["versions"] = {**about.get("versions", {}), **_versions()}
        write_json(path, about)


def read_settings(run: Path) -> tuple[TrainConfig, DataConfig]:
    """What pipeline.json in a run's directory says.

    Raises:
        FileNotFoundError, ValueError: it is not there, or damaged; the message names it.
    """
    marker = Path(run) / SETTINGS
    try:
        about = read_json(marker, "the settings of a run from text")
        return TrainConfig.from_dict(about["train"]), DataConfig.from_dict(about["data"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{marker} is damaged ({error}); overwrite the run or take another directory") from error


def remove(out: Path, names: tuple[str, ...]) -> None:
    """Files and folders of `out`, where they are there."""
    for name in names:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Inside, SIGTERM is a KeyboardInterrupt: what is at work saves what it has. Main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _check_installed() -> None:
    """That the last stages can run, before the first one takes its minutes."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"{', '.join(missing)} must be installed: pip install 'fusae[lm,report]'")


def _versions() -> dict[str, str]:
    found = versions()
    for name in ("transformers", "tokenizers", "gguf", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
