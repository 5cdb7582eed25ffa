# SPDX-License-Identifier: Apache-2.0
"""SAEs of SAELens with few active latents, and what runs in a call. For the tests beside this file."""

import copy

import torch
from sae_lens import saes
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from torch.utils._python_dispatch import TorchDispatchMode

import fusae

N, D, M, OUT, K = 72, 20, 320, 12, 4
T = {"apply_b_dec_to_input": False, "d_out": OUT}
INFERENCE = {
    "standard": (saes.StandardSAE, saes.StandardSAEConfig, {}),
    "jumprelu": (saes.JumpReLUSAE, saes.JumpReLUSAEConfig, {}),
    "topk": (saes.TopKSAE, saes.TopKSAEConfig, {"k": K}),
    "topk by norm": (saes.TopKSAE, saes.TopKSAEConfig, {"k": K, "rescale_acts_by_decoder_norm": True}),
    "abstopk": (saes.AbsTopKSAE, saes.AbsTopKSAEConfig, {"k": K, "rescale_acts_by_decoder_norm": True}),
    "gated": (saes.GatedSAE, saes.GatedSAEConfig, {}),
    "transcoder": (saes.Transcoder, saes.TranscoderConfig, T),
    "skip transcoder": (saes.SkipTranscoder, saes.SkipTranscoderConfig, T),
    "jumprelu transcoder": (saes.JumpReLUTranscoder, saes.JumpReLUTranscoderConfig, T),
    "jumprelu skip transcoder": (saes.JumpReLUSkipTranscoder, saes.JumpReLUSkipTranscoderConfig, T),
}
_JUMP = {"jumprelu_init_threshold": 1.5, "jumprelu_bandwidth": 0.2, "l0_coefficient": 0.1}
_WIDTHS = {"k": K, "matryoshka_widths": [16, 80, M]}
TRAINING = {
    "topk": (saes.TopKTrainingSAE, saes.TopKTrainingSAEConfig, {"k": K}),
    "topk, norms free": (
        saes.TopKTrainingSAE, saes.TopKTrainingSAEConfig, {"k": K, "rescale_acts_by_decoder_norm": False},
    ),
    "topk, coo": (
        saes.TopKTrainingSAE, saes.TopKTrainingSAEConfig,
        {"k": K, "rescale_acts_by_decoder_norm": False, "use_sparse_activations": True},
    ),
    "abstopk": (saes.AbsTopKTrainingSAE, saes.AbsTopKTrainingSAEConfig, {"k": K}),
    "batchtopk": (saes.BatchTopKTrainingSAE, saes.BatchTopKTrainingSAEConfig, {"k": K}),
    "batchtopk, norms free": (
        saes.BatchTopKTrainingSAE, saes.BatchTopKTrainingSAEConfig,
        {"k": float(K), "rescale_acts_by_decoder_norm": False},
    ),
    "matryoshka": (saes.MatryoshkaBatchTopKTrainingSAE, saes.MatryoshkaBatchTopKTrainingSAEConfig, _WIDTHS),
    "matryoshka, own aux": (
        saes.MatryoshkaBatchTopKTrainingSAE, saes.MatryoshkaBatchTopKTrainingSAEConfig,
        {**_WIDTHS, "use_matryoshka_aux_loss": True},
    ),
    "standard": (saes.StandardTrainingSAE, saes.StandardTrainingSAEConfig, {"l1_coefficient": 0.3}),
    "standard, L2": (saes.StandardTrainingSAE, saes.StandardTrainingSAEConfig, {"lp_norm": 2.0}),
    "jumprelu": (saes.JumpReLUTrainingSAE, saes.JumpReLUTrainingSAEConfig, {**_JUMP, "pre_act_loss_coefficient": 0.02}),
    "jumprelu, tanh": (
        saes.JumpReLUTrainingSAE, saes.JumpReLUTrainingSAEConfig,
        {**_JUMP, "jumprelu_sparsity_loss_mode": "tanh", "jumprelu_ste_to_input": True},
    ),
    "jumprelu, quadratic": (
        saes.JumpReLUTrainingSAE, saes.JumpReLUTrainingSAEConfig,
        {**_JUMP, "jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 5.0},
    ),
    "gated": (saes.GatedTrainingSAE, saes.GatedTrainingSAEConfig, {"l1_coefficient": 0.3}),
}  # fmt: skip


def data(n=N, seed=1, shape=None):
    return torch.randn(*(shape or (n,)), D, generator=torch.Generator().manual_seed(seed))


def fill(sae, seed=0):
    """Random weights with which pre-activations are about normal, and some one latent in thirty active."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sae.named_parameters():
            value = torch.randn(p.shape, generator=g)
            scale = {"W_enc": D**-0.5, "W_dec": 0.5, "W_skip": 0.3}.get(name, 0.1)
            p.copy_(value * scale)
            if name == "threshold":
                p.copy_(1.9 + 0.1 * value)
            elif (
                name in ("b_enc", "b_gate")
                and type(sae.activation_fn) is torch.nn.ReLU
                and not hasattr(sae, "threshold")
            ):
                p.sub_(2.0)
    return sae


def make(table, name, **options):
    cls, config, given = table[name]
    return fill(cls(config(d_in=D, d_sae=M, **{**given, **options})))


def twin(sae, dtype=None):
    """Another one with the same weights, in the same memory order. (The tool's normalisations are closures over the
    object they were made for, so they do not survive a deepcopy.)"""
    other = type(sae)(copy.deepcopy(sae.cfg))
    for name, p in sae.named_parameters():
        getattr(other, name).data = p.detach().clone()
    for name, b in sae.named_buffers():
        setattr(other, name, b.clone())
    return other if dtype is None else other.to(dtype)


def pair(sae, gradients="correct"):
    """Accelerated, and the tool's own."""
    untouched = twin(sae)
    return fusae.accelerate(sae, gradients), untouched


class Ran(TorchDispatchMode):
    """Names of fusae's raw ops and of dense products that ran in the block."""

    def __init__(self):
        super().__init__()
        self.ops = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.add(func.name())
        return func(*args, **(kwargs or {}))

    @property
    def fused(self):
        return {op.removeprefix("fusae::") for op in self.ops if op.startswith("fusae::")}


def step_input(x, dead=None, sae=None, **coefficients):
    given = {"l1": 0.3, "l0": 0.1, **coefficients}
    return TrainStepInput(x, given, dead, n_training_steps=3, is_logging_step=False)


def some_dead(share=0.3):
    return torch.rand(M, generator=torch.Generator().manual_seed(5)) < share


def trainer(sae, n=N, window=4, **options):
    options = {"lr": 1e-3, "autocast": False, "lr_warm_up_steps": 3, **options}
    config = SAETrainerConfig(
        n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False, total_training_samples=10**6, device="cpu",
        lr_end=1e-4, lr_scheduler_name="constant", adam_beta1=0.9, adam_beta2=0.999, lr_decay_steps=0,
        n_restart_cycles=1, train_batch_size_samples=n, dead_feature_window=window, feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False), **options,
    )  # fmt: skip
    return SAETrainer(config, sae, iter(()))
