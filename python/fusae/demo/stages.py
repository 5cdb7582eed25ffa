# SPDX-License-Identifier: Apache-2.0
"""The demo: a run from text with settings of its own, and a benchmark of its training step."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..data import default_cache_dir
from ..formats.native import write_json
from ..pipeline import Inputs, Pipeline
from ..pipeline.stages import EVAL, FEATURES, REPORT, SETTINGS, read_settings
from .config import DemoConfig
from .inputs import load_inputs

BENCH = "bench.json"


def run(
    config: DemoConfig,
    out: str | Path,
    *,
    cache_dir: str | Path | None = None,
    inputs: Callable[[], Inputs] | None = None,
    overwrite: bool = False,
    show: bool = True,
) -> Path:
    """Activations, training, evaluation, passages, benchmark, report. Returns the path of the report.

    Args:
        config: a `DemoConfig`.
        out: directory of the run, as of `fusae.pipeline.Pipeline`, and bench.json. One that holds a part of the same
            run is gone on with.
        cache_dir: for downloads and activations; default: `fusae.data.default_cache_dir()`.
        inputs: gives model and text; default: `load_inputs`.
        overwrite: begin anew where `out` holds a run already. Downloads and activations are kept.
        show: say what is done, with progress bars, on stderr.

    Raises:
        ValueError, FileExistsError: a bad argument, or `out` holds another run; before any work.
        PipelineError: a stage failed. What was done before is kept.
        KeyboardInterrupt: what was done before is kept.
    """
    return Demo(config, out, cache_dir, inputs=inputs, overwrite=overwrite, show=show).run()


class Demo(Pipeline):
    """`Pipeline` with the demo's settings and one more stage, the benchmark. Goes on with a run of equal settings."""

    stages = ("text", "activations", "training", "evaluation", "latents", "benchmark", "report")
    results = (EVAL, FEATURES, BENCH, REPORT)

    def __init__(
        self,
        config: DemoConfig,
        out: str | Path,
        cache_dir: str | Path | None = None,
        *,
        inputs: Callable[[], Inputs] | None = None,
        overwrite: bool = False,
        show: bool = True,
    ) -> None:
        if not isinstance(config, DemoConfig):
            raise TypeError(f"config must be a fusae.demo.DemoConfig, got {type(config).__name__}")
        cache = Path(cache_dir or default_cache_dir())
        train, data = config.training(), config.data(cache).absolute()
        resume = not overwrite and (Path(out) / SETTINGS).exists()
        if resume:
            _same(Path(out), {**train.to_dict(), **data.to_dict()})
        self.config = config
        super().__init__(
            train, data, out, inputs=inputs or (lambda: load_inputs(self.data, cache, show)), resume=resume,
            overwrite=overwrite, show=show,
        )  # fmt: skip

    @property
    def finished(self) -> bool:
        return super().finished and (self.out / BENCH).exists()

    def further(self, inputs: Inputs, rows: Any) -> None:
        with self.stage("benchmark", "The training step of this shape, in turns with the same step in plain torch."):
            if (self.out / BENCH).exists():
                return
            from ..testing.bench import train_step_rows

            config = self.config
            n = min(config.bench_rows, len(rows))
            sample = rows.take(slice(0, 3 * n))
            with self.console.status("timing"):
                result = train_step_rows(
                    n, sample.shape[1], config.m, config.k, config.bench_rounds, sample, warmup=1,
                    memory=config.bench_memory,
                )  # fmt: skip
            write_json(self.out / BENCH, {"rows": [row.to_json() for row in result]})

    def about(self, inputs: Inputs) -> dict[str, Any]:
        return {**super().about(inputs), "command": shlex.join([Path(sys.argv[0]).name or "python", *sys.argv[1:]])}


def _same(out: Path, settings: dict[str, Any]) -> None:
    try:
        train, data = read_settings(out)
    except ValueError as error:
        raise ValueError(f"out: {error}; pass --overwrite or take another --out") from error
    stored = {**train.to_dict(), **data.to_dict()}
    other = [f"{name} {stored[name]!r} (now {value!r})" for name, value in settings.items() if stored[name] != value]
    if other:
        raise ValueError(
            f"out: {out} holds a run of other settings: {', '.join(other)}; pass --overwrite or take another --out"
        )
