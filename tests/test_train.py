# SPDX-License-Identifier: Apache-2.0
"""The training loop: what it writes, that it goes on with the same bits."""

import io
import json
import os
import signal

import pytest
import safetensors.torch
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from fusae.formats import FormatError, native
from fusae.nn import SparseCoder
from fusae.train import TrainConfig, Trainer, checkpoint, train
from fusae.train.progress import TrainingDisplay

D, M, K, B = 12, 50, 3, 32
COMPARED = ("step", "tokens", "loss", "fvu", "l0", "dead", "aux_loss", "lr")


def data(n=640, seed=0, dtype=torch.float32):
    """Sparse sums of random directions, off centre."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(M, D, generator=generator)
    chosen = torch.rand(n, M, generator=generator).topk(K, 1).indices
    return (directions[chosen].sum(1) + 5).to(dtype)


def config(**fields):
    return TrainConfig(**({"m": M, "k": K, "batch_size": B, "dead_window": 100, "log_every": 6} | fields))


def metrics(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in COMPARED} for row in rows]


def same_bits(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_a_run_writes_what_the_report_reads(tmp_path):
    run = tmp_path / "run"
    coder = train(config(), data(), run, show=False)
    assert sorted(p.name for p in run.iterdir()) == ["coder", "config.json", "metrics.jsonl"]
    assert same_bits(SparseCoder.load(run / "coder"), coder)
    about = json.loads((run / "config.json").read_text())
    assert TrainConfig.from_dict(about["train"]).steps == 20
    assert about["data"] == {"rows": 640, "d": D} and about["versions"]["torch"] == torch.__version__
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [6, 12, 18, 20]
    assert set(rows[0]) == {*COMPARED, "seconds", "tokens_per_s", "wait", "k", "dropped", "grad_norm"}
    assert rows[-1]["tokens"] == 640 and rows[-1]["fvu"] < rows[0]["fvu"] and 0 < rows[0]["l0"] <= K
    assert rows[0]["seconds"] < rows[-1]["seconds"] and rows[0]["tokens_per_s"] > 0


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"optimizer": "masked", "clip_norm": 0.5},
        {"dtype": "float64", "scale_input": False, "unit_decoder": False, "select_by_norm": True},
        {"dtype": "bfloat16", "b_dec_init": "mean"},
    ],
    ids=str,
)
@pytest.mark.parametrize("stop", [13, 24])
def test_resumed_run_has_the_bits_of_an_uninterrupted_one(tmp_path, fields, stop):
    chosen, x = config(epochs=2, checkpoint_every=7, dead_window=40, **fields), data()
    whole = Trainer(chosen, x, tmp_path / "whole", show=False)
    whole.run()
    assert any(row["aux_loss"] for row in metrics(tmp_path / "whole")), "the case should have dead latents, for AuxK"
    Trainer(chosen, x, tmp_path / "halves", show=False).run(until=stop)
    assert not (tmp_path / "halves" / "coder").exists()
    torch.manual_seed(999)
    resumed = Trainer(None, x, tmp_path / "halves", resume=True, show=False)
    assert resumed.step == stop and not resumed.finished
    resumed.run()
    assert same_bits(whole.coder, resumed.coder)
    assert torch.equal(whole.dead.tokens_since_fired, resumed.dead.tokens_since_fired)
    for one, other in zip(whole.coder.parameters(), resumed.coder.parameters(), strict=True):
        ours, theirs = whole.optimizer.state[one], resumed.optimizer.state[other]
        assert ours["step"] == theirs["step"] == 40
        assert all(torch.equal(ours[name], theirs[name]) for name in ("exp_avg", "exp_avg_sq"))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "halves")


def test_run_is_a_function_of_the_seed():
    one, same, other = (train(config(seed=seed, checkpoint_every=2), data(), show=False) for seed in (0, 0, 1))
    assert same_bits(one, same) and not same_bits(one, other)


def test_going_on_after_a_crash_starts_from_the_last_checkpoint(tmp_path):
    chosen, x = config(checkpoint_every=7, log_every=2), data()
    train(chosen, x, tmp_path / "whole", show=False)

    def crash(row):
        if row["step"] == 12:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        Trainer(chosen, x, tmp_path / "cut", show=False).run(on_log=crash)
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 14, "tok')
    resumed = Trainer(None, x, tmp_path / "cut", resume=True, show=False)
    assert resumed.step == 7
    assert [row["step"] for row in metrics(tmp_path / "cut")] == [2, 4, 6]
    resumed.run()
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, capfd, number):
    before = signal.getsignal(number)
    trainer = Trainer(config(), data(), tmp_path / "run")
    trainer.run(on_log=lambda row: os.kill(os.getpid(), number) if row["step"] == 12 else None)
    said = " ".join(capfd.readouterr().err.split())
    assert trainer.step == 12 and signal.getsignal(number) is before
    assert "stopping after this step (Ctrl-C to stop at once, without saving)" in said
    assert f"stopped after step 12 of 20; saved. To go on: fusae train --resume {tmp_path / 'run'}" in said
    resumed = Trainer(None, data(), tmp_path / "run", resume=True, show=False)
    assert same_bits(train(config(), data(), show=False), resumed.run())


def test_second_interrupt_stops_at_once(tmp_path):
    def twice(row):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        Trainer(config(), data(), tmp_path / "run", show=False).run(on_log=twice)
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_exported_coder_undoes_the_input_scale(tmp_path):
    x = 1000 * data()
    trainer = Trainer(config(epochs=5), x, show=False)
    coder = trainer.run()
    assert trainer.scaling.variance == pytest.approx(1.0, rel=1e-4)
    inner = trainer.coder(trainer.scaling.apply(x)) / trainer.scaling.scales[0]
    torch.testing.assert_close(coder(x), inner, rtol=1e-4, atol=1e-2)
    assert not coder.sparse_grad and torch.equal(coder.W_dec, trainer.coder.W_dec)
    fvu = (x - coder(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert fvu < 0.5
    # The same run at another scale of the data is the same run.
    small = train(config(epochs=5), x / 1000, show=False)
    torch.testing.assert_close(small.W_dec, coder.W_dec, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(small.b_dec, coder.b_dec / 1000, rtol=1e-3, atol=1e-3)


def test_logged_metrics_are_those_of_the_steps():
    x = data(dtype=torch.float64)
    rows, sse, total, active = [], 0.0, 0.0, 0
    trainer = Trainer(config(dtype="float64", scale_input=False, log_every=5, k_aux=0), x, show=False)
    mean = x.mean(0)
    for batch in [trainer.feed.next() for _ in range(5)]:
        codes = trainer.coder.encode(batch)
        sse += (batch - trainer.coder(batch)).square().sum().item()
        total += (batch - mean).square().sum().item()
        active += int(codes.l0.sum())
        trainer.train_step(batch)
    rows.append(trainer._row())
    assert rows[0]["fvu"] == pytest.approx(sse / total)
    assert rows[0]["l0"] == active / (5 * B)
    assert rows[0]["loss"] == pytest.approx(sse / (5 * B) / trainer.scaling.variance)
    assert rows[0]["aux_loss"] is None and rows[0]["dead"] == int(trainer.dead.mask().sum())


def test_aux_loss_is_the_mean_over_steps_with_dead_latents_on_every_device(monkeypatch):
    """A GPU takes the AuxK term without asking whether anything is dead; the metric must not show it."""
    x = data()
    rows = []
    for counted in (True, False):
        trainer = Trainer(config(dead_window=40, k_aux=5), x, show=False)
        if not counted:
            monkeypatch.setattr(trainer, "_dead", lambda t=trainer: (t.dead.mask(), 5))
        aux, with_dead = 0.0, 0
        for _ in range(9):
            with_dead += bool(trainer.dead.mask().any())
            aux += float(trainer.train_step(trainer.feed.next()).aux or 0)
        rows.append(trainer._row()["aux_loss"])
        assert 0 < with_dead < 9 and rows[-1] == pytest.approx(aux / with_dead, rel=1e-6)
    assert rows[0] == pytest.approx(rows[1], rel=1e-4)


def test_measured_centre_and_scale_do_not_depend_on_the_number_of_threads():
    x, before, found = torch.randn(4096, 96, generator=torch.Generator().manual_seed(0)), torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            trainer = Trainer(config(b_dec_init="mean"), x, show=False)
            found.add((trainer.scaling.scales, trainer.scaling.variance, tuple(trainer.coder.b_dec.tolist())))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


@pytest.mark.parametrize("unit", [True, False])
def test_decoder_norms(unit):
    norms = train(config(unit_decoder=unit, epochs=3), data(), show=False).W_dec.norm(dim=1)
    assert ((norms - 1).abs().max() < 1e-5) == unit


def test_masked_steps_leave_latents_that_did_not_fire():
    trainer = Trainer(config(optimizer="masked", k_aux=0), data(), show=False)
    start = trainer.coder.W_enc.detach().clone()
    result = trainer.train_step(trainer.feed.next())
    fired = (result.codes.to_dense() != 0).any(0)
    moved = (trainer.coder.W_enc != start).any(1)
    assert torch.equal(moved, fired) and not fired.all()


def test_no_tensor_of_all_pre_activations_or_all_gathered_rows():
    """Nothing that a step makes outside the ops is as large as [n, m] or [n·k, d]; the weights here are smaller."""
    n, seen = 64, []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    seen.append((tensor.numel(), func))
            return out

    trainer = Trainer(config(batch_size=n, k=11, k_aux=5, dead_window=1, clip_norm=1.0), data(), show=False)
    with torch.no_grad():
        trainer.coder.b_enc[:3] = -3.0  # does not fire
    trainer.train_step(trainer.feed.next())
    with Sizes():
        result = trainer.train_step(trainer.feed.next())
    assert result.aux is not None and result.aux > 0, "the step should have an AuxK term"
    largest = max(seen, key=lambda entry: entry[0])
    assert largest[0] < n * M == 3200 < n * 11 * D, largest
    ops = torch.ops.fusae
    assert {ops.encode_topk_fwd.default, ops.encode_bwd.default, ops.decode_bwd.default} <= {func for _, func in seen}


def test_resume_refuses_another_configuration(tmp_path):
    x, run = data(), tmp_path / "run"
    with pytest.raises(FileNotFoundError, match="checkpoint.safetensors is not there"):
        Trainer(config(), x, run, resume=True, show=False)
    Trainer(config(), x, run, show=False).run(until=3)
    with pytest.raises(ValueError, match="k is 4, the run to resume has 3; start a new run"):
        Trainer(config(k=4), x, run, resume=True, show=False)
    with pytest.raises(FileExistsError, match="holds a run .*resume it, overwrite it, or take another one"):
        Trainer(config(), x, run, show=False)
    resumed = Trainer(config(log_every=1), x, run, resume=True, show=False)
    assert resumed.config.log_every == 1
    resumed.run()
    with pytest.raises(ValueError, match="is finished: .*coder holds its coder"):
        Trainer(config(), x, run, resume=True, show=False)
    assert Trainer(config(), x, run, overwrite=True, show=False).step == 0
    assert not (run / "coder" / "coder.json").exists()


def test_damaged_checkpoints(tmp_path):
    x, run = data(), tmp_path / "run"
    Trainer(config(), x, run, show=False).run(until=3)
    path = run / "checkpoint.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(FormatError, match="checkpoint.safetensors: truncated, damaged or no safetensors file"):
        Trainer(None, x, run, resume=True, show=False)
    path.write_bytes(SparseCoder.load(train(config(), x, tmp_path / "b", show=False).save(run / "c")) and
                      (run / "c" / "coder.safetensors").read_bytes())  # fmt: skip
    with pytest.raises(FormatError, match="field 'format' must be 'fusae.Trainer', got 'fusae.SparseCoder'"):
        Trainer(None, x, run, resume=True, show=False)


def test_checkpoint_of_another_shape_changes_nothing(tmp_path):
    x, run = data(), tmp_path / "run"
    trainer = Trainer(config(), x, run, show=False)
    trainer.run(until=3)
    path = run / "checkpoint.safetensors"
    tensors, about = safetensors.torch.load_file(path), native.open_tensors(path, "")[1]
    for change, message in [
        (
            {"W_enc.exp_avg": torch.zeros(D, M)},
            r"tensors.W_enc.exp_avg must be float32 \[50, 12\], got float32 \[12, 50\]",
        ),
        ({"tokens_since_fired": torch.zeros(M)}, r"tokens_since_fired must be int64 \[50\], got float32 \[50\]"),
    ]:
        native.write_tensors(path, tensors | change, about)
        before = trainer.coder.W_enc.detach().clone()
        with pytest.raises(FormatError, match=message):
            checkpoint.load_tensors(trainer, path)
        assert torch.equal(trainer.coder.W_enc, before)
    native.write_tensors(path, {k: v for k, v in tensors.items() if k != "mean"}, about)
    with pytest.raises(FormatError, match="tensors lacks 'mean'"):
        Trainer(None, x, run, resume=True, show=False)


def test_progress_on_a_terminal_and_in_a_file():
    row = {"step": 5, "tokens": 500, "fvu": 0.25, "l0": 32.0, "dead": 1234, "tokens_per_s": 100.0}
    for terminal in (True, False):
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, width=120)
        with TrainingDisplay(True, 1000, console) as display:
            display.tokens(500)
            display.metrics(row)
            display.metrics(row | {"step": 6})
        text = out.getvalue()
        assert "50 %" in text and "100 tokens/s" in text and "FVU 0.250  L0 32.0  dead 1,234" in text
        assert ("\x1b[" in text) == terminal
        if not terminal:
            assert text == "step 5   50 %  100 tokens/s  left 0:00:05  FVU 0.250  L0 32.0  dead 1,234\n"
    out = io.StringIO()
    with TrainingDisplay(False, 1000, Console(file=out, quiet=True)) as display:
        display.metrics(row)
    assert out.getvalue() == ""


def test_diverged_loss_is_an_error():
    trainer = Trainer(config(), data(), show=False)
    with torch.no_grad():
        trainer.coder.W_dec.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="the loss became nan in steps 1 to 6: lower lr"):
        trainer.run()
