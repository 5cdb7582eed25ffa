# SPDX-License-Identifier: Apache-2.0
"""Decoder rows that are stepped while the backward pass goes on: the same bits, half the gradients at a time."""

import gc
import weakref

import pytest
import torch

from fusae.optim import Adam
from fusae.train import TrainConfig, Trainer
from fusae.train import optimiser as setup

FORMS = ["topk", "abs", "group_max", "batch_topk", "matryoshka", "hierarchical", "relu", "jumprelu", "gated"]
SITES = {"transcoder": "6,6", "crosscoder": "6,6", "cross_layer": "3,3,3,3"}


def run(**fields):
    x = torch.randn(320, 12, generator=torch.Generator().manual_seed(0)) + 1
    config = TrainConfig(m=48, k=4, batch_size=32, dead_window=64, device="cpu", lr=1e-2, **fields)
    trainer = Trainer(config, x, show=False)
    trainer.run()
    return trainer


@pytest.mark.parametrize("fields", [
    *({"form": form} for form in FORMS),
    {"multi_topk": 0.1, "moments": "8bit"}, {"select_by_norm": True, "unit_decoder": False, "form": "batch_topk"},
    {"optimizer": "masked", "clip_norm": 0.1}, {"dtype": "bfloat16", "ema": 0.5},
    *({"architecture": name, "sites": sites} for name, sites in SITES.items()),
    {"architecture": "cross_layer", "sites": SITES["cross_layer"], "form": "batch_topk"},
], ids=str)  # fmt: skip
def test_the_bits_are_those_of_one_step_after_the_backward_pass(monkeypatch, fields):
    early = run(**fields)
    assert all(p.grad is None for p in early.coder.parameters())
    monkeypatch.setattr(setup, "steps_early", lambda config: False)
    late = run(**fields)
    for (name, a), b in zip(early.coder.named_parameters(), late.coder.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert early.optimizer.state[a]["step"] == late.optimizer.state[b]["step"] == 10


def test_the_two_large_gradients_are_never_there_together(monkeypatch):
    seen, update = [], Adam._update

    def look(self, param, group, number):
        large = [p for g in self.param_groups for p in g["params"] if p.ndim == 2]
        seen.append(sum(p.grad is not None for p in large))
        return update(self, param, group, number)

    monkeypatch.setattr(Adam, "_update", look)
    run()
    assert max(seen) == 1
    run(clip_norm=1.0)
    assert max(seen) == 2, "their joint norm is wanted first"


def test_a_trained_coder_is_let_go_and_has_gradients_like_any_other():
    trainer = run()
    coder, optimizer = trainer.export(), weakref.ref(trainer.optimizer)
    gc.disable()
    try:
        del trainer
        assert optimizer() is None, "memory of a wide dictionary must not wait for the garbage collector"
    finally:
        gc.enable()
    coder(torch.randn(4, 12)).sum().backward()
    assert coder.W_dec.grad is not None


def test_step_one_wants_a_parameter_of_its_own():
    param, other = torch.zeros(2, 2).requires_grad_(), torch.zeros(2, 2).requires_grad_()
    with pytest.raises(ValueError, match="param must be one of this optimiser's"):
        Adam([param]).step_one(other)
