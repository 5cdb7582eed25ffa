# SPDX-License-Identifier: Apache-2.0
"""Measure a dictionary: reconstruction, what it does to the language model's loss, and what its latents respond to."""

from .language import LossMetrics, logit_effects, loss_recovered, no_next_token
from .latents import ActivationHistograms, nearest_latents
from .metrics import ReconstructionMetrics, measure
from .passages import choose_latents, token_strings, top_passages, write_features
from .recovery import best_cosines, match, mcc, mmcs, pw_mcc
from .report import RunDirError, write_report

__all__ = [
    "ActivationHistograms",
    "LossMetrics",
    "ReconstructionMetrics",
    "RunDirError",
    "best_cosines",
    "choose_latents",
    "logit_effects",
    "loss_recovered",
    "match",
    "mcc",
    "measure",
    "mmcs",
    "nearest_latents",
    "no_next_token",
    "pw_mcc",
    "token_strings",
    "top_passages",
    "write_features",
    "write_report",
]
