# SPDX-License-Identifier: Apache-2.0
"""Every form and architecture in the trainer: it learns, resumes with the same bits, and is saved for plain rows."""

import json

import pytest
import torch

from fusae.nn import SparseCoder, objectives
from fusae.train import TrainConfig, Trainer
from fusae.train.forms import FORMS
from fusae.train.presets import PRESETS

D, M, K, B = 24, 48, 3, 64
THRESHOLDED = ("relu", "gated", "jumprelu")


def data(n=2560, seed=0, width=D):
    """Sparse sums of M directions, off centre; the second half of a row is smaller than the first."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(M, width, generator=generator), dim=1)
    chosen = torch.rand(n, M, generator=generator).topk(K, 1).indices
    codes = torch.zeros(n, M).scatter_(1, chosen, 0.5 + torch.rand(n, K, generator=generator))
    x = codes @ directions + 0.5
    x[:, width // 2 :] *= 0.1
    return x


def config(form="topk", **fields):
    fields = {"m": M, "k": K, "form": form, "batch_size": B, "lr": 3e-3, "dead_window": 300, "log_every": 10} | fields
    return TrainConfig(**fields)


def fvu(y, target):
    return float((y.detach() - target).square().sum() / (target - target.mean(0)).square().sum())


@pytest.mark.parametrize("form", FORMS)
def test_every_form_learns_resumes_and_is_saved(tmp_path, form):
    fields = {"ema": 0.5, "centre_input": True, "tokens": 2560 * 3}
    if form == "jumprelu":
        fields |= {"preact_coefficient": 1e-3, "sparsity": 1e-3}
    x, run = data(), tmp_path / "run"
    whole = Trainer(config(form, **fields), x, tmp_path / "whole", show=False)
    coder = whole.run()
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["fvu"] < 0.6 * rows[0]["fvu"], "it should learn"
    assert fvu(coder(x), x) < 0.5
    Trainer(config(form, **fields), x, run, show=False).run(until=77)
    resumed = Trainer(None, x, run, resume=True, show=False).run()
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in coder.state_dict().items())
    loaded = SparseCoder.load(run / "coder")
    assert loaded.config == coder.config and not loaded.training and torch.equal(loaded(x), coder(x))
    if form in ("batch_topk", "matryoshka"):
        assert "threshold" in loaded.state_dict() and loaded.threshold > 0
        assert float(loaded.encode(x).l0.float().mean()) == pytest.approx(K, rel=0.15), "the threshold keeps the L0"
    if form == "jumprelu":
        assert (coder.threshold > 0).any() and not torch.equal(coder.threshold, coder.threshold[0].expand(M))
    with torch.no_grad():  # export() shares what it may: nothing of the coder in training has changed
        assert torch.equal(whole.export()(x), coder(x))


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("abs", "hierarchical")])
@pytest.mark.parametrize("architecture", ["transcoder", "skip_transcoder", "crosscoder"])
def test_architectures_are_saved_for_plain_rows(tmp_path, form, architecture):
    x = data().double()
    free = {"select_by_norm": form not in THRESHOLDED, "unit_decoder": False} if architecture == "crosscoder" else {}
    fields = {"architecture": architecture, "sites": f"{D // 2},{D // 2}", "centre_input": True, "dtype": "float64"}
    trainer = Trainer(config(form, tokens=2560, **fields, **free), x, tmp_path / "run", show=False)
    coder = trainer.run()
    scaled, first = trainer.scaling.apply(x), D // 2
    inner = trainer.coder.eval()
    assert trainer.scaling.scales[1] > 3 * trainer.scaling.scales[0]
    if architecture == "crosscoder":
        codes = inner.encode(scaled)
        y = inner(scaled) / trainer.scaling.columns() + trainer.scaling.centre
        out = coder(x)
        assert coder.config.sites == (first, first)
    else:
        codes = inner.encode(scaled[:, :first])
        y = inner(scaled[:, :first]) / trainer.scaling.scales[1] + trainer.scaling.centre[first:]
        out = coder(x[:, :first])
        assert (coder.config.d, coder.config.output_width) == (first, first)
        assert coder.config.skip == (architecture == "skip_transcoder") and not coder.config.pre_bias
    torch.testing.assert_close(out, y, rtol=1e-8, atol=1e-8)
    plain = coder.encode(x if architecture == "crosscoder" else x[:, :first])
    assert torch.equal(plain.to_dense() != 0, codes.to_dense() != 0), "the same latents are active"
    torch.testing.assert_close(SparseCoder.load(tmp_path / "run" / "coder")(x[:, : coder.config.d]), out)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_configuration_that_trains(name):
    fields = {"m": M, "k": K, "preset": name, "batch_size": B, "tokens": 2560}
    if "coder" in name:
        fields["sites"] = [D // 2, D // 2]
    chosen = TrainConfig.from_dict(fields)
    for field, value in PRESETS[name].fields.items():
        assert getattr(chosen, field) == fields.get(field, value)
    rows = []
    Trainer(chosen, data(), show=False).run(on_log=rows.append)
    assert rows[-1]["step"] == 40 and PRESETS[name].source


def test_a_transcoder_starts_from_no_output():
    """Free decoder rows that start at 0: never worse than the mean of the outputs, unlike unit rows."""
    generator = torch.Generator().manual_seed(1)
    inputs = data(width=D)
    target = torch.tanh(3 * inputs @ torch.randn(D, D, generator=generator))
    x = torch.cat([inputs, target], 1)
    given = {"m": M, "k": K, "preset": "transcoder", "sites": f"{D},{D}", "batch_size": B, "tokens": 2560 * 4,
             "lr": 3e-3, "log_every": 5}  # fmt: skip
    found = {}
    for name, change in {"preset": {}, "unit rows": {"unit_decoder": True, "decoder_scale": 1.0}}.items():
        rows = []
        trainer = Trainer(TrainConfig.from_dict(given | change), x, show=False)
        assert trainer.coder.W_dec.any() == (name != "preset") and trainer.coder.W_enc.any()
        trainer.run(on_log=rows.append)
        found[name] = [row["fvu"] for row in rows]
    assert max(found["preset"]) < 1.05 < found["unit rows"][0]
    assert found["preset"][-1] < 0.95 * found["unit rows"][-1], found


def test_the_terms_of_a_loss_are_metrics():
    def last(**fields):
        rows = []
        Trainer(config(tokens=2560, **fields), data(), show=False).run(on_log=rows.append)
        return rows[-1]

    nested = last(form="matryoshka", prefixes="12, 24")
    assert nested["mse_12"] > nested["mse_24"] > nested["fvu"] > 0
    assert last(form="relu")["sparsity"] > 0 and last(form="topk", multi_topk=0.125)["multi_topk"] > 0
    jump = last(form="jumprelu", preact_coefficient=1e-3)
    assert jump["sparsity"] == pytest.approx(jump["l0"], rel=1e-5) and "preact" in jump
    assert "sparsity" not in last(form="topk")


def test_the_sparsity_weight_rises():
    chosen = config("relu", tokens=6400, sparsity_warmup=0.5).resolve(D, None)
    assert [chosen.ramp_at(step) for step in (1, 25, 50, 100)] == [0.02, 0.5, 1.0, 1.0]
    assert config("relu", tokens=6400, sparsity_warmup=0.0).resolve(D, None).ramp_at(1) == 1.0


def test_defaults_of_a_form():
    tanh = config("jumprelu", penalty="tanh").resolve(400, 6400)
    assert (tanh.bandwidth, tanh.threshold_init, tanh.sparsity) == pytest.approx((0.1, 0.005, 0.025))
    plain = config("jumprelu").resolve(400, 6400)
    assert (plain.bandwidth, plain.threshold_init, plain.sparsity, plain.k_aux) == (1e-3, 1e-3, 1e-3, 0)
    assert config("relu").resolve(400, 6400).sparsity == objectives.ReLU.sparsity
    two = config(architecture="transcoder").resolve(10, 6400, (4, 6))
    assert (two.sites, two.k_aux, two.parts) == ("4,6", 3, (4, 6))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"form": "top_k"}, "form must be one of 'topk', 'abs', .* got 'top_k'"),
        ({"architecture": "sae"}, "architecture must be one of 'autoencoder', .* got 'sae'"),
        ({"penalty": "l1"}, "penalty must be one of 'l0', 'l0_squared', 'l0_mean_squared', 'tanh', got 'l1'"),
        ({"sparsity": 0.1}, "sparsity is 0.1, which form 'topk' does not use; it is for: relu, jumprelu, gated"),
        ({"prefixes": "3,5"}, "prefixes is '3,5', which form 'topk' does not use; it is for: matryoshka"),
        ({"form": "relu", "multi_topk": 0.1}, "multi_topk is 0.1, which form 'relu' does not use; it is for: topk"),
        ({"form": "relu", "k_aux": 3}, "k_aux must not be given with form 'relu', got 3"),
        ({"form": "jumprelu", "k_start": 5}, "k_start must not be given with form 'jumprelu', got 5"),
        ({"form": "relu", "bandwidth": 0.1}, "bandwidth is 0.1, which form 'relu' does not use; it is for: jumprelu"),
        ({"form": "group_max", "k": 5}, "k must divide m = 48 with form 'group_max', got 5"),
        ({"form": "group_max", "k_start": 6}, "k_start must not be given with form 'group_max' .k divides m., got 6"),
        ({"form": "jumprelu", "select_by_norm": True}, "select_by_norm must be false with form 'jumprelu'"),
        ({"penalty": "tanh"}, "penalty is 'tanh', which form 'topk' does not use; it is for: jumprelu"),
        ({"form": "relu", "aux_coefficient": 0.5}, "aux_coefficient is 0.5, which form 'relu' does not use"),
        ({"sparsity_warmup": 0.5}, "sparsity_warmup is 0.5, which form 'topk' does not use"),
        ({"threshold_decay": 0.5}, "threshold_decay is 0.5, which form 'topk' does not use; it is for: batch_topk"),
        ({"form": "matryoshka", "prefixes": "12,6"}, "prefixes must rise to at most m = 48, got '12,6'"),
        ({"form": "matryoshka", "prefixes": "12,49"}, "prefixes must rise to at most m = 48, got '12,49'"),
        ({"form": "matryoshka", "prefixes": "few"}, "prefixes must be widths of at least 1 with commas .* got 'few'"),
        ({"form": "matryoshka", "prefixes": 12}, "prefixes must be widths with commas between, .* got int 12"),
        ({"sites": "0,24"}, "sites must be widths of at least 1 with commas between, .* got '0,24'"),
        ({"sites": "12,13"}, "sites must add up to the width of the data, 24, got 12,13"),
        ({"architecture": "transcoder"}, r"sites must be the widths of input and target of a transcoder, got \[24\]"),
        ({"architecture": "transcoder", "sites": "8,8,8"}, "sites must be the widths of input and target"),
        ({"architecture": "crosscoder"}, r"sites must name the parts of a crosscoder's row, two or more, got \[24\]"),
        ({"form": "relu", "sparsity_warmup": 2.0}, "sparsity_warmup must be between 0 and 1, a share of the steps"),
        ({"threshold_decay": 1.0}, "threshold_decay must be at least 0 and less than 1, got 1.0"),
        ({"straight_through": True}, "straight_through is True, which form 'topk' does not use; it is for: jumprelu"),
    ],
)
def test_fields_that_do_not_go_together(fields, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Trainer(config(**fields), data(), show=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder_scale": 0.0}, "decoder_scale must be 1 with unit_decoder, got 0.0"),
        ({"decoder_scale": 0.0, "unit_decoder": False, "select_by_norm": True}, "all scores would be 0"),
        ({"decoder_scale": -1.0, "unit_decoder": False}, "decoder_scale"),
    ],
)
def test_decoder_scales_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_an_unknown_preset():
    with pytest.raises(ValueError, match="preset must be one of 'topk', .* got 'best'"):
        TrainConfig.from_dict({"m": 8, "preset": "best"})


def test_group_max_with_an_auxiliary_width_that_its_groups_do_not_divide():
    rows = []
    Trainer(config("group_max", k=4, k_aux=6, tokens=640), data(), show=False).run(on_log=rows.append)
    assert rows[-1]["step"] == 10


def test_a_coder_that_was_resumed_while_k_falls_exports_the_k_of_its_step(tmp_path):
    trainer = Trainer(config(k_start=20, k_anneal_steps=30, tokens=2560), data(), tmp_path, show=False)
    assert trainer.run(until=11).config.k == Trainer(None, data(), tmp_path, resume=True, show=False).export().config.k


def test_a_run_is_resumed_with_the_fields_that_began_it(tmp_path):
    given = {"m": M, "k": K, "preset": "matryoshka", "batch_size": B, "tokens": 2560, "prefixes": [12, 24]}
    Trainer(TrainConfig.from_dict(given), data(), tmp_path, show=False).run(until=3)
    resumed = Trainer(given, data(), tmp_path, resume=True, show=False)
    assert (resumed.step, resumed.config.form, resumed.config.prefixes) == (3, "matryoshka", "12,24")
    with pytest.raises(ValueError, match="form is 'gated', the run to resume has 'matryoshka'"):
        Trainer(given | {"preset": "gated"}, data(), tmp_path, resume=True, show=False)


def test_inputs_are_centred_where_no_bias_is_subtracted_from_them():
    chosen = config(architecture="crosscoder", tokens=2560)
    assert chosen.resolve(D, None, (12, 12)).centre_input and not config(tokens=2560).resolve(D, None).centre_input
    given = config(architecture="crosscoder", centre_input=False, tokens=2560)
    assert not given.resolve(D, None, (12, 12)).centre_input
    x, dead = data() + 5, []
    for centred in (True, False):
        rows = []
        fields = {"architecture": "crosscoder", "sites": "12,12", "unit_decoder": False, "select_by_norm": True}
        chosen = config("batch_topk", centre_input=centred, tokens=7680, **fields)
        Trainer(chosen, x, show=False).run(on_log=rows.append)
        dead.append(rows[-1]["dead"])
    assert dead[0] < dead[1]
