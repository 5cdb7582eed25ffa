# SPDX-License-Identifier: Apache-2.0
"""The command `fusae`."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from fusae import cli
from fusae.nn import SparseCoder
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
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in said
        assert field.metadata["help"].split(";")[0][:40] in said, field.name
    assert "tokens per step; default: 4096" in said


def test_train_and_report(capsys, tmp_path, rows):
    out = tmp_path / "run"
    assert run(capsys, "train", "--data", rows, "--out", str(out), *SMALL)[0] == 0
    assert SparseCoder.load(out / "coder").config.m == 40
    pytest.importorskip("jinja2", reason="the report needs the extra 'report'")
    pytest.importorskip("matplotlib", reason="the report needs the extra 'report'")
    status, said, _ = run(capsys, "report", str(out))
    assert status == 0 and said.strip() == str(out / "report.html") and (out / "report.html").stat().st_size > 10_000


def test_options_win_over_the_file(capsys, tmp_path, rows):
    file = tmp_path / "run.toml"
    file.write_text(
        f'data = "{rows}"\nout = "{tmp_path / "run"}"\nm = 40\nk = 5\nbatch_size = 32\nscale_input = true\n'
    )
    assert run(capsys, "train", str(file), "--k", "2", "--no-scale-input", "--quiet")[0] == 0
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert about["train"]["k"] == 2 and about["train"]["m"] == 40 and about["train"]["scale_input"] is False
    assert about["input_scale"] == 1.0


def test_printed_configuration_is_one(capsys, tmp_path):
    status, said, _ = run(capsys, "config", "--m", "512")
    assert status == 0
    (tmp_path / "run.toml").write_text(said)
    assert TrainConfig.read(tmp_path / "run.toml") == TrainConfig(m=512)


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
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line(capsys, tmp_path, rows, arguments, message):
    swap = {"ROWS": rows, "OUT": str(tmp_path / "run")}
    status, _, said = run(capsys, "train", *[swap.get(a, a) for a in arguments])
    assert status == 1 and message in said and said.count("\n") == 1


def test_traceback_on_request(tmp_path):
    with pytest.raises(FileNotFoundError):
        cli.main(["--traceback", "train", str(tmp_path / "nowhere.toml")])


def test_unknown_option(capsys):
    status, _, said = run(capsys, "train", "--learning-rate", "1")
    assert status == 2 and "--learning-rate" in said
