# SPDX-License-Identifier: Apache-2.0
"""Annealed k, averaged weights, centred inputs, rows that are not finite, TensorBoard."""

import json
import sys

import pytest
import torch

from fusae.nn import SparseCoder
from fusae.train import TrainConfig, Trainer, train

D, M, K, B = 12, 50, 3, 32


def data(n=640, seed=0, offset=5.0):
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(M, D, generator=generator)
    chosen = torch.rand(n, M, generator=generator).topk(K, 1).indices
    return directions[chosen].sum(1) + offset


def config(**fields):
    return TrainConfig(**({"m": M, "k": K, "batch_size": B, "dead_window": 100, "log_every": 1} | fields))


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_k_falls_from_its_start(tmp_path):
    trainer = Trainer(config(k_start=11, k_anneal_steps=8), data(), tmp_path / "run", show=False)
    coder = trainer.run()
    rows = metrics(tmp_path / "run")
    ks = [row["k"] for row in rows]
    assert ks == [11, 10, 9, 8, 7, 6, 5, 4] + [3] * 12
    assert all(row["l0"] <= row["k"] for row in rows) and rows[0]["l0"] > K
    assert coder.config.k == SparseCoder.load(tmp_path / "run" / "coder").config.k == K
    assert TrainConfig(m=M, k=K, k_start=20, tokens=3200, batch_size=B).resolve(D, None).k_anneal_steps == 10


def test_a_run_stopped_while_k_falls_goes_on_with_the_same_bits(tmp_path):
    chosen = config(k_start=11, k_anneal_steps=15, ema=0.9, centre_input=True)
    whole = train(chosen, data(), show=False)
    part = Trainer(chosen, data(), tmp_path / "run", show=False)
    assert part.run(until=7).config.k == chosen.resolve(D, 640).k_at(7) == 8
    again = Trainer(None, data(), tmp_path / "run", resume=True, show=False)
    assert again.average.steps == 7 and torch.equal(again.scaling.centre, part.scaling.centre)
    ours, theirs = again.run().state_dict(), whole.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_averaged_weights_are_the_bias_corrected_mean_of_all_steps():
    trainer = Trainer(config(ema=0.8, unit_decoder=False, scale_input=False), data(), show=False)
    sums = {name: torch.zeros_like(p) for name, p in trainer.coder.named_parameters()}
    steps = 6
    for _ in range(steps):
        trainer.train_step(trainer.feed.next())
        for name, p in trainer.coder.named_parameters():
            sums[name] = 0.8 * sums[name] + 0.2 * p.detach()
    trainer.feed.close()
    exported = trainer.export()
    for name, p in exported.named_parameters():
        torch.testing.assert_close(p, sums[name] / (1 - 0.8**steps), rtol=1e-5, atol=1e-6)
        assert not torch.equal(p, getattr(trainer.coder, name))
    assert trainer.coder.W_dec.data_ptr() != exported.W_dec.data_ptr()


@pytest.mark.parametrize(
    "fields",
    [{}, {"select_by_norm": True, "unit_decoder": False}, {"select_by_norm": True}, {"form": "matryoshka"}],
    ids=["by value", "by norm", "by norm of 1", "matryoshka"],
)
def test_averaged_weights_of_a_batch_top_k_have_a_threshold_of_their_own(fields):
    """The running mean, over every 16th step, of the smallest score that the averaged weights select of its batch."""
    decay, steps = 0.9, 50
    chosen = {"form": "batch_topk", "lr": 0.05, "scale_input": False, "warmup_steps": 0, **fields}
    trainer = Trainer(config(ema=0.95, threshold_decay=decay, tokens=steps * B, **chosen), data(), show=False)
    sums = {name: torch.zeros_like(p) for name, p in trainer.coder.named_parameters()}
    wanted = None
    for step in range(steps):
        x = trainer.feed.next()
        trainer.train_step(x)
        for name, p in trainer.coder.named_parameters():
            sums[name] = 0.95 * sums[name] + 0.05 * p.detach()
        if step % 16 == 0:
            w = {name: value / (1 - 0.95 ** (step + 1)) for name, value in sums.items()}
            score = (x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]
            if chosen.get("select_by_norm") and not chosen.get("unit_decoder", True):
                score = score * w["W_dec"].norm(dim=1)
            score = score.flatten().topk(B * K).values
            smallest, share = score[score > 0].min(), min(decay, step / (step + 10)) ** 16
            wanted = smallest if wanted is None else share * wanted + (1 - share) * smallest
    trainer.feed.close()
    coder = trainer.export()
    torch.testing.assert_close(coder.threshold, wanted.double(), rtol=1e-4, atol=0)
    assert abs(float(trainer.coder.threshold / coder.threshold) - 1) > 0.02, "the last weights have another one"


def test_averaged_decoder_rows_are_of_unit_norm():
    coder = train(config(ema=0.9, epochs=3), data(), show=False)
    assert (coder.W_dec.norm(dim=1) - 1).abs().max() < 1e-5


def test_one_step_of_any_average_is_that_step():
    trainer = Trainer(config(ema=0.999), data(), show=False)
    trainer.run(until=1)
    torch.testing.assert_close(trainer.export().W_enc, trainer.coder.W_enc, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fields", [{}, {"scale_input": False}, {"ema": 0.9}, {"b_dec_init": "zero"}], ids=str)
def test_a_coder_of_centred_rows_is_saved_for_plain_ones(fields):
    x = data(offset=50.0)
    trainer = Trainer(config(centre_input=True, epochs=3, dtype="float64", **fields), x.double(), show=False)
    coder = trainer.run()
    assert torch.allclose(trainer.scaling.centre, x.double().mean(0), atol=1e-9)
    assert trainer.scaling.mean.abs().max() < 1e-9
    assert (trainer.scaling.scales == (1.0,)) == (not fields.get("scale_input", True))
    if "ema" not in fields:
        scaling = trainer.scaling
        inner = trainer.coder(scaling.apply(x.double())) / scaling.scales[0] + scaling.centre
        torch.testing.assert_close(coder(x.double()), inner)
    fvu = (x - coder(x.double())).square().sum() / (x - x.mean(0)).square().sum()
    assert fvu < 0.6


def test_centring_makes_a_run_blind_to_an_offset():
    """Of exact data: the run with an offset of 2**10 is the run without one."""
    x = (data(offset=0.0) * 64).round().double() / 64
    x -= x.mean(0).round()
    runs = [train(config(centre_input=True, dtype="float64"), x + offset, show=False) for offset in (0.0, 1024.0)]
    torch.testing.assert_close(runs[0].W_dec, runs[1].W_dec, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(runs[0].b_dec + 1024, runs[1].b_dec, rtol=1e-7, atol=1e-7)


def test_dropped_rows_are_counted_and_never_reach_the_weights(tmp_path):
    x = data()
    bad = torch.arange(640) % 50 == 3
    x[bad, 4] = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.arange(int(bad.sum())) % 3]
    with pytest.raises(ValueError, match="rows hold NaN or infinite values"):
        train(config(), x, show=False)
    run = tmp_path / "run"
    trainer = Trainer(config(nonfinite="drop", epochs=2), x, run, show=False)
    trainer.run(until=25)
    coder = Trainer(None, x, run, resume=True, show=False).run()
    rows = metrics(run)
    dropped = [row["dropped"] for row in rows]
    assert dropped[-1] == 2 * int(bad.sum()) and dropped == sorted(dropped)
    assert all(p.isfinite().all() for p in coder.parameters())
    whole = train(config(nonfinite="drop", epochs=2), x, show=False)
    assert torch.equal(whole.W_dec, coder.W_dec)


def test_a_run_that_bad_rows_stop_has_saved_what_it_learned(tmp_path):
    x, run = data(), tmp_path / "run"
    trainer = Trainer(config(init_rows=B), x, run, show=False)
    x[:] = torch.where(torch.arange(640)[:, None] % 64 == 0, torch.nan, x)
    with pytest.raises(ValueError, match="nonfinite = 'drop'"):
        trainer.run()
    assert (run / "checkpoint.safetensors").exists() and 0 < trainer.step < 20
    # The same data are wanted to go on: here the fingerprint of the rows has changed with them.
    with pytest.raises(ValueError, match="sha256"):
        Trainer({"nonfinite": "drop"}, x, run, resume=True, show=False)


def test_the_mean_gradient_norm_is_a_metric(tmp_path):
    train(config(clip_norm=0.01), data(), tmp_path / "clipped", show=False)
    assert all(row["grad_norm"] > 0.01 for row in metrics(tmp_path / "clipped"))
    train(config(), data(), tmp_path / "free", show=False)
    assert all(row["grad_norm"] is None for row in metrics(tmp_path / "free"))


def test_tensorboard_events_hold_the_metrics(tmp_path):
    loader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="the package tensorboard is not installed"
    )
    run = tmp_path / "run"
    chosen = config(tensorboard=True)
    Trainer(chosen, data(), run, show=False).run(until=12)
    Trainer(None, data(), run, resume=True, show=False).run()
    events = loader.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for name in ("loss", "fvu", "l0", "dead", "lr", "tokens_per_s"):
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx({row["step"]: row[name] for row in metrics(run)}, rel=1e-6), name


def test_tensorboard_that_is_not_installed_is_an_error_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fusae\[tensorboard\]'"):
        Trainer(config(tensorboard=True), data(), tmp_path / "run", show=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"k_start": 2}, "k_start must be between 3 and m = 50, got 2"),
        ({"k_start": 51}, "k_start must be between 3 and m = 50, got 51"),
        ({"k_anneal_steps": 5}, "k_anneal_steps is 5, but k_start is not given"),
        ({"k_start": 5, "k_anneal_steps": -1}, "k_anneal_steps must be at least 0, got -1"),
        ({"k_start": 5, "k_anneal_steps": 20}, "k_anneal_steps must be less than the 20 steps of the run, got 20"),
        ({"ema": 1.0}, "ema must be at least 0 and less than 1, got 1.0"),
        ({"centre_input": 1}, "centre_input must be true or false, got int 1"),
        ({"nonfinite": "ignore"}, "nonfinite must be one of 'stop', 'drop', got 'ignore'"),
        ({"prefetch": -1}, "prefetch must be at least 0, got -1"),
        ({"tensorboard": "yes"}, "tensorboard must be true or false, got str 'yes'"),
    ],
)
def test_bad_choices(fields, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Trainer(config(**fields), data(), show=False)


def test_a_loss_that_is_not_divided_by_the_variance():
    x = 3 * data()
    chosen = {"scale_input": False, "clip_norm": 1e9, "k_aux": 0}
    rows = {True: [], False: []}
    for divided, found in rows.items():
        trainer = Trainer(config(normalise_loss=divided, **chosen), x, show=False)
        trainer.run(until=1, on_log=found.append)
    variance = trainer.scaling.variance
    assert variance > 2
    assert rows[False][0]["loss"] == pytest.approx(variance * rows[True][0]["loss"], rel=1e-5)
    assert rows[False][0]["grad_norm"] == pytest.approx(variance * rows[True][0]["grad_norm"], rel=1e-4)
    assert rows[False][0]["fvu"] == rows[True][0]["fvu"]


def test_a_warm_up_that_starts_at_zero():
    chosen = config(lr=1.0, warmup_steps=4, decay=0.0, warmup_from_zero=True).resolve(D, 640)
    assert [chosen.lr_at(step) for step in range(1, 7)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
