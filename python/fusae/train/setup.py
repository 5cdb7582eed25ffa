# SPDX-License-Identifier: Apache-2.0
"""What a trainer is put together from: device, batches, optimiser, and a trial of the ops."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from ..nn import Moment
from ..nn.objectives.nested import nested_terms
from .config import TrainConfig
from .feed import Feed
from .forms import objective, prefixes_of
from .optimiser import new_optimizer, new_training_coder, stepping_early


def open_batches(config: TrainConfig, source: Any) -> tuple[Any, TrainConfig]:
    """The batches of a source of rows, and the configuration resolved with what the source tells."""
    every = config.tokens is not None
    seed = config.seed if config.data_seed is None else config.data_seed
    options = {} if config.shuffle_rows is None else {"shuffle_rows": config.shuffle_rows}
    if options and source.shape[0] is None:
        raise ValueError("shuffle_rows is for rows on disk; a stream mixes as many as its buffer_rows")
    batches = source.batches(config.batch_size, seed, None if every else config.epochs, **options)
    length = None if every else _length(batches)
    per_epoch = None if length is None else length // config.epochs * config.batch_size
    return batches, config.resolve(int(source.shape[1]), per_epoch, _sites(source))


def new_feed(config: TrainConfig, batches: Any, device: torch.device) -> Feed:
    """The checked batches of a resolved configuration, made ready by a thread."""
    return Feed(
        batches, config.batch_size, config.d, nonfinite=config.nonfinite, ahead=config.prefetch,
        pin=device.type == "cuda",
    )  # fmt: skip


def _length(batches: Any) -> int | None:
    try:
        return len(batches)
    except TypeError:
        return None


def _sites(source: Any) -> tuple[int, ...] | None:
    """Widths of the parts of a row, where the data say of which they are made."""
    sites = getattr(source, "sites", None)
    return tuple(site["width"] for site in sites) if sites else None


def autocast(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")


def try_ops(config: TrainConfig, device: torch.device) -> list[str]:
    """One step with as few latents as will do: a backend that was asked for and cannot run an op says so here.

    Returns the names of the further terms of the loss."""
    m = -(-max(config.k, config.k_aux) // config.k) * config.k  # whole groups, for a group_max
    coder = new_training_coder(config, m, device=device)
    asks = config.k_aux or config.preact_coefficient
    dead = torch.ones(config.layers * m, dtype=torch.bool, device=device) if asks else None
    x, target = (coder.b_dec.new_ones(2, width) for width in (config.input_width, coder.b_dec.numel()))
    with autocast(config, device):
        result = objective(config, m)(coder, x, target, Moment(dead, variance=1.0))
    optimizer = new_optimizer(coder, config)
    with stepping_early(coder, optimizer, config):
        result.loss.backward()
    optimizer.step()
    if config.form == "matryoshka":  # named by its prefixes, which were cut to the few latents here
        return list(nested_terms(prefixes_of(config), torch.zeros(len(prefixes_of(config)))))
    return list(result.terms)


def device_of(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:<number>', got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch sees no GPU here; use 'cpu' or 'auto'")
    return device
