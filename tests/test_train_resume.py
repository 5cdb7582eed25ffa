# SPDX-License-Identifier: Apache-2.0
"""A run that ends early, and the directory it leaves: nothing good is lost, nothing stale stays."""

import os
import signal

import pytest
import torch

import fusae
from fusae.formats import FormatError, native
from fusae.train import TrainConfig, Trainer, TrainingInterrupted, train
from fusae.train.metrics import MetricsLog

D, M, K, B = 12, 50, 3, 32
CHECKPOINT = "checkpoint.safetensors"


def data(n=640):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(0)) + 5


def config(**fields):
    return TrainConfig(**({"m": M, "k": K, "batch_size": B, "dead_window": 100, "log_every": 6} | fields))


def names(run):
    return sorted(str(path.relative_to(run)) for path in run.rglob("*"))


@pytest.mark.parametrize(
    "asked, fields", [("cuda", {}), ("triton", {"dtype": "float64"}), ("cpu", {"dtype": "float64"})]
)
def test_a_backend_that_cannot_run_is_an_error_before_anything_is_written(tmp_path, asked, fields):
    with fusae.backend(asked), pytest.raises(fusae.BackendError, match=f"backend '{asked}' was asked for"):
        Trainer(config(device="cpu", **fields), data(), tmp_path / "run", show=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fields", [{}, {"dtype": "bfloat16", "optimizer": "masked", "k_aux": 0, "clip_norm": 1.0}])
def test_trying_the_ops_uses_every_one_of_them(monkeypatch, fields):
    from fusae import _dispatch

    asked, select = set(), _dispatch.select
    monkeypatch.setattr(_dispatch, "select", lambda op, *rest: asked.add(op) or select(op, *rest))
    trainer = Trainer(config(**fields), data(), show=False)
    tried = set(asked)
    asked.clear()
    trainer.run()
    assert tried == asked and "adam_rows_" in asked


def test_resume_takes_the_fields_given_and_keeps_the_others(tmp_path):
    run = tmp_path / "run"
    Trainer(config(log_every=4, checkpoint_every=3, device="cpu"), data(), run, show=False).run(until=5)
    resumed = Trainer({"log_every": 2}, data(), run, resume=True, show=False)
    assert (resumed.config.log_every, resumed.config.checkpoint_every, resumed.config.device) == (2, 3, "cpu")
    assert resumed.config.k == K and resumed.step == 5
    with pytest.raises(ValueError, match="k is 4, the run to resume has 3; start a new run to change it"):
        Trainer({"k": 4}, data(), run, resume=True, show=False)
    with pytest.raises(ValueError, match="log_every must be at least 1, got 0"):
        Trainer({"log_every": 0}, data(), run, resume=True, show=False)
    with pytest.raises(ValueError, match="has no field 'logevery'; did you mean 'log_every'"):
        Trainer({"logevery": 1}, data(), run, resume=True, show=False)
    with pytest.raises(TypeError, match="config must be a fusae.train.TrainConfig, got dict"):
        Trainer({"m": 50}, data(), tmp_path / "new", show=False)
    with pytest.raises(TypeError, match="config must be a fusae.train.TrainConfig, .* got int"):
        Trainer(3, data(), run, resume=True, show=False)


def test_overwriting_removes_all_of_the_old_run(tmp_path):
    run = tmp_path / "run"
    train(config(), data(), run, show=False)
    for name in ("eval.json", "features.json", "bench.json", "report.html", "notes.txt"):
        (run / name).write_text("{}")
    Trainer(config(), data(), run, overwrite=True, show=False)
    assert names(run) == ["config.json", "metrics.jsonl", "notes.txt"]


@pytest.mark.parametrize("name", ["eval.json", "features.json", "bench.json", "report.html", "coder/coder.json"])
def test_no_result_is_overwritten_unasked(tmp_path, name):
    run = tmp_path / "run"
    (run / "coder").mkdir(parents=True)
    (run / name).write_text("{}")
    with pytest.raises(FileExistsError, match=f"holds a run .{name}."):
        Trainer(config(), data(), run, show=False)
    assert (run / name).read_text() == "{}"


def test_an_empty_coder_folder_is_no_finished_run(tmp_path):
    run = tmp_path / "run"
    (run / "coder").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=f"{CHECKPOINT} is not there; expected the checkpoint of an unfinished"):
        Trainer(None, data(), run, resume=True, show=False)


@pytest.mark.parametrize("name", ["W_dec", "mean", "sums", "W_enc.exp_avg_sq"])
def test_a_diverged_state_leaves_the_last_good_checkpoint(tmp_path, name):
    run = tmp_path / "run"
    trainer = Trainer(config(log_every=1000), data(), run, show=False)
    trainer.run(until=3)
    good = (run / CHECKPOINT).read_bytes()
    moments = trainer.optimizer.state[trainer.coder.W_enc]
    places = {"W_dec": trainer.coder.W_dec, "W_enc.exp_avg_sq": moments["exp_avg_sq"], "sums": trainer.interval.sums,
              "mean": trainer.scaling.mean}  # fmt: skip
    with torch.no_grad():
        places[name].view(-1)[-1] = torch.inf
    message = rf"{name} holds NaN or infinite values after step 3: lower lr .*{CHECKPOINT} is of an earlier step"
    with pytest.raises(FloatingPointError, match=message):
        trainer.save_checkpoint()
    assert (run / CHECKPOINT).read_bytes() == good


def test_a_diverged_coder_is_not_the_result(tmp_path):
    run = tmp_path / "run"
    trainer = Trainer(config(), data(), run, show=False)
    trainer.run(until=19)

    def spoil(row):  # as a last update may do, after its loss
        with torch.no_grad():
            trainer.coder.b_dec[0] = torch.nan

    with pytest.raises(FloatingPointError, match="b_dec holds NaN or infinite values after step 20"):
        trainer.run(on_log=spoil)
    assert not (run / "coder").exists() and (run / CHECKPOINT).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_train_does_not_pass_off_an_interrupted_run_as_a_coder(tmp_path, monkeypatch, number):
    write = MetricsLog.write

    def interrupted(self, row):
        write(self, row)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(MetricsLog, "write", interrupted)
    with pytest.raises(TrainingInterrupted, match=r"after step 6 of 20.*resume=True") as caught:
        train(config(), data(), tmp_path / "run", show=False)
    assert isinstance(caught.value, KeyboardInterrupt) and caught.value.coder.config.m == M
    with pytest.raises(TrainingInterrupted, match=r"after step 6 of 20; not saved: it had no run_dir"):
        train(config(), data(), show=False)


def test_the_advice_after_a_signal_is_true(tmp_path, capfd):
    """A second SIGTERM, which a supervisor may send, does not cost the checkpoint; Ctrl-C after it does."""
    trainer = Trainer(config(), data(), tmp_path / "run", show=False)
    numbers = iter([signal.SIGTERM, signal.SIGTERM])
    trainer.run(on_log=lambda row: [os.kill(os.getpid(), number) for number in numbers])
    assert trainer.step == 6 and (tmp_path / "run" / CHECKPOINT).exists()
    assert "stopping after this step (Ctrl-C to stop at once, without saving)" in capfd.readouterr().err
    numbers = iter([signal.SIGTERM, signal.SIGINT])
    with pytest.raises(KeyboardInterrupt):
        trainer.run(on_log=lambda row: [os.kill(os.getpid(), number) for number in numbers])


def test_resuming_before_the_first_step_keeps_the_checkpoint(tmp_path):
    run = tmp_path / "run"
    Trainer(config(), data(), run, show=False).run(until=0)
    assert (run / CHECKPOINT).exists()
    resumed = Trainer(None, data(), run, resume=True, show=False)
    assert resumed.step == 0 and (run / CHECKPOINT).exists()
    whole = train(config(), data(), show=False)
    assert torch.equal(resumed.run().W_dec, whole.W_dec)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("config", [], "field 'config' must be an object, got list"),
        ("config", {"m": 50, "k": 51}, "field 'config': k must be between 1 and m = 50, got 51"),
        ("config", {"m": 50, "kk": 51}, "field 'config': .* has no field 'kk'"),
        ("config", {"m": 50}, "field 'config': tokens must be given"),
        ("step", -1, "field 'step' must be between 0 and the run's steps = 20, got -1"),
        ("step", "3", "field 'step' must be a whole number, got str '3'"),
        ("step", 21, "field 'step' must be between 0 and the run's steps = 20, got 21"),
        ("seconds", None, "field 'seconds' must be a plain number, got NoneType"),
        ("scales", [0.0], "field 'scales' must be greater than 0"),
        ("scales", [1.0, 1.0], "field 'scales' must be 1 numbers, got"),
        ("variance", "1", "field 'variance' must be a plain number, got str '1'"),
        ("interval", {}, "field 'interval.steps' is missing"),
        ("interval", {"steps": 1, "tokens": "x", "seconds": 1.0}, "field 'interval.tokens' must be a whole number"),
        ("interval", 3, "field 'interval' must be an object, got int"),
        ("data", None, "field 'data' is no place in these data"),
    ],
    ids=str,
)
def test_a_checkpoint_with_a_bad_description_names_file_and_field(tmp_path, field, value, message):
    run = tmp_path / "run"
    Trainer(config(), data(), run, show=False).run(until=3)
    path = run / CHECKPOINT
    file, about = native.open_tensors(path, "")
    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    native.write_tensors(path, tensors, about | {field: value})
    with pytest.raises(FormatError, match=rf"{CHECKPOINT}: {message}"):
        Trainer(None, data(), run, resume=True, show=False)
