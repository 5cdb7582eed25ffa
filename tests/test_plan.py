# SPDX-License-Identifier: Apache-2.0
"""`fusae plan`: what it counts is what a run then holds; what it advises fits."""

import dataclasses
import json
import math

import pytest
import torch

from fusae.cli import main
from fusae.optim import Adam
from fusae.plan import Rates, bytes_per_parameter, measure_rates, needs, plan, speed
from fusae.plan.memory import touched
from fusae.train import TrainConfig, Trainer

D, N = 48, 64
RATES = Rates(gemm=1e9, start=1e-6, copy=1e8, entry=1e-6, row=1e-6, device="cpu")
MODES = [
    {},
    {"moments": "8bit"},
    {"moments": "bfloat16", "optimizer": "masked", "clip_norm": 1.0},
    {"optimizer": "lazy", "beta1": 0.0, "moments": "8bit"},
    {"dtype": "bfloat16"},
    {"dtype": "bfloat16", "weights": "bfloat16", "moments": "8bit", "optimizer": "lazy", "beta1": 0.0},
    {"dtype": "bfloat16", "weights": "bfloat16_master"},
    {"dtype": "float64"},
    {"ema": 0.9},
    {"architecture": "skip_transcoder", "sites": "24,24"},
    {"architecture": "crosscoder", "sites": "24,24", "form": "batch_topk", "select_by_norm": True},
    {"architecture": "cross_layer", "sites": "12,12,12,12"},
    {"form": "jumprelu"},
    {"form": "gated"},
]


def config(**fields):
    given = {"m": 300, "k": 4, "batch_size": N, "tokens": N * 4, "device": "cpu", "dead_window": N, **fields}
    return TrainConfig(**given)


def resolved(**fields):
    sites = fields.get("sites")
    return config(**fields).resolve(D, None, tuple(map(int, sites.split(","))) if sites else None)


def size(tensor):
    return tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("fields", MODES, ids=str)
def test_weights_moments_and_average_are_those_of_a_run_byte_by_byte(fields):
    trainer = Trainer(config(**fields), torch.randn(4 * N, D), show=False)
    trainer.run()
    need = needs(trainer.config)
    assert need.parts["weights"] == sum(size(p) for p in trainer.coder.parameters())
    assert need.parameters == sum(p.numel() for p in trainer.coder.parameters())
    state = [v for s in trainer.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    assert need.parts["moments"] == sum(map(size, state))
    average = 0 if trainer.average is None else sum(map(size, trainer.average.sums.values()))
    assert need.parts.get("average", 0) == average
    assert need.total == sum(need.parts.values()) and all(value > 0 for value in need.parts.values())


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("aux", [0, 24])
def test_gradients_are_those_of_codes_that_are_spread_evenly(monkeypatch, aux, clip):
    fields = {"m": 4000, "optimizer": "masked", "k_aux": aux, "clip_norm": clip}
    trainer = Trainer(config(**fields), torch.randn(4 * N, D), show=False)
    held, update = [], Adam._update

    def look(self, *rest):
        grads = [p.grad for p in trainer.coder.parameters() if p.grad is not None]
        held.append(sum(size(g._values() if g.is_sparse else g) for g in grads))
        return update(self, *rest)

    monkeypatch.setattr(Adam, "_update", look)
    for _ in range(3):
        held.clear()
        trainer.train_step(torch.randn(N, D))
    planned = needs(trainer.config).parts["gradients"]
    assert 0.8 * planned < max(held) < 1.05 * planned


def test_touched_latents():
    assert touched(1, 100) == 1 and touched(10, 10_000) == 10
    assert touched(1 << 20, 1) == 1
    hit = torch.randint(1000, (2000,), generator=torch.Generator().manual_seed(0)).unique().numel()
    assert abs(touched(1000, 2000) - hit) < 40


def test_bytes_per_parameter():
    found = bytes_per_parameter(TrainConfig(m=1 << 16, k=32).resolve(768, 10**6))
    wanted = {"float32": 12, "moments in bfloat16": 8, "moments in 8 bits": 6, "lazy, beta1 = 0": 8, "lazy, 8 bits": 5,
              "weights in bfloat16 with a master, moments in 8 bits": 8, "weights in bfloat16, moments in 8 bits": 4,
              "weights in bfloat16, lazy, 8 bits": 3}  # fmt: skip
    assert {name: round(value) for name, value in found.items()} == wanted
    assert all(abs(found[name] - value) < 0.05 for name, value in wanted.items())


def test_speed_is_put_together_from_rates():
    small, large = (resolved(m=m, k_aux=0, optimizer="masked") for m in (1 << 14, 1 << 15))
    one, two = speed(small, RATES), speed(large, RATES)
    assert math.isclose(one.seconds["encode"], 2 * N * (1 << 14) * D / RATES.gemm + N * RATES.start)
    assert math.isclose(two.seconds["encode"] - one.seconds["encode"], 2 * N * (1 << 14) * D / RATES.gemm)
    assert two.seconds["codes"] == one.seconds["codes"]
    assert one.seconds["codes"] == N * 4 * RATES.entry and one.aux_seconds == 0
    assert one.tokens_per_s == N / sum(one.seconds.values())
    dense = speed(resolved(m=1 << 14, optimizer="dense", k_aux=8), RATES)
    assert dense.seconds["optimiser"] == 2 * (1 << 14) * RATES.row > one.seconds["optimiser"]
    assert math.isclose(dense.aux_seconds, N * 8 * RATES.entry)


@pytest.mark.parametrize("fields", [f for f in MODES if not f.get("ema")], ids=str)
def test_rates_are_measured_in_every_mode(fields):
    rates = measure_rates(resolved(**fields), rounds=1)
    assert all(value > 0 and math.isfinite(value) for value in (rates.gemm, rates.copy, rates.entry, rates.row))
    assert 0 <= rates.start < 1


def test_what_is_advised_fits():
    run = resolved(m=100_000, ema=0.9)
    whole = needs(run).total
    overhead = plan(run, room=10**12, measured=False).overhead
    tight = plan(run, room=overhead + whole * 4 // 5, measured=False)
    assert tight.fits is False and tight.speed is None
    assert any(line.startswith("ema = 0.0") for line in tight.advice)
    assert any(line.startswith("m = ") for line in tight.advice)
    for line in tight.advice:
        change = dict(part.split(" = ") for part in line.split(":")[0].split(", "))
        change = {name: value.strip("'") if "'" in value else json.loads(value) for name, value in change.items()}
        assert needs(dataclasses.replace(run, **change)).total + tight.overhead <= tight.room
    assert plan(run, room=overhead + whole, measured=False).advice == []
    hopeless = plan(run, room=overhead + 10, measured=False)
    assert hopeless.advice == ["nothing that this knows of would make it fit: take a machine with more memory"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('m = 512\nk = 4\nbatch_size = 64\noptimizer = "masked"\n', encoding="utf-8")
    return path


def call(capsys, *arguments):
    try:
        main(["plan", *map(str, arguments)])
    except SystemExit as stop:
        assert stop.code in (0, None), capsys.readouterr().err
    return capsys.readouterr().out


def test_command_prints_tables(capsys, file):
    out = call(capsys, file, "--width", 48, "--device", "cpu")
    for text in ("weights", "moments", "gradients", "in all", "it fits", "bytes per parameter", "tokens a second"):
        assert text in out


def test_command_prints_json_of_another_machine(capsys, file):
    options = ("--width", 48, "--no-measure", "--memory", "0.3", "--device", "cuda", "--json")
    found = json.loads(call(capsys, file, *options))
    assert found["fits"] is False and found["room_bytes"] == 300_000_000 and found["speed"] is None
    assert found["total_bytes"] == sum(found["bytes"].values()) and found["advice"]


def test_width_and_tokens_come_from_rows(capsys, file, tmp_path):
    import numpy

    numpy.save(tmp_path / "rows.npy", numpy.random.default_rng(0).normal(size=(640, 24)).astype("float32"))
    found = json.loads(call(capsys, file, "--data", tmp_path / "rows.npy", "--no-measure", "--device", "cpu", "--json"))
    assert found["config"]["d"] == 24 and found["config"]["tokens"] == 640


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "does not say how wide the activations are; give --width"),
        (["--width", "48", "--memory", "-1"], "--memory must be greater than 0, got -1.0"),
        (["--width", "48", "--device", "gpu"], "device must be 'auto', 'cpu', 'cuda'"),
        (["--width", "48", "--tokens", "3"], "tokens must be at least batch_size = 64, got 3"),
        (["--data", "absent.npy"], "absent.npy"),
    ],
)
def test_errors_are_one_line(capsys, file, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(["plan", str(file), *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and message in error and error.count("\n") == 1 and error.startswith("error: ")


def test_a_bad_file_is_named(capsys, tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("m = 512\nkk = 4\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["plan", str(path)])
    assert "bad.toml: a training configuration has no field 'kk'; did you mean 'k'" in capsys.readouterr().err
