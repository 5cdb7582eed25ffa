# SPDX-License-Identifier: Apache-2.0
"""sparsify's own `Trainer.fit` and optimiser with fusae under them, beside themselves without."""

import copy

import pytest
import torch

import fusae

pytest.importorskip("sparsify", reason="eai-sparsify is not installed (the extra [integrations])")
from datasets import Dataset  # noqa: E402
from schedulefree import ScheduleFreeWrapper  # noqa: E402
from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer  # noqa: E402
from sparsify.sign_sgd import SignSGD  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

STEPS, BATCH = 12, 4


def _fit(folder, how, **options):
    """Losses of every step, and the trained coders. `how`: 'coders' or 'trainer' is accelerated, or None."""
    options.setdefault("lr", 1e-3)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=2, n_head=2))
    tokens = torch.randint(50, (STEPS * BATCH, 16), generator=torch.Generator().manual_seed(0))
    data = Dataset.from_dict({"input_ids": tokens.tolist()}).with_format("torch")
    coder = {name: options.pop(name) for name in ("multi_topk", "transcode", "skip_connection") if name in options}
    config = TrainConfig(
        SparseCoderConfig(num_latents=192, k=4, **coder), batch_size=BATCH, layers=[0, 1], log_to_wandb=False,
        save_dir=str(folder), run_name="run", **options,
    )  # fmt: skip
    trainer = Trainer(config, data, model)
    if how == "trainer":
        assert fusae.accelerate(trainer, gradients="tool") is trainer
    elif how == "coders":
        for sae in trainer.saes.values():
            fusae.accelerate(sae, gradients="tool")
    losses = []
    reduce = trainer.maybe_all_reduce
    trainer.maybe_all_reduce = lambda x, op="mean": (losses.append(float(x)) if x.ndim == 0 else None, reduce(x, op))[1]
    trainer.fit()
    return torch.tensor(losses), trainer


@pytest.mark.parametrize("how", ["trainer", "coders"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"auxk_alpha": 0.1, "dead_feature_threshold": 100, "multi_topk": True, "micro_acc_steps": 2},
        {"optimizer": "adam", "lr_warmup_steps": 2, "grad_acc_steps": 2},
        {"transcode": True, "skip_connection": True},
        {"loss_fn": "ce"},
    ],
    ids=["plain", "auxk", "adam", "transcode", "ce"],
)
def test_fit_gives_the_same_losses(tmp_path, options, how):
    if how == "coders" and "auxk_alpha" not in options:
        pytest.skip("the trainer's case covers it: only the optimiser differs")
    wanted, plain = _fit(tmp_path / "plain", None, **options)
    losses, trainer = _fit(tmp_path / "fused", how, **options)
    assert len(losses) >= STEPS and losses.isfinite().all()
    torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=1e-4)
    for name, sae in trainer.saes.items():
        loaded = SparseCoder.load_from_disk(tmp_path / "fused" / "run" / name)
        other = SparseCoder.load_from_disk(tmp_path / "plain" / "run" / name)
        assert type(loaded) is SparseCoder and list(loaded.state_dict()) == list(plain.saes[name].state_dict())
        for a, b in zip(loaded.parameters(), other.parameters(), strict=True):
            assert (a - b).norm() <= 0.02 * b.norm() + 1e-6
        assert type(sae) is not SparseCoder


def test_k_may_change_every_step(tmp_path):
    """It begins at all latents here, half of them at 0, where the tool's gradients depend on ties in torch.topk."""
    losses, trainer = _fit(tmp_path, "trainer", k_decay_steps=STEPS - 3, optimizer="adam", lr_warmup_steps=2)
    assert losses.isfinite().all() and all(sae.cfg.k == 4 for sae in trainer.saes.values())


def test_a_run_goes_on_from_the_tools_checkpoint(tmp_path):
    _, trainer = _fit(tmp_path, "trainer")
    state = {name: sae.state_dict() for name, sae in copy.deepcopy(trainer.saes).items()}
    trainer.load_state(str(tmp_path / "run"))
    assert trainer.global_step == STEPS
    opened = {name: sae.state_dict() for name, sae in trainer.saes.items()}
    assert opened.keys() == state.keys()
    fusae.restore(trainer)
    assert all(type(sae) is SparseCoder for sae in trainer.saes.values())
    assert type(trainer.optimizers[0]) is ScheduleFreeWrapper


class _Holder:
    def __init__(self, optimizer):
        self.optimizer = optimizer


@pytest.mark.parametrize("shape", [(5,), (3, 4), (3000, 800)])
def test_schedule_free_sign_steps_are_the_tools(shape):
    finals = []
    for fast in (False, True):
        g = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(shape, generator=g))
        unused = torch.nn.Parameter(torch.zeros(2))
        optimizer = ScheduleFreeWrapper(SignSGD([p, unused], lr=0.01), momentum=0.95)
        if fast:
            fusae.accelerate(_Holder(optimizer))
            assert "ScheduleFreeWrapper on fusae: step" in fusae.explain(_Holder(optimizer))
        optimizer.train()
        for i in range(8):
            optimizer.param_groups[0]["lr"] = 0.01 * (i + 1)
            p.grad = torch.randn(shape, generator=g).relu()  # half of it is 0
            optimizer.step()
        y = p.detach().clone()
        optimizer.eval()
        finals.append((y, p.detach().clone(), optimizer.state[p]["z"], optimizer.state_dict()["param_groups"]))
        with pytest.raises(Exception, match="not in train mode"):
            optimizer.step()
    *tensors, groups = zip(*finals, strict=True)
    for a, b in tensors:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert groups[0] == groups[1]


def test_another_optimiser_inside_is_left_alone():
    p = torch.nn.Parameter(torch.zeros(2))
    held = _Holder(ScheduleFreeWrapper(torch.optim.SGD([p], lr=0.1), momentum=0.9))
    assert fusae.explain(held) == "optimizer: ScheduleFreeWrapper left as it is: it wraps SGD, not SignSGD"
    held = _Holder(ScheduleFreeWrapper(SignSGD([p]), momentum=0.9, weight_decay_at_y=0.1))
    assert fusae.explain(held) == "optimizer: ScheduleFreeWrapper left as it is: it decays weights"
