# SPDX-License-Identifier: Apache-2.0
"""`fusae train` and `fusae eval` on the command line."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from ..train.presets import PRESETS, fields_of


def train(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG",
            help="TOML or JSON file (`fusae config` prints one): fields of training, `data` (a table, or a path), "
            "`eval_data`, `out`; options given here win",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="rows to train on, in place of model and text: a .npy file (tokens x width), or a folder of "
            "activations",
            show_default=False,
        ),
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="rows to measure the reconstruction on, with --data", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="directory of the run: config, metrics, checkpoint, coder, report", show_default=False),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"a published recipe, over the fields of CONFIG and under the options: {', '.join(PRESETS)}",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="go on with the unfinished run in this directory", metavar="RUN", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a run that is in --out")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
    **fields: Any,
) -> None:
    from ..train import TrainConfig
    from .config import DataConfig, Settings
    from .errors import PipelineError
    from .stages import SETTINGS, Pipeline

    settings = Settings() if file is None else Settings.read(file)
    options = {name: value for name, value in fields.items() if value not in (None, [], ())}
    train_fields = {f.name for f in dataclasses.fields(TrainConfig)}
    for config, given in ((TrainConfig, settings.train), (DataConfig, settings.data)):
        given |= {f.name: options[f.name] for f in dataclasses.fields(config) if f.name in options}
    if resume is not None and overwrite:
        raise ValueError("--resume goes on with a run and --overwrite replaces one; give one of them")
    if preset is not None:  # over the file and its preset, under the options
        settings.train.pop("preset", None)
        settings.train = {
            **settings.train,
            **fields_of(preset),
            **{k: v for k, v in options.items() if k in train_fields},
        }
    if isinstance(settings.data.get("module"), list) and len(settings.data["module"]) == 1:
        settings.data["module"] = settings.data["module"][0]
    if data is not None:
        settings.rows = data
        if file is not None and not any(f.name in options for f in dataclasses.fields(DataConfig)):
            settings.data = {}  # the option wins over the file's table
    rows, eval_rows, out = settings.rows, eval_data or settings.eval_rows, out or settings.out
    if resume is not None:
        if out is not None and Path(out) != resume:
            raise ValueError(f"--resume {resume} and --out {out} name two runs; give --resume alone")
        out = resume
        if not (resume / SETTINGS).exists():
            return _train_rows(settings.train, rows or _path_in(resume, "data"), eval_rows, out, True, False, quiet)
        if rows is not None:
            raise ValueError(f"data is {rows}, but the run in {resume} was begun from text; give --resume alone")
    if rows is not None and settings.data:
        raise ValueError(f"data: give rows ({rows}) or a text ({', '.join(settings.data)}), not both")
    if rows is None and not settings.data and resume is None:
        raise ValueError(
            "--data must be given, as an option or in the configuration file; or --model, --module and --text"
        )
    if out is None:
        raise ValueError("--out must be given, as an option or in the configuration file")
    try:
        chosen: Any = settings.train if resume else TrainConfig.from_dict(settings.train)
        wanted: Any = settings.data if resume else DataConfig.from_dict(settings.data)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{file}: {error}" if file else str(error)) from error
    if rows is not None:
        return _train_rows(chosen, rows, eval_rows, out, False, overwrite, quiet)
    from ..train import sharded

    if sharded.is_launched():
        raise ValueError(
            "torchrun: a run from a text takes one process; collect its activations first (fusae.data.collect) and "
            "give --data with their folder, or start one process"
        )
    if eval_rows is not None:
        raise ValueError("eval_data goes with rows to train on (data); a run from text measures on held-out documents")
    pipeline = Pipeline(chosen, wanted, out, resume=resume is not None, overwrite=overwrite, show=not quiet)
    if resume is not None and pipeline.finished and (Path(out) / "report.html").exists():
        raise ValueError(
            f"run_dir: the run in {out} is finished; `fusae eval {out}` and `fusae report {out}` make their files anew"
        )
    try:
        print(pipeline.run())
    except KeyboardInterrupt:
        typer.echo(f"\nstopped; what was done is kept. To go on: fusae train --resume {out}", err=True)
        raise typer.Exit(130) from None
    except PipelineError as error:
        raise PipelineError(f"{error}\nWhat was done is kept. To go on: fusae train --resume {out}") from error


def _train_rows(
    config: Any, rows: str, eval_rows: str | None, out: str | Path, resume: bool, overwrite: bool, quiet: bool
) -> None:
    """Training alone, and the reconstruction of other rows where there are any."""
    from ..train import Trainer, open_data, sharded

    if resume and eval_rows is None:
        eval_rows = _path_in(Path(out), "pipeline", "eval_data")
    held = None if eval_rows is None else open_rows("eval_data", eval_rows)
    about = {} if eval_rows is None else {"pipeline": {"eval_data": str(Path(eval_rows).resolve())}}
    source = open_data(rows)
    if held is not None and held.shape[1] != source.shape[1]:
        raise ValueError(f"eval_data must have the width of data, {source.shape[1]}, got {held.shape[1]}")
    if sharded.restarts() and sharded.is_finished(Path(out)):  # the rank that was lost had nothing more to do
        return
    kind = sharded.ShardedTrainer if sharded.is_launched() else Trainer
    try:
        trainer = kind(config, source, out, resume=resume, overwrite=overwrite, show=not quiet, about=about)
        trainer.run()
    except sharded.RankLost as error:
        raise sharded_error(error, out) from error
    trainer.close()
    if not trainer.finished:
        raise typer.Exit(130)
    if held is not None and sharded.is_first():
        _evaluate_rows(Path(out), held, not quiet)


def sharded_error(error: Exception, out: str | Path) -> Exception:
    """What the command says where another process was lost."""
    from .errors import PipelineError

    return PipelineError(f"{error}. To go on: the same command with --resume {out} (torchrun --max-restarts does so)")


def open_rows(name: str, path: str) -> Any:
    """`fusae.train.open_data`, whose errors then name the option."""
    from ..train import open_data

    try:
        return open_data(path)
    except (ValueError, TypeError, OSError) as error:
        raise type(error)(str(error).replace("data: ", f"{name}: ", 1)) from error


def _path_in(run: Path, *keys: str) -> Any:
    """Where the data of a run lie, as its config.json says; None for eval_data where there are none."""
    from ..formats.native import read_json

    path = run / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: is {run} the directory of a run?")
    about = read_json(path, "the configuration of a run")
    if keys != ("data",):
        found = about.get("pipeline")
        return found.get("eval_data") if isinstance(found, dict) else None
    data = about.get("data")
    where = data.get("path") if isinstance(data, dict) else None
    if not isinstance(where, str):
        raise ValueError(f"{path} does not say where the data lie; give --data")
    return where


def with_fields(command: Any) -> Any:
    """`command` with an option for every field of TrainConfig and DataConfig, in place of its ``**fields``."""
    from ..train.config import TrainConfig
    from .config import DataConfig

    signature = inspect.signature(command, eval_str=True)
    parameters = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    kinds = {"int": int, "float": float, "str": str, "bool": bool}
    for config, panel in ((TrainConfig, "Training"), (DataConfig, "From text to rows")):
        for field in dataclasses.fields(config):
            text = field.metadata["help"]
            # None stands for "not given", so that a file's value is not overruled by a default.
            if field.default not in (None, dataclasses.MISSING):
                shown = str(field.default).lower() if isinstance(field.default, bool) else field.default
                text += f"; default: {shown}"
            flag = "--" + field.name.replace("_", "-")
            names = [f"{flag}/--no-{flag[2:]}"] if field.type.startswith("bool") else [flag]
            option = typer.Option(*names, help=text, show_default=False, rich_help_panel=panel)
            kind: Any = list[str] if "tuple" in field.type else kinds[field.type.split(" |")[0]]
            parameters.append(
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=None,
                    annotation=Annotated[kind | None, option],
                )
            )
    command.__signature__ = signature.replace(parameters=parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    return command


# ---- fusae eval ------------------------------------------------------------------------------------------------------


def evaluate(
    run: Annotated[Path, typer.Argument(help="directory that `fusae train` wrote", metavar="RUN")],
    data: Annotated[
        str | None,
        typer.Option(help="rows to measure on (.npy, folder of activations): reconstruction alone", show_default=False),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="another text, all of which is measured on", show_default=False)
    ] = None,
    column: Annotated[str | None, typer.Option(help="column or key of that text", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help="another model file or folder", show_default=False)] = None,
    module: Annotated[
        list[str] | None, typer.Option(help="another place in the model, of the same width", show_default=False)
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="held-out rows to measure on; default: as the run", show_default=False)
    ] = None,
    loss_tokens: Annotated[
        int | None, typer.Option(help="of these, tokens for the loss; default: as the run", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="'auto' (a GPU if there is one), 'cpu', 'cuda', ...")] = "auto",
    out: Annotated[Path | None, typer.Option(help="file to write; default: RUN/eval.json", show_default=False)] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
) -> None:
    """Measure a run again, on held-out text or on rows: eval.json and a table. Also of a run that is not finished."""
    from rich.console import Console

    from . import evaluate as stage
    from .coders import load_coder
    from .config import DataConfig
    from .stages import device_of

    where = device_of(device)
    given = {"text": text, "column": column, "model": model, "module": module or None}
    given |= {"held_out_tokens": tokens, "loss_tokens": loss_tokens}
    given = {name: value for name, value in given.items() if value is not None}
    coder, step = load_coder(run, where)
    if data is None and not given:
        data = _path_in(run, "pipeline", "eval_data")
    if data is not None:
        if given:
            raise ValueError(f"data: give rows ({data}) or {', '.join(given)}, not both")
        evaluation = _evaluate_rows(run, open_rows("data", data), not quiet, out, coder)
    else:
        training, stored = _settings_of(run)
        if stored is None and not {"model", "module", "text"} <= set(given):
            raise ValueError(
                f"{run} was trained on rows; give --data with rows to measure on, or --model, --module and --text"
            )
        config = dataclasses.replace(stored or DataConfig(), **given)
        nonfinite = training.nonfinite if training else "stop"
        evaluation = stage.evaluate_run(
            coder, config, everything=text is not None, nonfinite=nonfinite, show=not quiet
        )  # fmt: skip
        stage.save_evaluation(out or run / "eval.json", evaluation)
    title = f"{run}" + (f", not finished: after step {step:,}" if step is not None else "")
    Console(highlight=False, soft_wrap=True).print(table(evaluation, title))


def _settings_of(run: Path) -> tuple[Any, Any]:
    """The two configurations of a run from text, or (None, None) of one on rows."""
    from .stages import SETTINGS, read_settings

    return read_settings(run) if (run / SETTINGS).exists() else (None, None)


def _evaluate_rows(run: Path, rows: Any, show: bool, out: Path | None = None, coder: Any = None) -> dict[str, Any]:
    from . import evaluate as stage
    from .coders import load_coder

    coder = load_coder(run)[0] if coder is None else coder
    evaluation, _ = stage.measure_rows(coder, rows, coder.b_dec.device, show)
    evaluation["no_loss"] = "it was measured on rows, without the model they come from"
    stage.save_evaluation(out or run / "eval.json", evaluation)
    return evaluation


def table(evaluation: dict[str, Any], title: str) -> Any:
    """The numbers of eval.json, for a terminal."""
    from rich.table import Table

    def number(value: float | None, form: str = ".4f") -> str:
        return "NaN" if value is None else format(value, form)

    shown = Table("on held-out rows", "measured", title=title)
    rows = [
        ("rows", f"{evaluation['tokens']:,}"),
        ("FVU", number(evaluation["fvu"])),
        ("explained variance", number(evaluation["explained_variance"])),
        ("L0", number(evaluation["l0"], ".1f")),
        ("dead latents", f"{evaluation['dead_latents']:,} of {evaluation['latents']:,}"),
        ("active on over 10 %", f"{evaluation['over_10_percent']:,}"),
        ("active on less than 1 in 100,000", f"{evaluation['below_1e_5']:,}"),
        ("cosine", number(evaluation["cosine"])),
        ("length ratio (shrinkage)", number(evaluation["l2_ratio"])),
        ("relative bias", number(evaluation["relative_bias"])),
    ]
    if loss := evaluation.get("loss"):
        names = ("original", "patched", "mean_ablated")
        rows += [
            ("loss: original, patched, mean-ablated", ", ".join(f"{loss[name]:.4f}" for name in names)),
            ("loss recovered", number(loss["loss_recovered"])),
        ]
    if kl := evaluation.get("kl"):
        rows += [
            ("KL: patched, mean-ablated", f"{kl['patched']:.4f}, {kl['mean_ablated']:.4f}"),
            ("KL recovered", number(kl["kl_recovered"])),
        ]
    if reason := evaluation.get("no_loss"):
        rows.append(("loss, KL", f"not measured: {reason}"))
    for row in rows:
        shown.add_row(*row)
    return shown
