# SPDX-License-Identifier: Apache-2.0
"""eval.json and features.json of a coder: on rows of the disk, or on text with the model they come from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import Activations, TokenChunks, collect, default_cache_dir, weights_sha256
from ..data.kept import RowFilter
from ..eval import (
    choose_latents,
    logit_effects,
    loss_recovered,
    measure,
    nearest_latents,
    no_next_token,
    top_passages,
)
from ..formats.native import write_json
from ..nn import CrossLayerTranscoder, SparseCoder, join_codes
from .config import DataConfig
from .inputs import HELD_OUT_TOKENS, LOSS_TOKENS, Inputs, load_inputs, rows_in
from .live import LiveRows

EFFECTS = "in standard deviations over all latents"


def measure_rows(
    coder: SparseCoder | CrossLayerTranscoder, rows: Any, device: torch.device, show: bool
) -> tuple[dict[str, Any], Tensor]:
    """(what eval.json says of the reconstruction of `rows`, their mean row ``[d]``)."""
    view = RowView(coder)
    width = getattr(rows, "shape", (None, view.width))[1]
    if width != view.width:
        raise ValueError(f"rows must have width {view.width}, as the coder was trained on, got {width}")
    metrics = measure(
        rows, view.encode_input, view.decode, view.latents, split=view.split, device=device, progress=show
    )
    return plain(metrics.result()), metrics.mean()


def evaluate_text(
    coder: SparseCoder | CrossLayerTranscoder,
    inputs: Inputs,
    config: DataConfig,
    rows: Activations | LiveRows,
    chunks: TokenChunks,
    *,
    nonfinite: str = "stop",
    show: bool = True,
) -> dict[str, Any]:
    """What eval.json holds, measured on held-out `chunks` and their `rows`; the coder on the model's device.

    The loss is on the first chunks that hold ``config.loss_tokens``; the mean that ablation puts in is that of `rows`.
    For a model without next-token loss ``no_loss`` says why there is none.
    """
    view, device = RowView(coder), coder.b_dec.device
    evaluation, mean = measure_rows(coder, rows, device, show)
    if (reason := no_next_token(inputs.model)) is not None:
        evaluation["no_loss"] = reason
    else:
        wanted = config.loss_tokens or LOSS_TOKENS
        few = chunks[: int((chunks.lengths.cumsum() < wanted).sum()) + 1]
        result = loss_recovered(
            inputs.model,
            config.sites,
            view.reconstruct,
            few,
            mean.float(),
            skip_positions=config.skip_positions,
            outlier_factor=config.outlier_factor or None,
            drop_special=config.drop_special,
            nonfinite=nonfinite,
            norm_limit=rows.norm_limit,
            keep=view.keep,
            progress=show,
        )
        evaluation["loss"] = plain({**result["loss"], "passed_through": result["passed_through"]})
        evaluation["kl"] = plain(result["kl"])
    evaluation["dropped"] = {reason: n for reason, n in rows.dropped.items() if reason != "padding"}
    evaluation["source"] = {
        "model": inputs.model_name, "module": ", ".join(config.sites), "text": inputs.text_name,
    }  # fmt: skip
    return evaluation


def evaluate_run(
    coder: SparseCoder | CrossLayerTranscoder,
    config: DataConfig,
    *,
    everything: bool = False,
    nonfinite: str = "stop",
    show: bool = True,
) -> dict[str, Any]:
    """What eval.json holds, for the model and the held-out text that `config` names (with `everything`: all of it)."""
    inputs = load_inputs(config, coder.b_dec.device, everything=everything)
    chunks = inputs.chunks(config, "held_out", config.held_out_tokens or HELD_OUT_TOKENS, show)
    wanted = config.held_out_tokens
    if wanted is not None and (found := rows_in(chunks, config)) < wanted:
        raise ValueError(f"tokens must be at most {found:,}, which is all this text has, got {wanted:,}")
    rows = stored_or_live(
        inputs, config, chunks, "held-out", weights_sha256(inputs.model), nonfinite=nonfinite, show=show
    )  # fmt: skip
    return evaluate_text(coder, inputs, config, rows, chunks, nonfinite=nonfinite, show=show)


def save_evaluation(path: Path, evaluation: dict[str, Any]) -> None:
    """Write eval.json, keeping what an earlier one says of the passages that the report shows."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        before = json.loads(path.read_text(encoding="utf-8"))["source"]
        if "source" in evaluation:
            evaluation["source"] |= {name: before[name] for name in ("passages", "effects") if name in before}
    write_json(path, evaluation)


def features(
    coder: SparseCoder | CrossLayerTranscoder,
    inputs: Inputs,
    config: DataConfig,
    density: Sequence[float],
    rows: Activations | LiveRows,
    chunks: TokenChunks,
    *,
    seed: int = 0,
    show: bool = True,
) -> list[dict[str, Any]]:
    """What features.json holds: `config.features` latents, spread over the densities of those that fire.

    Latents of a cross-layer transcoder are counted through all layers; each has its ``layer`` as well: ``index`` (from
    0), ``module`` (the site that is the layer's input) and ``latent`` (its number in the layer).
    """
    latents = choose_latents(density, config.features, seed=seed) if config.features else []
    layered = isinstance(coder, CrossLayerTranscoder)
    effects = None
    if not layered:
        W_dec = coder.W_dec.detach()
    if not layered and writes_residual_stream(inputs.model, config.sites, coder):
        effects = logit_effects(inputs.model, inputs.tokenizer, W_dec[latents], background=W_dec)
    found = top_passages(
        rows,
        chunks,
        RowView(coder).encode,
        latents,
        inputs.tokenizer,
        passages=config.passages,
        effects=effects,
        max_rows=config.passage_tokens,
        device=coder.b_dec.device,
        progress=show,
    )
    for feature in found:
        feature["density"] = density[feature["latent"]]  # as everywhere in the report: the share of held-out tokens
    if layered:
        for feature in found:
            layer, latent = divmod(feature["latent"], coder.config.m)
            feature["layer"] = {"index": layer, "module": config.sites[layer], "latent": latent}
    else:  # latents of layers write to different ones: their decoder rows are not alike
        for feature, nearest in zip(found, nearest_latents(W_dec, latents), strict=True):
            feature["nearest"] = nearest
    return found


def writes_residual_stream(model: torch.nn.Module, sites: Sequence[str], coder: SparseCoder) -> bool:
    """Whether decoder rows have a direct path to the logits: they are of one site, an output of the unembedding's
    width."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return (
        no_next_token(model) is None
        and head is not None
        and len(sites) == 1 + (coder.config.d_out is not None)
        and not sites[-1].endswith(":in")
        and head.weight.shape[1] == coder.W_dec.shape[1]
    )


def row_filter(config: DataConfig, nonfinite: str) -> RowFilter:
    return RowFilter(config.skip_positions, config.outlier_factor or None, config.drop_special, nonfinite)


def stored_or_live(
    inputs: Inputs,
    config: DataConfig,
    chunks: TokenChunks,
    part: str,
    model_sha256: str,
    *,
    nonfinite: str = "stop",
    limits: Any = None,
    show: bool = True,
) -> Activations | LiveRows:
    """The rows of `chunks`: in a folder of the cache whose name stands for all inputs, or, for a stream, from the model
    each time."""
    if config.store == "stream":
        return LiveRows(
            inputs.model, chunks, config.sites, row_filter(config, nonfinite), rows_in(chunks, config),
            batch_size=config.chunk_batch, limits=limits,
        )  # fmt: skip
    named = (
        chunks.sha256(), model_sha256, config.sites, config.model_dtype, config.skip_positions, config.outlier_factor,
        config.drop_special, chunks.special, config.store, config.chunk_batch, nonfinite,
    )  # fmt: skip
    key = hashlib.sha256(repr(named).encode())
    folder = Path(config.cache or default_cache_dir() / "activations")
    return collect(
        inputs.model,
        chunks,
        config.sites if len(config.sites) > 1 else config.sites[0],
        folder / f"{part}-{key.hexdigest()[:16]}",
        batch_size=config.chunk_batch,
        skip_positions=config.skip_positions,
        outlier_factor=config.outlier_factor or None,
        drop_special=config.drop_special,
        nonfinite=nonfinite,
        dtype=config.store,
        source=f"{inputs.model_name}, {inputs.text_name}",
        model_sha256=model_sha256,
        overwrite=True,  # the name stands for the inputs: what is there is these rows, a part of them, or damaged
        progress=show,
    )


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """NaN as None: JSON has no word for it."""
    return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in values.items()}


class RowView:
    """A coder on whole rows: of a transcoder they are input and target side by side, of others the input alone.

    Attributes:
        width: of a row.
        keep: columns of it that are a transcoder's input, else 0.
        latents: in all; those of a cross-layer transcoder are joined.
    """

    def __init__(self, coder: SparseCoder | CrossLayerTranscoder) -> None:
        config = coder.config
        self.coder, self.dtype = coder, coder.b_dec.dtype
        if isinstance(coder, CrossLayerTranscoder):
            self.keep, self.latents = config.input_width, config.latents
        else:
            self.keep, self.latents = 0 if config.d_out is None else config.d, config.m
        self.width = self.keep + config.output_width

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(input, target)"""
        rows = rows.to(self.dtype)
        return (rows[:, : self.keep].contiguous(), rows[:, self.keep :]) if self.keep else (rows, rows)

    def encode(self, rows: Tensor) -> Any:
        """The codes of rows ``[n, width]``."""
        return self.encode_input(self.split(rows)[0])

    def encode_input(self, x: Tensor) -> Any:
        """The codes of inputs ``[n, keep]`` (of an autoencoder: of rows)."""
        codes = self.coder.encode(x)
        return join_codes(codes) if isinstance(self.coder, CrossLayerTranscoder) else codes

    def decode(self, codes: Any, x: Tensor) -> Tensor:
        """What the coder makes of codes and their inputs."""
        return self.coder.decode(codes, x).reshape(len(x), -1)

    def reconstruct(self, rows: Tensor) -> Tensor:
        """What the coder makes of rows ``[n, width]``: their target, ``[n, width - keep]``."""
        return self.coder(self.split(rows)[0])
