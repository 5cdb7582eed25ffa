# SPDX-License-Identifier: Apache-2.0
"""What the names `form` and `architecture` of a training configuration stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..nn import CrossLayerConfig, CrossLayerTranscoder, SparseCoder, SparseCoderConfig, objectives

if TYPE_CHECKING:
    from .config import TrainConfig

ARCHITECTURES = ("autoencoder", "transcoder", "skip_transcoder", "crosscoder", "cross_layer")
PENALTIES = ("l0", "l0_squared", "l0_mean_squared", "tanh")


# Of SAEBench: shares of m that the nested dictionaries of form matryoshka have by default.
_PREFIXES = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1)


class Form(NamedTuple):
    """How a coder selects, and the fields that only some forms use."""

    select: str
    activation: str = "relu"
    uses: tuple[str, ...] = ()


_AUX = ("aux_coefficient",)
_SPARSITY = ("sparsity", "sparsity_warmup")
FORMS = {
    "topk": Form("topk", uses=(*_AUX, "multi_topk")),
    "abs": Form("abs", "none", uses=_AUX),
    "group_max": Form("group_max", uses=_AUX),
    "hierarchical": Form("topk", uses=_AUX),
    "batch_topk": Form("batch_topk", uses=(*_AUX, "threshold_decay", "joint")),
    "matryoshka": Form("batch_topk", uses=(*_AUX, "threshold_decay", "prefixes")),
    "relu": Form("relu", uses=_SPARSITY),
    "jumprelu": Form(
        "threshold",
        uses=(*_SPARSITY, "penalty", "straight_through", "preact_coefficient", "bandwidth", "threshold_init"),
    ),
    "gated": Form("relu", uses=_SPARSITY),
}
UNBOUNDED = ("relu", "threshold")
# What a cross-layer transcoder can be trained as.
_CROSS_LAYER = ("topk", "batch_topk", "relu", "jumprelu")
# Fields that do nothing except with some forms, and the value that means "not given".
_SPECIAL = {
    "aux_coefficient": 1 / 32, "multi_topk": 0.0, "penalty": "l0", "sparsity_warmup": 0.1, "threshold_decay": 0.999,
    "sparsity": None, "prefixes": None, "straight_through": False, "preact_coefficient": None,
    "bandwidth": None, "threshold_init": None, "joint": True,
}  # fmt: skip


def check_form(config: TrainConfig) -> None:
    """Raises `ValueError` for fields that do not go together."""
    form = FORMS[config.form]
    for name, unset in _SPECIAL.items():
        value = getattr(config, name)
        if value != unset and name not in form.uses:
            users = ", ".join(other for other, what in FORMS.items() if name in what.uses)
            raise ValueError(f"{name} is {value!r}, which form {config.form!r} does not use; it is for: {users}")
    if form.select in UNBOUNDED:
        for name in ("k_aux", "k_start"):
            if getattr(config, name):
                raise ValueError(f"{name} must not be given with form {config.form!r}, got {getattr(config, name)}")
    if config.architecture != "cross_layer" and not config.joint:
        raise ValueError(f"joint is for architecture 'cross_layer', got {config.architecture!r}")
    if config.architecture == "cross_layer":
        if config.form not in _CROSS_LAYER:
            forms = ", ".join(map(repr, _CROSS_LAYER))
            raise ValueError(f"form must be one of {forms} with architecture 'cross_layer', got {config.form!r}")
        if config.multi_topk:
            raise ValueError(f"multi_topk must be 0 with architecture 'cross_layer', got {config.multi_topk}")
    widths_of("sites", config.sites)
    prefixes_of(config)
    if config.form == "group_max":
        if config.m % config.k:
            raise ValueError(f"k must divide m = {config.m} with form 'group_max', got {config.k}")
        if config.k_start is not None:
            raise ValueError(f"k_start must not be given with form 'group_max' (k divides m), got {config.k_start}")
    if config.decoder_scale != 1 and config.unit_decoder:
        raise ValueError(f"decoder_scale must be 1 with unit_decoder, got {config.decoder_scale}")
    if config.decoder_scale == 0 and config.select_by_norm:
        raise ValueError("decoder_scale must be above 0 with select_by_norm: all scores would be 0")
    if config.form == "jumprelu" and config.select_by_norm:
        raise ValueError("select_by_norm must be false with form 'jumprelu': thresholds are of activations alone")


def widths_of(name: str, text: str | None) -> tuple[int, ...] | None:
    """``"576, 576"`` as numbers."""
    if text is None:
        return None
    if not isinstance(text, str):
        raise TypeError(f"{name} must be widths with commas between, as '512,2048', got {type(text).__name__} {text!r}")
    try:
        widths = tuple(int(part) for part in text.split(","))
    except ValueError:
        widths = ()
    if not widths or min(widths) < 1:
        raise ValueError(f"{name} must be widths of at least 1 with commas between, as '512,2048', got {text!r}")
    return widths


def prefixes_of(config: TrainConfig) -> tuple[int, ...]:
    """Widths of the nested dictionaries, the last one m."""
    widths = widths_of("prefixes", config.prefixes)
    if widths is None:
        widths = tuple(sorted({max(1, round(config.m * share)) for share in _PREFIXES}))
    if list(widths) != sorted(set(widths)) or widths[-1] > config.m:
        raise ValueError(f"prefixes must rise to at most m = {config.m}, got {config.prefixes!r}")
    return widths if widths[-1] == config.m else (*widths, config.m)


def new_coder(config: TrainConfig, m: int | None = None, **options: Any) -> SparseCoder | CrossLayerTranscoder:
    """The coder that a resolved configuration trains (or one with `m` latents), of inputs as they are scaled in
    training; with seed None its weights are not initialised."""
    kind = CrossLayerTranscoder if config.architecture == "cross_layer" else SparseCoder
    coder = kind(coder_config(config, m), **options)
    if options.get("seed", 0) is not None and config.decoder_scale != 1:
        with torch.no_grad():
            for part in getattr(coder, "sources", [coder]):
                part.W_dec *= config.decoder_scale
    return coder


def coder_config(config: TrainConfig, m: int | None = None) -> SparseCoderConfig | CrossLayerConfig:
    """Its configuration."""
    form, parts = FORMS[config.form], config.parts
    if config.architecture == "cross_layer":
        return CrossLayerConfig(
            config.layers,
            parts[0],
            m or config.m,
            config.k,
            select=form.select,
            select_by_norm=config.select_by_norm,
            k_aux=config.k_aux,
            dtype="float32" if config.dtype == "bfloat16" else config.dtype,
            d_out=parts[-1],
            joint=config.joint and form.select == "batch_topk",
        )
    return SparseCoderConfig(
        parts[0] if config.is_transcoder else config.d,
        m or config.m,
        config.k,
        activation=form.activation,
        select=form.select,
        select_by_norm=config.select_by_norm,
        k_aux=config.k_aux,
        dtype="float32" if config.dtype == "bfloat16" else config.dtype,
        d_out=parts[1] if config.is_transcoder else None,
        pre_bias=config.architecture == "autoencoder",
        skip=config.architecture == "skip_transcoder",
        gated=config.form == "gated",
        sites=parts if config.architecture == "crosscoder" else None,
    )


def objective(config: TrainConfig, m: int | None = None) -> objectives.Objective:
    """The training loss of a resolved configuration (of a coder with `m` latents)."""
    form = _objective(config, m)
    return objectives.CrossLayer(form) if config.architecture == "cross_layer" else form


def _objective(config: TrainConfig, m: int | None) -> objectives.Objective:
    aux = config.aux_coefficient
    if config.form == "batch_topk":
        return objectives.BatchTopK(aux, config.threshold_decay)
    if config.form == "matryoshka":
        m = m or config.m
        prefixes = (*(width for width in prefixes_of(config) if width < m), m)
        return objectives.Matryoshka(prefixes, None, aux, config.threshold_decay)
    if config.form == "hierarchical":
        return objectives.HierarchicalTopK(None, aux)
    if config.form == "relu":
        return objectives.ReLU(config.sparsity, by_norm=not config.unit_decoder)
    if config.form == "gated":
        return objectives.Gated(config.sparsity)
    if config.form == "jumprelu":
        return objectives.JumpReLU(
            config.penalty, config.sparsity, config.bandwidth, config.straight_through,
            tanh_scale=4 * config.parts[-1] ** 0.5 if config.architecture == "cross_layer" else None,
            preact_coefficient=config.preact_coefficient,
        )  # fmt: skip
    return objectives.TopK(aux, config.multi_topk)


def form_defaults(config: TrainConfig, out: int) -> dict[str, float]:
    """Fields of the form that are left to the data, whose outputs have the width `out` and unit mean squared norm."""
    if config.form == "relu":
        return {"sparsity": objectives.ReLU.sparsity}
    if config.form == "gated":
        return {"sparsity": objectives.Gated.sparsity}
    if config.form != "jumprelu":
        return {}
    if config.penalty != "tanh":
        recipe, threshold = objectives.JumpReLU(config.penalty), 1e-3
        sparsity = 1.0 if config.penalty == "l0_mean_squared" else 1e-3
    else:
        recipe, threshold = objectives.JumpReLU.anthropic(out), 0.1 / out**0.5
        sparsity = recipe.sparsity
    return {
        "sparsity": sparsity, "bandwidth": recipe.bandwidth, "threshold_init": threshold,
        "preact_coefficient": recipe.preact_coefficient,
    }  # fmt: skip
