# SPDX-License-Identifier: Apache-2.0
"""`DataConfig` and run files: defaults, round trips, and what is wrong with a hostile one."""

import dataclasses
import json

import pytest

from fusae import cli
from fusae.pipeline import DataConfig, Settings, example
from fusae.train import TrainConfig

PATHS = {"model": "lm", "module": "model.layers.1", "text": "text.jsonl"}


def test_no_field_has_two_meanings():
    names = [[field.name for field in dataclasses.fields(config)] for config in (TrainConfig, DataConfig)]
    assert not set(names[0]) & set(names[1])
    assert not (set(names[0]) | set(names[1])) & {"data", "eval_data", "out", "resume", "overwrite", "quiet", "file"}


@pytest.mark.parametrize("module", ["model.layers.1", ["model.layers.0", "model.layers.1.mlp:in"]])
def test_round_trips(tmp_path, module):
    data = DataConfig(**PATHS | {"module": module}, held_out=0.5, store="stream", tails=False)
    assert DataConfig.from_dict(json.loads(json.dumps(data.to_dict()))) == data
    (tmp_path / "run.toml").write_text("m = 8\n" + data.to_toml())
    settings = Settings.read(tmp_path / "run.toml")
    assert DataConfig.from_dict(settings.data) == data and settings.train == {"m": 8}
    assert data.sites == ((module,) if isinstance(module, str) else tuple(module))


def test_whole_numbers_are_floats_where_wanted():
    assert DataConfig.from_dict({"outlier_factor": 10, "held_out": 0.5}).outlier_factor == 10.0
    assert isinstance(DataConfig.from_dict({"outlier_factor": 10}).outlier_factor, float)
    assert DataConfig(outlier_factor=0).outlier_factor == 0


def test_paths_hold_in_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = DataConfig(**PATHS, cache="rows").absolute()
    assert (data.model, data.text, data.cache) == tuple(str(tmp_path / n) for n in ("lm", "text.jsonl", "rows"))
    assert data.module == "model.layers.1" and DataConfig().absolute() == DataConfig()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"modul": "x"}, "the table [data] has no field 'modul'; did you mean 'module'?"),
        ({"model": 3}, "model must be a string, got int 3"),
        ({"model": " "}, "model must not be empty"),
        ({"model_dtype": "int8"}, "model_dtype must be one of 'float32', 'bfloat16', 'float16', got 'int8'"),
        ({"module": []}, "module must name one or several different sites, got []"),
        ({"module": ["a", "a"]}, "module must name one or several different sites, got ['a', 'a']"),
        ({"module": ["a", 3]}, "module must be a string, got int 3"),
        ({"module": 3}, "module must be a string or a list of strings, got int"),
        ({"separator": None}, "separator must be a string, got NoneType None"),
        ({"document_order": "random"}, "document_order must be one of 'shuffled', 'file', got 'random'"),
        ({"held_out": 0}, "held_out must be greater than 0 and less than 1, got 0.0"),
        ({"held_out": 1.0}, "held_out must be greater than 0 and less than 1, got 1.0"),
        ({"held_out": "5 %"}, "held_out must be a plain number, got str '5 %'"),
        ({"ctx": 1}, "ctx must be between 2 and 1048576, got 1"),
        ({"ctx": 1.5}, "ctx must be a whole number, got float 1.5"),
        ({"ctx": 16, "skip_positions": 16}, "skip_positions must be between 0 and ctx - 1 = 15, got 16"),
        ({"tails": 1}, "tails must be true or false, got int 1"),
        ({"outlier_factor": 1.0}, "outlier_factor must be greater than 1 and finite, got 1.0"),
        ({"outlier_factor": float("inf")}, "outlier_factor must be greater than 1 and finite, got inf"),
        ({"outlier_factor": True}, "outlier_factor must be a plain number, got bool True"),
        ({"train_tokens": 0}, "train_tokens must be at least 1, got 0"),
        ({"held_out_tokens": 9, "loss_tokens": 10}, "loss_tokens must be between 1 and held_out_tokens = 9, got 10"),
        ({"store": "float8"}, "store must be one of 'float16', 'bfloat16', 'float32', 'int8', 'stream', got 'float8'"),
        ({"chunk_batch": -1}, "chunk_batch must be at least 1, got -1"),
        ({"features": "all"}, "features must be a whole number, got str 'all'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_hostile_values(values, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        DataConfig.from_dict(values)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("data = 3", "data must be a path or a table, got int 3"),
        ("out = []\n", "out must be a path, got list []"),
        ("eval_data = true", "eval_data must be a path, got bool True"),
        ("[data]\nmodell = 'x'", "the table [data] has no field 'modell'; did you mean 'model'?"),
        ("ctx = 64\n[data]\nmodel = 'x'", "ctx belong into the table [data]"),
        ("mm = 8", "a training configuration has no field 'mm'"),
        ("[data]\n[[data]]", "not valid TOML"),
        ("m = 64\nout = 'OUT'\n[data]\nmodel = 'x'", "error: module and text must be given, as an option or in the"),
        ("m = 64\nout = 'OUT'\n[data]\nmodel = 'x'\nmodule = 'y'\ntext = 'z'", "error: model: no file or folder at /"),
        ("m = 64\nout = 'OUT'\n[data]\nctx = 0", "run.toml: ctx must be between 2"),
        ("m = 64\n[data]\nmodel = 'x'", "error: --out must be given"),
        ("out = 'OUT'\n[data]\nmodel = 'x'", "a training configuration needs m"),
        ("m = 64\nout = 'OUT'", "--data must be given, as an option or in the configuration file; or --model"),
        (
            "m = 64\nout = 'OUT'\neval_data = 'e.npy'\n[data]\nmodel = 'HERE'\nmodule = 'y'\ntext = 'HERE'",
            "eval_data goes with rows to train on",
        ),
    ],
)
def test_hostile_files(tmp_path, capsys, text, message):
    (tmp_path / "run.toml").write_text(
        text.replace("OUT", str(tmp_path / "out")).replace("HERE", str(tmp_path))
    )  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", str(tmp_path / "run.toml"), "--quiet"])
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and message in " ".join(said.split()) and not (tmp_path / "out").exists()


def test_the_example_is_a_whole_file(tmp_path):
    (tmp_path / "run.toml").write_text(example(64))
    settings = Settings.read(tmp_path / "run.toml")
    assert set(settings.data) >= {"model", "module", "text", "ctx", "store"} and settings.rows is None
