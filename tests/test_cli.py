# SPDX-License-Identifier: Apache-2.0
"""The command `fusae`."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from fusae import cli
from fusae.nn import SparseCoder
from fusae.pipeline import DataConfig, Settings, load_coder
from fusae.train import TrainConfig, Trainer

SMALL = ["--m", "40", "--k", "3", "--batch-size", "32", "--log-every", "5", "--quiet"]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.npy"
    np.save(path, torch.randn(640, 8, generator=torch.Generator().manual_seed(0)).numpy())
    return str(path)


def run(capsys, *arguments):
    """(exit status, stdout, stderr)"""
    status = 0
    try:
        cli.main(list(arguments))
    except SystemExit as stop:
        status = stop.code or 0
    out = capsys.readouterr()
    return status, out.out, out.err


def test_info(capsys):
    status, out, _ = run(capsys, "info")
    assert status == 0 and "torch" in out and "encode_topk_fwd" in out and "reference" in out


def test_help_explains_every_field(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    status, out, _ = run(capsys, "train", "--help")
    said = " ".join(out.replace("│", " ").split())
    assert status == 0
    for config in (TrainConfig, DataConfig):
        for field in dataclasses.fields(config):
            assert f"--{field.name.replace('_', '-')}" in said
            assert field.metadata["help"].split(";")[0][:40] in said, field.name
    assert "tokens per step; default: 4096" in said and "tokens of a chunk of text; default: 128" in said
    assert said.index("─ Training ") < said.index("─ From text to rows ")


def test_train_and_report(capsys, tmp_path, rows):
    out = tmp_path / "run"
    assert run(capsys, "train", "--data", rows, "--out", str(out), *SMALL)[0] == 0
    assert SparseCoder.load(out / "coder").config.m == 40
    pytest.importorskip("jinja2", reason="the report needs the extra 'report'")
    pytest.importorskip("matplotlib", reason="the report needs the extra 'report'")
    status, said, _ = run(capsys, "report", str(out))
    assert status == 0 and said.strip() == str(out / "report.html") and (out / "report.html").stat().st_size > 10_000


def test_rows_that_are_measured_on(capsys, tmp_path, rows, monkeypatch):
    """--eval-data with --data; --resume and `fusae eval` know it; `fusae eval --data` takes others."""
    monkeypatch.setenv("COLUMNS", "120")
    held, out = tmp_path / "held.npy", tmp_path / "run"
    x = torch.randn(100, 8, generator=torch.Generator().manual_seed(1))
    np.save(held, x.numpy())
    assert run(capsys, "train", "--data", rows, "--eval-data", str(held), "--out", str(out), *SMALL)[0] == 0
    evaluation = json.loads((out / "eval.json").read_text())
    coder = SparseCoder.load(out / "coder")
    with torch.no_grad():
        error = (coder(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert evaluation["tokens"] == 100 and evaluation["fvu"] == pytest.approx(float(error), rel=1e-5)
    (out / "eval.json").unlink()
    status, said, _ = run(capsys, "eval", str(out), "--quiet")
    assert status == 0 and json.loads((out / "eval.json").read_text()) == evaluation
    assert f"{evaluation['fvu']:.4f}" in said
    other = tmp_path / "other.json"
    status, said, _ = run(capsys, "eval", str(out), "--data", rows, "--out", str(other), "--quiet")
    assert status == 0 and json.loads(other.read_text())["tokens"] == 640
    assert "not measured: it was measured on rows" in said
    if pytest.importorskip("jinja2") and pytest.importorskip("matplotlib"):
        run(capsys, "report", str(out))
        assert "No language-model loss:" in (out / "report.html").read_text(encoding="utf-8")


def test_an_unfinished_run_is_measured_at_its_checkpoint(capsys, tmp_path, rows):
    out = tmp_path / "run"
    config = TrainConfig(m=40, k=3, batch_size=32, ema=0.9, centre_input=True)
    trainer = Trainer(config, rows, out, show=False)
    trainer.run(until=12)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    coder, step = load_coder(out)
    assert step == 12
    assert all(torch.equal(a, b) for a, b in zip(coder.parameters(), trainer.export().parameters(), strict=True))
    status, said, _ = run(capsys, "eval", str(out), "--data", rows, "--quiet", "--out", str(tmp_path / "eval.json"))
    assert status == 0 and "not finished: after step 12" in said.replace("\n", " ")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere"], "nowhere holds neither coder/coder.json nor checkpoint.safetensors"),
        (["RUN"], "was trained on rows; give --data with rows to measure on, or --model, --module and --text"),
        (["RUN", "--data", "nowhere.npy"], "error: data: nowhere.npy is not there"),
        (["RUN", "--data", "WIDE"], "error: rows must have width 8, as the coder was trained on, got 9"),
        (["RUN", "--data", "ROWS", "--tokens", "5"], "not both"),
        (["RUN", "--device", "abacus"], "error: device must be 'auto', 'cpu', 'cuda' or 'cuda:<number>', got 'abacus'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_eval_errors_are_one_line(capsys, tmp_path, rows, arguments, message):
    Trainer(TrainConfig(m=40, k=3, batch_size=32), rows, tmp_path / "run", show=False).run()
    np.save(tmp_path / "wide.npy", np.ones((4, 9), dtype=np.float32))
    swap = {"ROWS": rows, "RUN": str(tmp_path / "run"), "WIDE": str(tmp_path / "wide.npy")}
    status, _, said = run(capsys, "eval", *[swap.get(a, a) for a in arguments], "--quiet")
    assert status == 1 and message in said and said.count("\n") == 1
    assert not (tmp_path / "run" / "eval.json").exists()


def test_options_win_over_the_file(capsys, tmp_path, rows):
    file = tmp_path / "run.toml"
    file.write_text(
        f'data = "{rows}"\nout = "{tmp_path / "run"}"\nm = 40\nk = 5\nbatch_size = 32\nscale_input = true\n'
    )
    assert run(capsys, "train", str(file), "--k", "2", "--no-scale-input", "--quiet")[0] == 0
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert about["train"]["k"] == 2 and about["train"]["m"] == 40 and about["train"]["scale_input"] is False
    assert about["input_scales"] == [1.0]


def test_printed_configuration_is_one(capsys, tmp_path):
    status, said, _ = run(capsys, "config", "--m", "512")
    assert status == 0
    (tmp_path / "run.toml").write_text(said)
    settings = Settings.read(tmp_path / "run.toml")
    assert TrainConfig.from_dict(settings.train) == TrainConfig(m=512) and settings.out == "runs/first"
    data = DataConfig.from_dict(settings.data)
    assert data == DataConfig(model=data.model, module="model.layers.11", text="documents.jsonl")
    for config in (TrainConfig, DataConfig):
        for field in dataclasses.fields(config):
            assert f"# {field.metadata['help']}\n" in said


def test_resume_needs_only_the_run(capsys, tmp_path, rows):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run(capsys, "train", "--data", rows, "--out", str(whole), *SMALL)[0] == 0
    config = TrainConfig(m=40, k=3, batch_size=32, log_every=5)
    Trainer(config, rows, halves, show=False).run(until=7)
    assert run(capsys, "train", "--resume", str(halves), "--quiet")[0] == 0
    one, other = SparseCoder.load(whole / "coder"), SparseCoder.load(halves / "coder")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("in_file", [False, True])
def test_resume_takes_the_options_that_do_not_change_the_result(capsys, tmp_path, rows, in_file):
    out = tmp_path / "run"
    Trainer(TrainConfig(m=40, k=4, batch_size=32, log_every=5, checkpoint_every=9), rows, out, show=False).run(until=7)
    (tmp_path / "more.toml").write_text("m = 40\nlog_every = 1\n")
    more = [str(tmp_path / "more.toml")] if in_file else ["--log-every", "1"]
    status, _, said = run(capsys, "train", *more, "--resume", str(out), "--quiet")
    assert (status, said) == (0, "")
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [5, *range(8, 21)]


def test_resume_says_which_field_differs(capsys, tmp_path, rows):
    out = tmp_path / "run"
    Trainer(TrainConfig(m=40, k=4, batch_size=32), rows, out, show=False).run(until=7)
    (tmp_path / "more.toml").write_text("k = 5\n")
    status, _, said = run(capsys, "train", str(tmp_path / "more.toml"), "--resume", str(out), "--quiet")
    assert status == 1 and "k is 5, the run to resume has 4; start a new run to change it" in said


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "config.json: truncated or no JSON"),
        ("[]", "config.json: must hold an object, got list"),
        ('{"data": null}', "config.json does not say where the data lie; give --data"),
        ("{}", "config.json does not say where the data lie; give --data"),
        ('{"data": {"path": 3}}', "config.json does not say where the data lie; give --data"),
    ],
)
def test_a_damaged_config_json_is_named(capsys, tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    status, _, said = run(capsys, "train", "--resume", str(tmp_path))
    assert status == 1 and f"error: {tmp_path}/{message}" in said and said.count("\n") == 1


def test_a_backend_that_cannot_run_is_one_line_and_leaves_no_run(capsys, tmp_path, rows, monkeypatch):
    monkeypatch.setenv("FUSAE_BACKEND", "cuda")
    status, _, said = run(capsys, "train", "--data", rows, "--out", str(tmp_path / "run"), "--device", "cpu", *SMALL)
    assert status == 1 and said.startswith("error: backend 'cuda' was asked for") and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_interrupted_command_says_how_to_go_on(tmp_path, rows):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "fusae.cli", "train", "--data", rows, "--out", str(out)]
    command += ["--m", "40", "--k", "3", "--batch-size", "32", "--tokens", "100000000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 60
        while not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size):
            assert time.monotonic() < deadline and process.poll() is None, "no metrics were written"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said = " ".join(process.communicate(timeout=60)[1].split())
    finally:
        process.kill()
    assert process.returncode == 130
    assert f"To go on: fusae train --resume {out}" in said and "Traceback" not in said
    assert (out / "checkpoint.safetensors").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--m", "40"], "error: --data must be given, as an option or in the configuration file"),
        (["--m", "40", "--data", "ROWS"], "error: --out must be given"),
        (["--data", "ROWS", "--out", "OUT"], "error: a training configuration needs m"),
        (["--m", "4", "--data", "ROWS", "--out", "OUT"], "error: k must be between 1 and m = 4, got 32"),
        (["--m", "40", "--data", "nowhere.npy", "--out", "OUT"], "error: data: nowhere.npy is not there"),
        (["--resume", "OUT"], "config.json is not there: is"),
        (["nowhere.toml"], "error: nowhere.toml: no such configuration file"),
        (["--resume", "OUT", "--out", "elsewhere"], "name two runs; give --resume alone"),
        (["--m", "40", "--data", "ROWS", "--out", "OUT", "--eval-data", "no.npy"], "eval_data: no.npy is not there"),
        (["--m", "40", "--data", "ROWS", "--out", "OUT", "--ctx", "64"], "give rows (ROWS) or a text (ctx), not both"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line(capsys, tmp_path, rows, arguments, message):
    swap = {"ROWS": rows, "OUT": str(tmp_path / "run")}
    status, _, said = run(capsys, "train", *[swap.get(a, a) for a in arguments])
    assert status == 1 and message.replace("ROWS", rows) in said and said.count("\n") == 1


def test_traceback_on_request(tmp_path):
    with pytest.raises(FileNotFoundError):
        cli.main(["--traceback", "train", str(tmp_path / "nowhere.toml")])


def test_unknown_option(capsys):
    status, _, said = run(capsys, "train", "--learning-rate", "1")
    assert status == 2 and "--learning-rate" in said


def test_a_preset_on_the_command_line_and_in_a_file(capsys, tmp_path, rows):
    _, printed, _ = run(capsys, "config", "--m", "64", "--preset", "batch-topk")
    assert printed.startswith("# batch-topk: ") and 'form = "batch_topk"' in printed
    (tmp_path / "run.toml").write_text('m = 64\nk = 3\npreset = "jumprelu"\nbatch_size = 32\n')
    arguments = ["train", str(tmp_path / "run.toml"), "--data", rows, "--quiet", "--out"]
    run(capsys, *arguments, str(tmp_path / "file"))
    run(capsys, *arguments, str(tmp_path / "option"), "--preset", "batch-topk", "--form", "matryoshka")
    found = [json.loads((tmp_path / name / "config.json").read_text())["train"] for name in ("file", "option")]
    assert (found[0]["form"], found[0]["beta1"]) == ("jumprelu", 0.0)
    assert (found[1]["form"], found[1]["clip_norm"]) == ("matryoshka", 1.0)
    status, _, said = run(capsys, *arguments, str(tmp_path / "none"), "--preset", "best")
    assert status == 1 and "preset must be one of 'topk'" in said


def test_a_sweep(capsys, tmp_path, rows):
    file, out = tmp_path / "sweep.toml", tmp_path / "sweep"
    file.write_text(
        f'data = "{rows}"\nm = 40\nk = 3\nbatch_size = 32\ndata_seed = 1\nlog_every = 5\n'
        '[runs.k3]\n[runs.wide]\nm = 64\n[runs.batch]\nform = "batch_topk"\n'
    )
    status, _, said = run(capsys, "sweep", str(file), "--out", str(out))
    assert status == 0 and "wide: FVU" in said
    assert [SparseCoder.load(out / name / "coder").config.m for name in ("k3", "wide", "batch")] == [40, 64, 40]
    status, _, said = run(capsys, "sweep", str(file), "--out", str(out))
    assert status == 1 and "holds a sweep; resume it, overwrite it, or take another folder" in said
    status, _, said = run(capsys, "sweep", "--resume", str(out), "--quiet")
    assert status == 0 and not said


@pytest.mark.parametrize(
    "text, message",
    [
        ("m = 40\n", r"needs a table \[runs.NAME\] for each run of the sweep, got None"),
        ("m = 40\n[runs.a]\nk = 41\n", "run 'a': k must be between 1 and m = 40, got 41"),
        ("m = 40\n[runs.a]\nkk = 1\n", "run 'a': a training configuration has no field 'kk'"),
        ("m = 40\nout = 3\n[runs.a]\n", "out must be a path, got int 3"),
        ("m = 40\n[runs.a]\n", "--data must be given, as an option or in the configuration file"),
    ],
)
def test_sweep_files_that_will_not_do(capsys, tmp_path, text, message):
    (tmp_path / "sweep.toml").write_text(text)
    status, _, said = run(capsys, "sweep", str(tmp_path / "sweep.toml"), "--out", str(tmp_path / "out"))
    assert status == 1 and re.search(message, said)
    assert not (tmp_path / "out").exists()
