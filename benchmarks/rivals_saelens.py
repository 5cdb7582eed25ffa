# SPDX-License-Identifier: Apache-2.0
"""SAELens beside itself with fusae under it: a step of its own trainer, and a JumpReLU dictionary at inference.

A step is `SAETrainer.step`: forward, statistics, backward, clipping of the gradient norm, Adam. "sae":
`fusae.accelerate(sae)`; "trainer": `fusae.accelerate(trainer)`, whose Adam then runs in one pass over memory.
"""

from __future__ import annotations

from typing import Any

import torch
from rivals_run import besides_gemm, main
from sae_lens import saes
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

import fusae
from fusae.testing.bench_inputs import over
from fusae.testing.workloads import Build, Call, Inputs


def _filled(sae: Any, inputs: Inputs) -> Any:
    with torch.no_grad():
        for name, value in (("W_enc", inputs.W_enc.T), ("W_dec", inputs.W_dec), ("b_dec", inputs.b_dec)):
            getattr(sae, name).copy_(value)
    return sae


def _trainer(sae: Any, n: int, window: int) -> SAETrainer:
    return SAETrainer(
        SAETrainerConfig(
            n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False, total_training_samples=10**9,
            device="cpu", autocast=False, lr=3e-4, lr_end=3e-5, lr_scheduler_name="constant", lr_warm_up_steps=0,
            adam_beta1=0.9, adam_beta2=0.999, lr_decay_steps=0, n_restart_cycles=1, train_batch_size_samples=n,
            dead_feature_window=window, feature_sampling_window=2000, logger=LoggingConfig(log_to_wandb=False),
        ),
        sae, iter(()),
    )  # fmt: skip


def _step(how: str, architecture: str = "TopK", window: int = 1000, **options: Any) -> Build:
    def build(inputs: Inputs, k: int, backend: str) -> Call:
        m, d = inputs.W_enc.shape
        if "widths" in options:
            given = {"matryoshka_widths": [m // share for share in options["widths"]]}
        else:
            given = options
        config = getattr(saes, f"{architecture}TrainingSAEConfig")(d_in=d, d_sae=m, k=k, **given)
        trainer = _trainer(
            _filled(getattr(saes, f"{architecture}TrainingSAE")(config), inputs), len(inputs.xs[0]), window
        )
        if how != "tool":
            fusae.accelerate(trainer.sae if how == "sae" else trainer)
        if window == 0:  # every latent that did not fire in the last step is dead
            trainer.step(inputs.xs[0])
        return over(inputs.xs, trainer.step)

    return build


def _jumprelu(how: str, what: str) -> Build:
    """About k active latents a row."""

    def build(inputs: Inputs, k: int, backend: str) -> Call:
        m, d = inputs.W_enc.shape
        sae = _filled(saes.JumpReLUSAE(saes.JumpReLUSAEConfig(d_in=d, d_sae=m)), inputs)
        with torch.no_grad():
            pre = (inputs.xs[0][:64] - sae.b_dec) @ sae.W_enc
        sae.threshold.data.fill_(float(pre.flatten().kthvalue(pre.numel() - 64 * k).values))
        sae.requires_grad_(False)
        if how == "sae":
            fusae.accelerate(sae)
        return over(inputs.xs, getattr(sae, what))

    return build


def _beside(build: Any, *args: Any, trainer: bool = True, **options: Any) -> dict[str, Build]:
    hows = {"SAELens": "tool", "SAELens + fusae (sae)": "sae", "SAELens + fusae (trainer)": "trainer"}
    return {name: build(how, *args, **options) for name, how in hows.items() if trainer or how != "trainer"}


CONTENDERS = besides_gemm({
    "train_step": _beside(_step),
    "auxk_step": _beside(_step, window=0),
    "batchtopk_step": _beside(_step, "BatchTopK"),
    "matryoshka_step": _beside(_step, "MatryoshkaBatchTopK", widths=(8, 4, 1)),
    "jumprelu_forward": _beside(_jumprelu, "forward", trainer=False),
    "jumprelu_encode": _beside(_jumprelu, "encode", trainer=False),
})  # fmt: skip

if __name__ == "__main__":
    main("rivals_saelens")
