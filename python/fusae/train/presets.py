# SPDX-License-Identifier: Apache-2.0
"""Published recipes, as fields of a `TrainConfig`. What is given beside a preset wins.

Coefficients are those of the publications for data of unit mean squared norm and squared errors summed over d, which
`scale_input` brings about (it scales to unit mean squared distance from the mean). Numbers that depend on the length of
a run are left to the defaults, which agree with the publications in runs of many thousand steps: 1000 steps of warm-up,
dead after 10,000,000 tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Preset(NamedTuple):
    """A recipe: what it is, where it was published, and its fields."""

    what: str
    source: str
    fields: dict[str, Any]


# sparsify's for transcoders: decoder rows that start at 0 and are free. Unit rows in random directions start with more
# error than the mean of the outputs, and the encoder's answer to that is to fall silent: latents die.
_FREE = {"unit_decoder": False, "decoder_scale": 0.0}

PRESETS = {
    "topk": Preset(
        "top-k with AuxK and averaged weights",
        "Gao et al. 2024, arXiv:2406.04093, and the code released with it",
        {
            "form": "topk", "aux_coefficient": 1 / 32, "eps": 6.25e-10,
            "warmup_steps": 0, "decay": 0.0, "ema": 0.999, "unit_decoder": True, "lr": 1e-4,
        },
    ),
    "topk-dictionary-learning": Preset(
        "top-k as the library dictionary_learning trains it",
        "saprmarks/dictionary_learning, trainers/top_k.py",
        {
            "form": "topk", "aux_coefficient": 1 / 32, "clip_norm": 1.0, "normalise_loss": False,
            "warmup_from_zero": True,
            "decay": 0.2, "unit_decoder": True,
        },
    ),
    "batch-topk": Preset(
        "the n·k largest of a batch, a common threshold in use",
        "Bussmann et al. 2024, arXiv:2412.06410; recipe of dictionary_learning",
        {
            "form": "batch_topk", "aux_coefficient": 1 / 32, "clip_norm": 1.0,
            "decay": 0.2, "unit_decoder": True, "threshold_decay": 0.999,
        },
    ),
    "matryoshka": Preset(
        "nested dictionaries, batch top-k",
        "Bussmann et al. 2025, arXiv:2503.17547; recipe of SAEBench",
        {
            "form": "matryoshka", "aux_coefficient": 1 / 32, "clip_norm": 1.0,
            "decay": 0.2, "unit_decoder": True, "lr": 3e-4,
        },
    ),
    "jumprelu": Preset(
        "a trained threshold for each latent, L0 penalty",
        "Rajamanoharan et al. 2024, arXiv:2407.14435; Gemma Scope, arXiv:2408.05147",
        {
            "form": "jumprelu", "penalty": "l0", "bandwidth": 1e-3, "threshold_init": 1e-3, "sparsity_warmup": 0.1,
            "beta1": 0.0, "lr": 7e-5, "decay": 0.0, "unit_decoder": True, "b_dec_init": "zero",
        },
    ),
    "jumprelu-tanh": Preset(
        "a trained threshold for each latent, tanh penalty, straight through to all parameters",
        "Anthropic, Circuits Updates, January 2025",
        {
            "form": "jumprelu", "penalty": "tanh", "straight_through": True, "sparsity_warmup": 1.0, "lr": 2e-4,
            "decay": 0.2, "clip_norm": 1.0, "unit_decoder": False,
        },
    ),
    "gated": Preset(
        "gates and magnitudes apart, L1 on the gates",
        "Rajamanoharan et al. 2024, arXiv:2404.16014",
        {"form": "gated", "beta1": 0.0, "lr": 3e-4, "unit_decoder": True},
    ),
    "relu": Preset(
        "ReLU with an L1 penalty weighted by decoder norms",
        "Anthropic, Circuits Updates, April 2024",
        {
            "form": "relu", "sparsity_warmup": 0.05, "lr": 5e-5, "decay": 0.2, "clip_norm": 1.0,
            "unit_decoder": False,
        },
    ),
    "absolute-topk": Preset("top-k by magnitude, signed values", "arXiv:2510.00404", {"form": "abs"}),
    "hierarchical-topk": Preset(
        "every prefix of the k latents reconstructs", "arXiv:2505.24473", {"form": "hierarchical"}
    ),
    "group-max": Preset("the best latent of each of k groups", "EleutherAI/sparsify", {"form": "group_max"}),
    "transcoder": Preset(
        "output of a module from its input", "Dunefsky et al. 2024, arXiv:2406.11944",
        {"form": "topk", "architecture": "transcoder", **_FREE},
    ),
    "skip-transcoder": Preset(
        "a transcoder with a dense linear path beside it", "Paulo et al. 2025, arXiv:2501.18823",
        {"form": "topk", "architecture": "skip_transcoder", **_FREE},
    ),
    "crosscoder": Preset(
        "one dictionary for several layers, batch top-k by the sum of decoder norms",
        "Anthropic 2024, Sparse Crosscoders; batch top-k: arXiv:2504.02922",
        {
            "form": "batch_topk", "architecture": "crosscoder", "select_by_norm": True, "unit_decoder": False,
            "clip_norm": 1.0,
        },
    ),
    "cross-layer-transcoder": Preset(
        "latents of every layer that write to their own and to all later ones, tanh penalty",
        "Ameisen et al. 2025, Circuit Tracing; recipe of jumprelu-tanh",
        {
            "form": "jumprelu", "architecture": "cross_layer", "penalty": "tanh", "straight_through": True,
            "sparsity_warmup": 1.0, "lr": 2e-4, "decay": 0.2, "clip_norm": 1.0, "unit_decoder": False,
        },
    ),
}  # fmt: skip


def fields_of(preset: str) -> dict[str, Any]:
    """The fields of a preset. Raises `ValueError` for an unknown name."""
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(map(repr, PRESETS))}, got {preset!r}")
    return dict(PRESETS[preset].fields)
