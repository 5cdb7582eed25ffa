# SPDX-License-Identifier: Apache-2.0
"""`TrainConfig`: defaults, files, and errors that name the field."""

import dataclasses
import json

import pytest

from fusae.train import TrainConfig


def test_every_field_is_explained():
    for field in dataclasses.fields(TrainConfig):
        assert field.metadata["help"], field.name
        assert f"        {field.name}: " in TrainConfig.__doc__


def test_resolve_fills_in_what_depends_on_the_data():
    config = TrainConfig(m=2**14, epochs=2, batch_size=100).resolve(d=576, tokens_per_epoch=1_000_000)
    assert (config.d, config.tokens, config.steps) == (576, 2_000_000, 20_000)
    assert config.lr == pytest.approx(2e-4)
    assert (config.warmup_steps, config.k_aux, config.dead_window) == (1000, 288, 50_000)
    assert TrainConfig(m=2**16).resolve(8, 4096).lr == pytest.approx(1e-4)
    assert TrainConfig(m=40).resolve(768, 4096).k_aux == 40
    given = TrainConfig(m=40, tokens=5000, batch_size=1000, lr=1.0, warmup_steps=0, k_aux=0, dead_window=7)
    resolved = given.resolve(8, None)
    filled = dataclasses.replace(given, d=8, sites="8", data_seed=0, centre_input=False)
    assert resolved == filled and resolved.resolve(8, None) == resolved
    assert TrainConfig(m=40, tokens=5999, batch_size=1000).resolve(8, None).tokens == 5000


def test_learning_rate_rises_stays_and_falls():
    config = TrainConfig(m=64, tokens=1000, batch_size=10, lr=2.0, warmup_steps=10, decay=0.2).resolve(8, None)
    rates = [config.lr_at(step) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == 2.0
    assert set(rates[9:80]) == {2.0}
    assert rates[80] == 2.0 and rates[90] == pytest.approx(1.0) and rates[-1] == pytest.approx(0.1)
    assert rates[80:] == sorted(rates[80:], reverse=True)
    flat = TrainConfig(m=64, tokens=1000, batch_size=10, lr=2.0, warmup_steps=0, decay=0.0).resolve(8, None)
    assert {flat.lr_at(step) for step in range(1, 101)} == {2.0}


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_files(tmp_path, suffix):
    config = TrainConfig(m=128, k=4, clip_norm=1.0, dtype="bfloat16", unit_decoder=False, select_by_norm=True)
    path = tmp_path / f"run{suffix}"
    if suffix == ".toml":
        config.write(path)
        assert "and other penalties\nk = 4\n" in path.read_text()
    else:
        path.write_text(json.dumps(config.to_dict()))
    assert TrainConfig.read(path) == config


def test_whole_numbers_in_a_file_serve_as_floats(tmp_path):
    (tmp_path / "run.toml").write_text("m = 64\nlr = 1\ndecay = 0\n")
    config = TrainConfig.read(tmp_path / "run.toml")
    assert config == TrainConfig(m=64, lr=1.0, decay=0.0) and isinstance(config.lr, float)


@pytest.mark.parametrize(
    "text, message",
    [
        ("m = 64\nk = 65\n", r"run.toml: k must be between 1 and m = 64, got 65"),
        ("m = 64\nlr = nan\n", r"run.toml: lr must be greater than 0 and finite, got nan"),
        ("m = 64\nlearning_rate = 1.0\n", r"run.toml: a training configuration has no field 'learning_rate'"),
        ("m = 64\nbatchsize = 1\n", r"did you mean 'batch_size'\?"),
        ("k = 4\n", r"run.toml: a training configuration needs m"),
        ("m = 64\nm = 3\n", r"run.toml: not valid TOML"),
        ("m = ", r"run.toml: not valid TOML"),
    ],
)
def test_errors_of_a_file_name_it(tmp_path, text, message):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        TrainConfig.read(tmp_path / "run.toml")


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such configuration file"):
        TrainConfig.read(tmp_path / "run.toml")
    with pytest.raises(ValueError, match="must end in .toml or .json"):
        TrainConfig.read(tmp_path / "run.yaml")
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold a table of fields, got list"):
        TrainConfig.read(tmp_path / "run.json")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"m": 0}, "m must be between 1 and"),
        ({"m": 64.0}, "m must be a whole number, got float 64.0"),
        ({"k": 0}, "k must be between 1 and m = 64, got 0"),
        ({"k_aux": 65}, "k_aux must be between 0 and m = 64, got 65"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"tokens": -1}, "tokens must be at least 1, got -1"),
        ({"dead_window": 0}, "dead_window must be at least 1"),
        ({"lr": float("inf")}, "lr must be greater than 0 and finite, got inf"),
        ({"lr": 0.0}, "lr must be greater than 0"),
        ({"lr": "fast"}, "lr must be a plain number, got str 'fast'"),
        ({"clip_norm": -1.0}, "clip_norm must be greater than 0"),
        ({"aux_coefficient": float("nan")}, "aux_coefficient must be at least 0 and finite, got nan"),
        ({"beta1": 1.0}, "beta1 must be at least 0 and less than 1, got 1.0"),
        ({"decay": 1.5}, "decay must be between 0 and 1, a share of the steps, got 1.5"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"optimizer": "sgd"}, "optimizer must be one of 'dense', 'lazy', 'masked', got 'sgd'"),
        ({"dtype": "float16"}, "dtype must be one of 'float32', 'float64', 'bfloat16', got 'float16'"),
        ({"b_dec_init": "median"}, "b_dec_init must be one of"),
        ({"unit_decoder": "yes"}, "unit_decoder must be true or false, got str 'yes'"),
        ({"device": 0}, "device must be a string"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises((ValueError, TypeError), match=message):
        TrainConfig(**({"m": 64} | fields))


def test_bad_fit_to_the_data():
    with pytest.raises(ValueError, match="d must be the width of the data, 576, got 512"):
        TrainConfig(m=64, d=512).resolve(576, 10**6)
    with pytest.raises(ValueError, match="tokens must be at least batch_size = 4096, got 100"):
        TrainConfig(m=64, tokens=100).resolve(576, None)
    with pytest.raises(ValueError, match="tokens must be given: the data cannot tell"):
        TrainConfig(m=64).resolve(576, None)
    with pytest.raises(ValueError, match="steps are known once resolve"):
        _ = TrainConfig(m=64).steps
