# SPDX-License-Identifier: Apache-2.0
"""Several dictionaries on one stream: each is bit for bit the one that it would have become alone."""

import dataclasses
import json

import pytest
import torch

from fusae.formats import FormatError, native
from fusae.nn import SparseCoder
from fusae.train import Rows, Sweep, TrainConfig, Trainer

D, M, B = 12, 50, 32
CHECKPOINT = "checkpoint.safetensors"


def data(n=640, seed=0):
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(M, D, generator=generator)
    chosen = torch.rand(n, M, generator=generator).topk(3, 1).indices
    return directions[chosen].sum(1) + 5


def configs(**fields):
    shared = {"batch_size": B, "epochs": 2, "dead_window": 60, "log_every": 5, "data_seed": 3, "checkpoint_every": 4}
    shared |= fields
    return {
        "small": TrainConfig(m=20, k=2, **shared),
        "wide": TrainConfig(m=60, k=3, lr=3e-3, seed=7, ema=0.9, **shared),
        "batch": TrainConfig(m=40, k=3, form="batch_topk", centre_input=True, **shared),
    }


def same(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


class Counted(Rows):
    """Rows that count how often a batch of them is read."""

    reads = 0

    def take(self, index):
        Counted.reads += 1
        return super().take(index)


def test_every_dictionary_is_the_one_it_would_be_alone(tmp_path):
    x = data()
    Counted.reads = 0
    coders = Sweep(configs(), Counted(x), tmp_path / "sweep", show=False).run()
    assert Counted.reads <= 40 + 3, "a batch is read once for all"
    for name, config in configs().items():
        alone = Trainer(config, x, tmp_path / "alone" / name, show=False)
        assert same(alone.run(), coders[name])
        assert same(SparseCoder.load(tmp_path / "sweep" / name / "coder"), coders[name])
        ours, theirs = (
            [json.loads(line) for line in (tmp_path / folder / name / "metrics.jsonl").read_text().splitlines()]
            for folder in ("sweep", "alone")
        )
        for row in ours + theirs:
            for varies in ("seconds", "tokens_per_s", "wait"):
                row.pop(varies)
        assert ours == theirs
        left = sorted(p.name for p in (tmp_path / "sweep" / name).iterdir())
        assert left == ["coder", "config.json", "metrics.jsonl"]


def test_a_sweep_goes_on_where_it_was_stopped(tmp_path):
    x = data()
    whole = Sweep(configs(), x, show=False).run()
    part = Sweep(configs(), x, tmp_path, show=False)
    part.run(until=17)
    assert all((tmp_path / name / CHECKPOINT).exists() for name in configs())
    again = Sweep(None, x, tmp_path, resume=True, show=False)
    assert again.step == 17
    assert all(same(coder, whole[name]) for name, coder in again.run().items())


def test_runs_that_were_saved_at_different_steps_meet_again(tmp_path):
    """As after a kill between two saves: one ran on alone, one has no checkpoint at all, one is as it was."""
    x = data()
    whole = Sweep(configs(), x, show=False).run()
    Sweep(configs(), x, tmp_path, show=False).run(until=10)
    Trainer(None, x, tmp_path / "small", resume=True, show=False).run(until=23)
    (tmp_path / "batch" / CHECKPOINT).unlink()
    again = Sweep(None, x, tmp_path, resume=True, show=False)
    assert {name: t.step for name, t in again.trainers.items()} == {"small": 23, "wide": 10, "batch": 0}
    before = (tmp_path / "small" / CHECKPOINT).read_bytes()
    again.run(until=12)
    assert (tmp_path / "small" / CHECKPOINT).read_bytes() == before, "one that is ahead stays as it was saved"
    again = Sweep(None, x, tmp_path, resume=True, show=False)
    assert {name: t.step for name, t in again.trainers.items()} == {"small": 23, "wide": 12, "batch": 12}
    assert all(same(coder, whole[name]) for name, coder in again.run().items())
    assert Sweep(None, x, tmp_path, resume=True, show=False).finished == list(configs())


def test_a_run_that_is_finished_is_left_alone(tmp_path):
    x = data()
    Sweep(configs(), x, tmp_path, show=False).run(until=10)
    Trainer(None, x, tmp_path / "wide", resume=True, show=False).run()
    before = (tmp_path / "wide" / "coder" / "coder.safetensors").read_bytes()
    again = Sweep(None, x, tmp_path, resume=True, show=False)
    assert again.finished == ["wide"] and set(again.run()) == {"small", "batch"}
    assert (tmp_path / "wide" / "coder" / "coder.safetensors").read_bytes() == before


def test_one_that_diverges_does_not_end_the_others(tmp_path):
    sweep = Sweep(configs(), data(), tmp_path, show=False)
    with torch.no_grad():
        sweep.trainers["wide"].coder.W_dec.fill_(torch.nan)
    coders = sweep.run()
    assert set(coders) == {"small", "batch"} and "holds NaN or infinite values" in str(sweep.failed["wide"])
    assert not (tmp_path / "wide" / "coder").exists() and (tmp_path / "small" / "coder").exists()
    again = Sweep(None, data(), tmp_path, resume=True, show=False)
    assert again.finished == ["small", "batch"] and not again.trainers and again.run() == {}
    alone = Sweep({"only": configs()["small"]}, data(), show=False)
    with torch.no_grad():
        alone.trainers["only"].coder.W_dec.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="every run of the sweep diverged: only: "):
        alone.run()


def test_one_that_cannot_be_saved_does_not_cost_the_others(tmp_path, monkeypatch):
    end = Trainer.end

    def fail(self, display):
        if self.run_dir.name == "small":
            raise OSError(28, "no room")
        if self.run_dir.name == "wide":
            raise FloatingPointError("W_enc holds NaN")
        end(self, display)

    monkeypatch.setattr(Trainer, "end", fail)
    sweep = Sweep(configs(), data(), tmp_path, show=False)
    with pytest.raises(OSError, match="no room"):
        sweep.run()
    assert set(sweep.failed) == {"wide"} and (tmp_path / "batch" / "coder" / "coder.json").exists()


def test_bad_rows_leave_what_was_learned(tmp_path):
    x = data()
    sweep = Sweep(configs(checkpoint_every=0), x, tmp_path, show=False)
    sweep.run(until=10)
    for name in configs():
        (tmp_path / name / CHECKPOINT).unlink()
    x[:] = torch.nan
    sweep.feed.close()
    with pytest.raises(ValueError, match="rows hold NaN or infinite values"):
        sweep.run()
    assert all(native.open_tensors(tmp_path / name / CHECKPOINT, "")[1]["step"] >= 10 for name in configs())


def test_a_bad_last_configuration_leaves_nothing_behind(tmp_path):
    chosen = configs() | {"bad": dataclasses.replace(configs()["small"], d=13)}
    with pytest.raises(ValueError, match="configs: run 'bad': d must be the width of the data, 12, got 13"):
        Sweep(chosen, data(), tmp_path / "sweep", show=False)
    assert not (tmp_path / "sweep").exists()


def test_rows_are_told_apart_by_the_name_of_their_run(capfd):
    Sweep(configs(), data()).run()
    said = capfd.readouterr().err
    assert all(f"{name}: FVU" in said for name in configs())


@pytest.mark.parametrize(
    "make, error, message",
    [
        (dict, ValueError, "configs must be one or more fusae.train.TrainConfig by name, got none"),
        (lambda: {"a": 3}, TypeError, "configs: 'a' must be a fusae.train.TrainConfig, got int"),
        (lambda: {"a/b": configs()["small"]}, ValueError, "a name must be the name of a folder, got 'a/b'"),
        (lambda: {".a": configs()["small"]}, ValueError, "a name must be the name of a folder, got '.a'"),
        (
            lambda: configs() | {"other": TrainConfig(m=9, k=2, batch_size=16, epochs=2, data_seed=3)},
            ValueError,
            "batch_size must be the same for all, as they share the batches; 'small' has 32, 'other' has 16",
        ),
        (
            lambda: {"a": TrainConfig(m=9, k=2, seed=1), "b": TrainConfig(m=9, k=2, seed=2)},
            ValueError,
            "data_seed must be the same for all, .* 'a' has 1, 'b' has 2",
        ),
    ],
)
def test_bad_configurations(tmp_path, make, error, message):
    with pytest.raises(error, match=message):
        Sweep(make(), data(), tmp_path / "sweep", show=False)
    assert not (tmp_path / "sweep").exists()


def test_bad_folders(tmp_path):
    Sweep(configs(), data(), tmp_path, show=False).run(until=4)
    with pytest.raises(FileExistsError, match="holds a sweep; resume it, overwrite it, or take another folder"):
        Sweep(configs(), data(), tmp_path, show=False)
    with pytest.raises(ValueError, match="configs must be None to resume"):
        Sweep(configs(), data(), tmp_path, resume=True, show=False)
    with pytest.raises(ValueError, match="state: fingerprint|state: sha256"):
        Sweep(None, data(seed=1), tmp_path, resume=True, show=False)
    assert Sweep(configs(), data(), tmp_path, overwrite=True, show=False).step == 0
    (tmp_path / "sweep.json").write_text('{"runs": {"small": {"m": 3, "k": 4}}, "failed": {}}')
    with pytest.raises(FormatError, match="sweep.json: .*k must be between 1 and m = 3, got 4"):
        Sweep(None, data(), tmp_path, resume=True, show=False)
    with pytest.raises(FileNotFoundError, match="expected the settings of a sweep"):
        Sweep(None, data(), tmp_path / "none", resume=True, show=False)
