# SPDX-License-Identifier: Apache-2.0
"""fusae: fused sparse autoencoders.

Notation: n rows (tokens), d model width, m latents, k active per row. Weights are ``[m, d]``, row = latent.
"""

import importlib.metadata

import torch as _torch  # noqa: F401  (first: its OpenMP runtime must be the only one in the process)

from ._dispatch import BackendError, backend
from .codes import SparseCodes
from .formats import load
from .hooks import hook
from .info import explain
from .integrations import accelerate, restore
from .ops import (
    DecodeLoss,
    adam_rows_,
    codes_from_dense,
    decode,
    decode_loss,
    encode_batch_topk,
    encode_threshold,
    encode_topk,
    topk,
)

__version__ = importlib.metadata.version("fusae")

__all__ = [
    "BackendError",
    "DecodeLoss",
    "SparseCodes",
    "accelerate",
    "adam_rows_",
    "backend",
    "codes_from_dense",
    "decode",
    "decode_loss",
    "encode_batch_topk",
    "encode_threshold",
    "encode_topk",
    "explain",
    "hook",
    "load",
    "restore",
    "topk",
]
