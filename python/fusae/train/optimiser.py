# SPDX-License-Identifier: Apache-2.0
"""What a configuration says about optimiser and precision, and what comes of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .._pages import large_pages
from ..nn import CrossLayerTranscoder, SparseCoder
from ..optim import MOMENTS, Adam
from .forms import new_coder

if TYPE_CHECKING:
    from .config import TrainConfig

__all__ = ["MOMENTS", "check_optimiser", "new_optimizer", "new_training_coder", "optimizer_options",
           "stepping_early", "steps_early"]  # fmt: skip

MATRICES = ("W_enc", "W_dec")
_DECODER_READ_ONCE = ("topk", "abs", "group_max", "batch_topk", "matryoshka", "hierarchical")


def check_optimiser(config: TrainConfig) -> None:
    """Raises `ValueError` for fields that do not go together."""
    if config.optimizer == "lazy" and config.beta1:
        raise ValueError(
            f"beta1 must be 0 with optimizer 'lazy', got {config.beta1}: with momentum a latent moves on after it "
            "fired; take optimizer 'masked' or 'dense' for that"
        )
    if config.weights != "float32" and config.dtype != "bfloat16":
        raise ValueError(f"weights {config.weights!r} need dtype 'bfloat16', got {config.dtype!r}")
    if config.weights != "float32" and config.ema:
        raise ValueError(f"ema must be 0 with weights {config.weights!r} (too coarse for its steps), got {config.ema}")
    if config.dtype == "float64" and config.moments != "float32":
        raise ValueError(f"moments must be 'float32' (float64, then) with dtype 'float64', got {config.moments!r}")


def new_training_coder(
    config: TrainConfig, m: int | None = None, *, seed: int | None = 0, device: torch.device | str | None = None
) -> SparseCoder | CrossLayerTranscoder:
    """The coder that is trained, its matrices in the dtype of `config.weights`, its vectors in float32."""
    if config.weights == "float32":
        return new_coder(config, m, seed=seed, device=device, sparse_grad=True)
    coder = new_coder(config, m, seed=None, device=device, sparse_grad=True)  # uninitialised: takes no memory yet
    for module in coder.modules():
        for name in MATRICES:
            if isinstance(weight := getattr(module, name, None), nn.Parameter):
                setattr(module, name, nn.Parameter(large_pages(torch.empty_like(weight.data, dtype=torch.bfloat16))))
    if seed is not None:
        coder.tied_init_(seed)
    return coder


def optimizer_options(config: TrainConfig) -> list[dict[str, Any]]:
    """Options of `Adam` for encoder rows, decoder rows and all else."""
    unit, seed = config.unit_decoder, None
    if config.moments != "float32" or config.weights == "bfloat16":
        seed = config.seed
    rows = {
        "masked": config.optimizer == "masked", "lazy": config.optimizer == "lazy", "moments": config.moments,
        "master": config.weights == "bfloat16_master", "seed": seed,
    }  # fmt: skip
    return [rows, {**rows, "project": unit, "renormalise": unit}, {}]


def new_optimizer(coder: SparseCoder | CrossLayerTranscoder, config: TrainConfig) -> Adam:
    named, (encoder, decoder, rest) = list(coder.named_parameters()), optimizer_options(config)
    groups = [
        {"params": [p for name, p in named if name.endswith("W_enc")], **encoder},
        {"params": [p for name, p in named if name.endswith("W_dec")], **decoder},
        {"params": [p for name, p in named if not name.endswith(MATRICES)], **rest},
    ]
    return Adam(groups, config.lr, (config.beta1, config.beta2), config.eps)


def steps_early(config: TrainConfig) -> bool:
    """Whether decoder rows are stepped as soon as their gradient is there, before the encoder has one: not where the
    norm of all gradients is wanted first, nor where the backward pass reads the decoder again."""
    return config.clip_norm is None and config.form in _DECODER_READ_ONCE


@contextlib.contextmanager
def stepping_early(
    coder: SparseCoder | CrossLayerTranscoder, optimizer: Adam, config: TrainConfig
) -> Iterator[None]:
    """Around a backward pass; see `steps_early`. The gradients of decoder and encoder are the largest passing tensors
    of a step: so they are not there at the same time."""
    handles = [
        param.register_post_accumulate_grad_hook(optimizer.step_one)
        for name, param in (coder.named_parameters() if steps_early(config) else ())
        if name.endswith("W_dec")
    ]
    try:
        yield
    finally:  # not kept: a coder with hooks would hold on to its optimiser, and step when others train it
        for handle in handles:
            handle.remove()
