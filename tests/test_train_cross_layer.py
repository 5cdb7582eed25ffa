# SPDX-License-Identifier: Apache-2.0
"""A cross-layer transcoder through the trainer: it learns, resumes with the same bits, and is saved for plain rows."""

import json

import pytest
import torch

from fusae.data import collect
from fusae.formats import FormatError
from fusae.formats.native import open_tensors, write_tensors
from fusae.nn import CrossLayerTranscoder, load
from fusae.pipeline.coders import load_coder
from fusae.testing import tiny_lm
from fusae.train import TrainConfig, Trainer, checkpoint

L, D, OUT, M, K, B = 3, 8, 6, 24, 2, 64
SITES = [D] * L + [OUT] * L
FORMS = ("topk", "batch_topk", "relu", "jumprelu")


def data(n=2560, seed=0):
    """Every layer has latents that fire in its input and are written to its target and to later ones; off centre, and
    each part of a row on a scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = [], [torch.zeros(n, OUT) for _ in range(L)]
    for s in range(L):
        chosen = torch.rand(n, M, generator=generator).topk(K, 1).indices
        codes = torch.zeros(n, M).scatter_(1, chosen, 0.5 + torch.rand(n, K, generator=generator))
        inputs.append(codes @ torch.nn.functional.normalize(torch.randn(M, D, generator=generator), dim=1))
        for t in range(s, L):
            targets[t] = targets[t] + codes @ torch.randn(M, OUT, generator=generator)
    return torch.cat([4.0**i * (part + 0.5) for i, part in enumerate([*inputs, *targets])], 1)


def config(form="topk", **fields):
    fields = {"m": M, "k": K, "form": form, "batch_size": B, "lr": 1e-2, "dead_window": 300, "log_every": 10} | fields
    return TrainConfig(architecture="cross_layer", **{"sites": ",".join(map(str, SITES))} | fields)


def fvu(y, target):
    """Mean of the target layers'."""
    parts = zip(y.detach().split(OUT, 1), target.split(OUT, 1), strict=True)
    return float(sum((a - b).square().sum() / (b - b.mean(0)).square().sum() for a, b in parts)) / L


@pytest.mark.parametrize("form", FORMS)
def test_every_form_learns_resumes_and_is_saved(tmp_path, form):
    fields = {"ema": 0.5, "centre_input": True, "tokens": 2560 * 2, "lr": 2e-2}
    if form == "jumprelu":
        fields |= {"preact_coefficient": 1e-3, "sparsity": 1e-3}
    rows, run = data(), tmp_path / "run"
    x, y = rows[:, : L * D], rows[:, L * D :]
    whole = Trainer(config(form, **fields), rows, tmp_path / "whole", show=False)
    coder = whole.run()
    metrics = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["fvu"] < 0.75 * metrics[0]["fvu"], "it should learn"
    assert metrics[-1]["fvu"] == pytest.approx(sum(metrics[-1][f"mse_layer_{t}"] for t in range(L)) / L, rel=0.05)
    assert fvu(coder(x), y) < 0.6
    if form in ("topk", "batch_topk"):
        assert metrics[-1]["l0"] <= L * K
    Trainer(config(form, **fields), rows, run, show=False).run(until=37)
    half, step = load_coder(run)
    assert type(half) is CrossLayerTranscoder and step == 37
    resumed = Trainer(None, rows, run, resume=True, show=False).run()
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in coder.state_dict().items())
    loaded = load(run / "coder")
    assert loaded.config == coder.config and not loaded.training and torch.equal(loaded(x), coder(x))
    if form == "batch_topk":  # of all layers together
        assert loaded.config.joint and all(source.threshold > 0 for source in loaded.sources)
        l0 = sum(float(codes.l0.float().mean()) for codes in loaded.encode(x))
        assert l0 == pytest.approx(L * K, rel=0.1), "the thresholds keep the L0"
    if form == "jumprelu":
        assert all((source.threshold > 0).any() for source in loaded.sources)
    with torch.no_grad():  # export() copies: nothing of the coder in training has changed
        assert torch.equal(whole.export()(x), coder(x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "plain"])
def test_it_is_saved_for_plain_rows(form, scaled, tmp_path):
    free = {"select_by_norm": form in ("topk", "batch_topk"), "unit_decoder": False, "scale_input": scaled}
    rows = data().double() / (1 if scaled else 1000)
    trainer = Trainer(
        config(form, tokens=2560, batch_size=128, centre_input=True, dtype="float64", **free), rows, show=False
    )
    coder = trainer.run()
    inner, at = trainer.coder.eval(), trainer.scaling.apply(rows)
    assert len(trainer.scaling.scales) == 2 * L and len(set(trainer.scaling.scales)) == (2 * L if scaled else 1)
    variances = at[:, L * D :].sub(at[:, L * D :].mean(0)).square().mean(0).view(L, OUT).sum(1)
    torch.testing.assert_close(torch.tensor(trainer.scaling.variance).double(), variances)
    codes = inner.encode(at[:, : L * D])
    y = (inner(at[:, : L * D]) / trainer.scaling.columns()[L * D :]) + trainer.scaling.centre[L * D :]
    out = coder(rows[:, : L * D])
    torch.testing.assert_close(out, y, rtol=1e-8, atol=1e-8)
    for plain, part in zip(coder.encode(rows[:, : L * D]), codes, strict=True):
        assert torch.equal(plain.to_dense() != 0, part.to_dense() != 0), "the same latents are active"


def test_a_batch_top_k_of_every_layer_by_itself():
    rows = data()
    trainer = Trainer(config("batch_topk", joint=False, tokens=2560 * 2, lr=2e-2), rows, show=False)
    coder = trainer.run()
    assert not coder.config.joint and len({float(source.threshold) for source in coder.sources}) == L
    for codes in coder.encode(rows[:, : L * D]):
        assert float(codes.l0.float().mean()) == pytest.approx(K, rel=0.25), "the thresholds keep the L0"
    with pytest.raises(ValueError, match="joint is for architecture 'cross_layer', got 'autoencoder'"):
        TrainConfig(m=M, k=K, form="batch_topk", joint=False)
    with pytest.raises(ValueError, match="joint is False, which form 'topk' does not use; it is for: batch_topk"):
        config("topk", joint=False)


def test_annealing_dead_latents_and_the_first_loss():
    rows = data()
    trainer = Trainer(config(tokens=2560, k_start=6, k_anneal_steps=20, dead_window=128), rows, show=False)
    first = trainer.train_step(rows[:B])
    assert first.codes.values.shape == (B, L * 6) and first.codes.m == L * M
    assert trainer.dead.tokens_since_fired.shape == (L * M,)
    metrics = []
    trainer.run(on_log=metrics.append)
    assert metrics[-1]["k"] == K and trainer.coder.sources[2].config.k == K
    assert trainer.export().config.k == K and metrics[-1]["dead"] > 0 and metrics[-1]["aux_loss"] > 0
    for source in trainer.coder.sources:
        torch.testing.assert_close(source.W_dec.norm(dim=1), torch.ones(M))


@pytest.mark.parametrize(
    "fields",
    [{"dtype": "bfloat16"}, {"optimizer": "masked", "clip_norm": 1.0}, {"form": "relu", "unit_decoder": False}],
)
def test_choices_of_a_run(fields):
    metrics = []
    coder = Trainer(config(tokens=2560, **fields), data(), show=False).run(on_log=metrics.append)
    assert metrics[-1]["fvu"] < metrics[0]["fvu"] and coder.b_dec.dtype == torch.float32
    assert (metrics[-1]["grad_norm"] is not None) == ("clip_norm" in fields)


def test_one_layer_trains_as_a_transcoder():
    rows = data()[:, [*range(D), *range(L * D, L * D + OUT)]].double()
    shared = {
        "m": M,
        "k": K,
        "batch_size": B,
        "tokens": 1280,
        "lr": 3e-3,
        "dtype": "float64",
        "dead_window": 128,
        "k_aux": 4,
    }
    one, other = (
        Trainer(TrainConfig(architecture=a, sites=f"{D},{OUT}", **shared), rows, show=False)
        for a in ("cross_layer", "transcoder")
    )
    one, other = one.run().state_dict(), other.run().state_dict()
    torch.testing.assert_close(one.pop("b_dec")[0], other.pop("b_dec"), rtol=1e-8, atol=1e-10)
    ours = {name.removeprefix("sources.0."): value for name, value in one.items()}
    # Other conventions of folding: the codes on the one side are those of scaled rows.
    scale = ours["b_enc"].norm() / other["b_enc"].norm()
    torch.testing.assert_close(ours["W_enc"] / scale, other["W_enc"], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(ours["W_dec"] * scale, other["W_dec"], rtol=1e-8, atol=1e-10)


def test_the_layers_of_a_model(tmp_path):
    model = tiny_lm.llama(layers=2)
    sites = [f"model.layers.{layer}.mlp{side}" for side in (":in", "") for layer in range(2)]
    chunks = torch.randint(1, 257, (40, 66), generator=torch.Generator().manual_seed(0)).numpy()
    rows = collect(model, chunks, sites, tmp_path / "rows", dtype="float32", progress=False)
    fields = {"m": 64, "k": 8, "batch_size": 128, "tokens": 128 * 60, "lr": 1e-2, "dead_window": 2000}
    coder = Trainer(TrainConfig(architecture="cross_layer", **fields), rows, show=False).run()
    assert (coder.config.layers, coder.config.d, coder.config.target_width) == (2, tiny_lm.D, tiny_lm.D)
    x, y = rows.take(slice(0, 2000)).split(2 * tiny_lm.D, 1)
    for out, target in zip(coder(x).detach().split(tiny_lm.D, 1), y.split(tiny_lm.D, 1), strict=True):
        assert (out - target).square().sum() < 0.85 * (target - target.mean(0)).square().sum()


def test_a_damaged_checkpoint(tmp_path):
    Trainer(config(tokens=1280), data(), tmp_path, show=False).run(until=5)
    path = tmp_path / checkpoint.NAME
    file, about = open_tensors(path, "")
    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for variance in (1.0, [1.0, 1.0], [1.0, 1.0, 0.0]):
        write_tensors(path, tensors, about | {"variance": variance})
        with pytest.raises(FormatError, match="'variance' must be"):
            Trainer(None, data(), tmp_path, resume=True, show=False)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"form": "gated"}, "form must be one of 'topk', .* with architecture 'cross_layer', got 'gated'"),
        ({"multi_topk": 0.1}, "multi_topk must be 0 with architecture 'cross_layer', got 0.1"),
        ({"sites": "8,8,8,6,12"}, r"sites must be the widths of the inputs .* got \[8, 8, 8, 6, 12\]"),
        ({"sites": "8,8,8,6,6,5,1"}, "sites must be the widths of the inputs"),
        ({"sites": "8,8,8,6,5,7"}, "sites must be the widths of the inputs"),
        ({"sites": None}, r"sites must be the widths of the inputs .* got \[42\]"),
    ],
)
def test_fields_that_do_not_go_together(fields, message):
    with pytest.raises(ValueError, match=message):
        Trainer(config(**fields), data(), show=False)
