# SPDX-License-Identifier: Apache-2.0
"""dictionary_learning's own `trainSAE` and trainers with fusae under them, beside themselves without."""

import copy
import json

import pytest
import torch

import fusae
from fusae.testing.compare import assert_grads

pytest.importorskip("dictionary_learning", reason="dictionary_learning is not installed (the extra [integrations])")
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer  # noqa: E402
from dictionary_learning.trainers.gdm import GatedSAETrainer  # noqa: E402
from dictionary_learning.trainers.jumprelu import JumpReluTrainer  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer  # noqa: E402
from dictionary_learning.trainers.standard import StandardTrainer  # noqa: E402
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer  # noqa: E402
from dictionary_learning.training import log_stats, trainSAE  # noqa: E402
from dictionary_learning.utils import load_dictionary  # noqa: E402

N, D, M, K = 64, 24, 192, 5
SPARSE = {
    "topk": (TopKTrainer, {"k": K}),
    "batch": (BatchTopKTrainer, {"k": K}),
    "matryoshka": (
        MatryoshkaBatchTopKTrainer,
        {"k": K, "group_fractions": [0.125, 0.375, 0.5], "group_weights": [0.5, 0.3, 0.2]},
    ),
}
DENSE = {
    "standard": (StandardTrainer, {"sparsity_warmup_steps": 5}),
    "gated": (GatedSAETrainer, {"sparsity_warmup_steps": 5}),
    "jumprelu": (JumpReluTrainer, {"sparsity_warmup_steps": 5}),
}
COMMON = {
    "steps": 200, "activation_dim": D, "dict_size": M, "layer": 0, "lm_name": "none", "warmup_steps": 3, "seed": 0,
    "device": "cpu", "lr": 1e-3,
}  # fmt: skip


def _batches(steps):
    g = torch.Generator().manual_seed(0)
    directions = torch.randn(60, D, generator=g)
    for _ in range(steps):
        codes = torch.rand(N, 60, generator=g) * (torch.rand(N, 60, generator=g) < 0.08)
        yield codes @ directions + 0.3 + 0.01 * torch.randn(N, D, generator=g)


def _trainer(name, **more):
    cls, options = {**SPARSE, **DENSE}[name]
    torch.manual_seed(0)
    trainer = cls(**{**COMMON, **options, **more})
    if name in SPARSE:
        trainer.dead_feature_threshold = 2 * N  # some latents die within the test
    return trainer


def _run(trainer, steps=100):
    return torch.tensor([float(trainer.update(i, x.clone()) or 0.0) for i, x in enumerate(_batches(steps))])


@pytest.mark.parametrize("how", ["trainer", "dictionary"])
@pytest.mark.parametrize("name", [*SPARSE, *DENSE])
def test_a_hundred_steps_are_the_same(name, how):
    plain, fused = (_trainer(name, **({"threshold_start_step": 20} if name in SPARSE else {})) for _ in range(2))
    fusae.accelerate(fused if how == "trainer" else fused.ae, gradients="tool")
    wanted, losses = _run(plain), _run(fused)
    torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=1e-4)
    for a, b in zip(fused.ae.state_dict().values(), plain.ae.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    if name in SPARSE:
        assert wanted[-1] < wanted[0]
        assert torch.equal(fused.num_tokens_since_fired, plain.num_tokens_since_fired)
        assert fused.dead_features == plain.dead_features > 0
        for key, value in plain.get_logging_parameters().items():
            torch.testing.assert_close(torch.as_tensor(fused.get_logging_parameters()[key]), torch.as_tensor(value),
                                       rtol=1e-3, atol=1e-3)  # fmt: skip
    states = [trainer.optimizer.state_dict() for trainer in (fused, plain)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for one, other in zip(states[0]["state"].values(), states[1]["state"].values(), strict=True):
        assert one.keys() == other.keys()
        assert float(one["step"]) == float(other["step"]) and one["exp_avg"].shape == other["exp_avg"].shape


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("name", SPARSE)
def test_gradients_of_a_loss(name, dead):
    """Beside the tool in float32, against the tool in float64: its losses are right, 'tool' and 'correct' are one."""
    grads, x = [], next(_batches(1))
    for fast, dtype in ((True, torch.float32), (False, torch.float32), (False, torch.float64)):
        trainer = _trainer(name)
        with torch.no_grad():
            for key, p in trainer.ae.named_parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(key))) / 8)
        trainer.ae.to(dtype)
        if dead:
            trainer.num_tokens_since_fired[::3] = 10**9
        if fast:
            fusae.accelerate(trainer)
        trainer.loss(x.to(dtype), step=0).backward()
        assert (trainer.dead_features > 0) is dead
        grads.append({key: p.grad for key, p in trainer.ae.named_parameters()})
    for key in grads[0]:
        a, r, o = [g[key] if g[key].ndim > 1 else g[key][:, None] for g in grads]
        if key == "decoder.weight":
            a, r, o = a.T, r.T, o.T
        assert_grads(a, r, o, f"{name} {key}")


@pytest.mark.parametrize("name", SPARSE)
def test_what_is_logged(name, monkeypatch):
    logs = []
    for fast in (False, True):
        trainer = _trainer(name)
        if fast:
            fusae.accelerate(trainer)
        _run(trainer, 15)

        class Queue:
            put = logs.append

        log_stats([trainer], 15, next(_batches(1)), False, False, log_queues=[Queue])
        out = trainer.loss(next(_batches(1)), step=15, logging=True)
        assert out.f.shape == (N, M) and type(out).__name__ == "LossLog"
    assert logs[0].keys() == logs[1].keys() and len(logs[0]) > 6
    for key in logs[0]:
        assert logs[1][key] == pytest.approx(logs[0][key], rel=1e-3, abs=1e-4), key


@pytest.mark.parametrize("how", ["trainer", "dict_class"])
def test_train_sae(tmp_path, how):
    losses, folders = {}, {}
    for fast in (False, True):

        def make(fast=fast, **config):
            cls = TopKTrainer
            if fast and how == "trainer":
                cls = fusae.accelerate(cls)
            elif fast:
                config["dict_class"] = fusae.accelerate(AutoEncoderTopK)
            trainer = cls(**config)
            update = trainer.update
            trainer.update = lambda step, x: losses.setdefault(fast, []).append(update(step, x))
            return trainer

        folders[fast] = tmp_path / str(fast)
        trainSAE(
            data=_batches(120), trainer_configs=[{"trainer": make, "k": K, **COMMON}], steps=100, device="cpu",
            save_dir=str(folders[fast]), save_steps=[50], normalize_activations=False,
        )  # fmt: skip
    torch.testing.assert_close(torch.tensor(losses[True]), torch.tensor(losses[False]), rtol=1e-4, atol=1e-4)
    assert len(losses[True]) == 100
    loaded = [load_dictionary(str(folders[fast] / "trainer_0"), "cpu") for fast in (False, True)]
    assert loaded[0][1] == loaded[1][1] == json.loads((folders[True] / "trainer_0" / "config.json").read_text())
    assert type(loaded[1][0]) is AutoEncoderTopK
    x = next(_batches(1))
    torch.testing.assert_close(loaded[0][0](x), loaded[1][0](x), rtol=1e-3, atol=1e-3)
    assert (folders[True] / "trainer_0" / "checkpoints" / "ae_50.pt").exists()


@pytest.mark.parametrize("name", SPARSE)
def test_in_the_middle_of_a_run_and_back(name):
    """Moments that are there already go on in another layout, and back."""
    plain, fused = _trainer(name), _trainer(name)
    for start, change in ((0, lambda t: t), (4, fusae.accelerate), (8, fusae.restore), (12, fusae.accelerate)):
        change(fused)
        for i, x in enumerate(_batches(4), start):
            wanted, loss = plain.update(i, x.clone()), fused.update(i, x.clone())
            assert loss == pytest.approx(wanted, rel=1e-4)
    assert type(fusae.restore(fused)) is type(plain) and type(fused.ae) is type(plain.ae)
    for p in fused.ae.parameters():
        assert fused.optimizer.state[p]["exp_avg"].shape == p.shape


def test_another_optimiser_and_a_dictionary_that_was_not_accelerated():
    plain, fused = _trainer("topk"), fusae.accelerate(_trainer("topk"))
    for trainer in (plain, fused):
        trainer.optimizer = torch.optim.SGD(trainer.ae.parameters(), lr=1e-3, momentum=0.9)
    torch.testing.assert_close(_run(fused, 5), _run(plain, 5), rtol=1e-5, atol=1e-5)
    plain, fused = _trainer("topk"), fusae.accelerate(_trainer("topk"))
    fusae.restore(fused.ae)
    torch.testing.assert_close(_run(fused, 5), _run(plain, 5))


def test_explain():
    trainer = fusae.accelerate(_trainer("topk"))
    assert fusae.explain(trainer).splitlines() == [
        "(model): TopKTrainer on fusae: loss, get_auxiliary_loss, update (gradients 'correct')",
        "ae: AutoEncoderTopK on fusae: encode, decode, forward (gradients 'correct')",
    ]
    assert fusae.explain(_trainer("gated")).splitlines() == [
        "(model): GatedSAETrainer left as it is: its loss is of dense activations; its dictionary can run on fusae",
        "ae: GatedAutoEncoder can run on fusae",
    ]
    twin = copy.deepcopy(trainer)
    assert type(twin) is type(trainer)
