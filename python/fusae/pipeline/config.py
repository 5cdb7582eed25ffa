# SPDX-License-Identifier: Apache-2.0
"""`DataConfig`: every choice between a text and the rows to train on, with its unit and default, and run files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from .. import _fields
from ..train import TrainConfig
from ..train.config import read_settings
from ..train.presets import PRESETS


def _field(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The choices of a run from text: model, module, text, which rows, what is measured and shown.

    Checked on construction. No field has the name of one of `fusae.train.TrainConfig`.
    """

    model: str | None = _field(None, "language model: a .gguf file, or a Hugging Face folder")
    model_dtype: str = _field("float32", "in which the model runs: 'float32', 'bfloat16' or 'float16'")
    module: str | tuple[str, ...] | None = _field(
        None,
        "where in the model: 'model.layers.11' is that module's output, 'model.layers.11.mlp:in' its input; rows of "
        "several are put side by side",
    )
    text: str | None = _field(
        None, "documents: .txt, .csv, .jsonl, .parquet, .arrow, a .zip or folder of such, or a Hugging Face data set"
    )
    column: str = _field("text", "column or key that holds the text")
    split: str | None = _field(None, "split of a data set; default: the only one")
    held_out: float = _field(0.05, "share of the documents that are measured on and not trained on")
    document_order: str = _field(
        "shuffled", "'shuffled': by hash, all in memory; 'file': as they come, for text larger than memory"
    )
    ctx: int = _field(128, "tokens of a chunk of text")
    tails: bool = _field(True, "keep what is left at a document's end as a shorter chunk")
    separator: str = _field("auto", "token before each chunk; 'auto': what the tokenizer says; '': none")
    skip_positions: int = _field(2, "positions left out at the start of each chunk")
    drop_special: bool = _field(True, "leave out the rows of BOS, EOS and separators")
    outlier_factor: float = _field(
        10.0, "leave out rows whose norm is above so many times the median (attention sinks); 0: none"
    )
    train_tokens: int | None = _field(None, "rows to collect for training; default: all the text has")
    held_out_tokens: int | None = _field(None, "held-out rows to measure on; default: all, at most 100,000")
    loss_tokens: int | None = _field(
        None, "of these, tokens to run the model on for the loss, three passes; default: all, at most 20,000"
    )
    store: str = _field(
        "float16", "rows on disk: 'float16', 'bfloat16', 'float32', 'int8'; 'stream': no disk, straight from the model"
    )
    buffer_rows: int = _field(65536, "rows that a stream shuffles at a time")
    chunk_batch: int = _field(16, "chunks of text in one forward pass of the model")
    cache: str | None = _field(None, "folder for rows on disk; default: activations in the cache folder of fusae")
    features: int = _field(200, "latents to show in the report; 0: none")
    passages: int = _field(8, "passages to show for each")
    passage_tokens: int = _field(1_000_000, "training rows, at most, in which passages are looked for")

    def __post_init__(self) -> None:
        if isinstance(self.module, list):
            object.__setattr__(self, "module", tuple(self.module))
        for name in ("model", "text", "split", "cache"):
            if getattr(self, name) is not None:
                _text(name, getattr(self, name))
        _text("column", self.column)
        if not isinstance(self.separator, str):
            raise TypeError(f"separator must be a string, got {type(self.separator).__name__} {self.separator!r}")
        if self.module is not None:
            for name in self.sites:
                _text("module", name)
            if not self.sites or len(set(self.sites)) != len(self.sites):
                raise ValueError(f"module must name one or several different sites, got {list(self.sites)}")
        _fields.choice("model_dtype", self.model_dtype, ("float32", "bfloat16", "float16"))
        _fields.choice("document_order", self.document_order, ("shuffled", "file"))
        _fields.choice("store", self.store, ("float16", "bfloat16", "float32", "int8", "stream"))
        _fields.number("held_out", self.held_out, 0.0, 1.0, above=True)
        _fields.whole("ctx", self.ctx, 2, 2**20)
        _fields.whole("skip_positions", self.skip_positions, 0, self.ctx - 1, "ctx - 1")
        for name in ("tails", "drop_special"):
            _fields.flag(name, getattr(self, name))
        if self.outlier_factor != 0 or isinstance(self.outlier_factor, bool):
            _fields.number("outlier_factor", self.outlier_factor, 1.0, above=True)
        for name in ("train_tokens", "held_out_tokens", "loss_tokens"):
            if getattr(self, name) is not None:
                _fields.whole(name, getattr(self, name), 1)
        if self.held_out_tokens is not None and self.loss_tokens is not None:
            _fields.whole("loss_tokens", self.loss_tokens, 1, self.held_out_tokens, "held_out_tokens")
        for name in ("buffer_rows", "chunk_batch", "passages", "passage_tokens"):
            _fields.whole(name, getattr(self, name), 1)
        _fields.whole("features", self.features)

    @property
    def sites(self) -> tuple[str, ...]:
        """The modules, as a tuple."""
        if self.module is None:
            return ()
        if not isinstance(self.module, (str, tuple)):
            raise TypeError(f"module must be a string or a list of strings, got {type(self.module).__name__}")
        return (self.module,) if isinstance(self.module, str) else self.module

    def absolute(self) -> DataConfig:
        """The same with its paths absolute, so that they hold in any working directory."""
        names = [name for name in ("model", "text", "cache") if getattr(self, name) is not None]
        return dataclasses.replace(self, **{name: str(Path(getattr(self, name)).resolve()) for name in names})

    def require_text(self) -> DataConfig:
        """Itself, if it names model, module and text, and the two paths are there.

        Raises `ValueError` naming what is not given, `FileNotFoundError`.
        """
        missing = [name for name in ("model", "module", "text") if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"{' and '.join(missing)} must be given, as an option or in the table [data], for a run from text; or "
                "give data, the path of rows"
            )
        for name in ("model", "text"):
            if not Path(getattr(self, name)).exists():
                raise FileNotFoundError(
                    f"{name}: no file or folder at {getattr(self, name)} (nothing is downloaded; `fusae demo` is the "
                    "exception)"
                )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain values; what `from_dict` takes."""
        values = dataclasses.asdict(self)
        return values | {"module": list(self.module) if isinstance(self.module, tuple) else self.module}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataConfig:
        """From plain values; an unknown field is an error."""
        _fields.known("the table [data]", values, [f.name for f in dataclasses.fields(cls)])
        floats = ("held_out", "outlier_factor")
        return cls(**{name: float(v) if name in floats and type(v) is int else v for name, v in values.items()})

    def to_toml(self) -> str:
        """The table ``[data]`` with every field explained; one without a value is commented out."""
        lines = ["[data]"]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            lines.append(f"# {field.metadata['help']}")
            lines.append(f"# {field.name} =" if value is None else f"{field.name} = {json.dumps(value)}")
        return "\n".join(lines) + "\n"


DataConfig.__doc__ += "\n\n    Attributes:\n" + "\n".join(
    f"        {f.name}: {f.metadata['help']}." + ("" if f.default is None else f" Default: {f.default!r}.")
    for f in dataclasses.fields(DataConfig)
)


def _text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {type(value).__name__} {value!r}")
    if not value.strip():
        raise ValueError(f"{name} must not be empty")


@dataclasses.dataclass
class Settings:
    """What a file of `fusae train` holds, or its options: only what was given.

    Attributes:
        train, data: fields of `TrainConfig` and `DataConfig`.
        rows, eval_rows: paths of rows to train and to measure on, in place of model and text.
        out: directory of the run.
    """

    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: str | None = None
    eval_rows: str | None = None
    out: str | None = None

    @classmethod
    def read(cls, path: str | Path) -> Settings:
        """From a ``.toml`` or ``.json`` file: `data` (a path, or a table), `eval_data`, `out`, and fields of
        `TrainConfig`. Errors name the file and the field."""
        values = read_settings(path)
        given = cls()
        data = values.pop("data", None)
        if isinstance(data, dict):
            given.data = data
        elif data is not None:
            given.rows = data
        given.eval_rows, given.out = values.pop("eval_data", None), values.pop("out", None)
        for name, value in (("data", given.rows), ("eval_data", given.eval_rows), ("out", given.out)):
            if value is not None and not isinstance(value, str):
                what = " or a table" if name == "data" else ""
                raise TypeError(f"{path}: {name} must be a path{what}, got {type(value).__name__} {value!r}")
        given.train = values
        try:
            _fields.known("the table [data]", given.data, [f.name for f in dataclasses.fields(DataConfig)])
            fields = ["preset", *(f.name for f in dataclasses.fields(TrainConfig))]
            misplaced = [name for name in values if name in {f.name for f in dataclasses.fields(DataConfig)}]
            if misplaced:
                raise ValueError(f"{', '.join(misplaced)} belong into the table [data]")
            _fields.known("a training configuration", values, fields)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return given


def example(m: int = 16384, preset: str | None = None) -> str:
    """A whole configuration file for `fusae train`, every field explained; with the values of a `preset`."""
    head = (
        '# Rows of your own, in place of the table [data]: data = "activations.npy", eval_data = "held-out.npy"\n'
        'out = "runs/first"\n\n'
    )
    data = DataConfig(model="SmolLM2-135M-Instruct.Q4_1.gguf", module="model.layers.11", text="documents.jsonl")
    train = TrainConfig.from_dict({"m": m, "preset": preset})
    if preset is not None:
        head = f"# {preset}: {PRESETS[preset].what} ({PRESETS[preset].source})\n" + head
    return head + train.to_toml() + "\n" + data.to_toml()
