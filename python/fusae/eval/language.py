# SPDX-License-Identifier: Apache-2.0
"""What a reconstruction does to the language model: loss recovered, and the tokens a decoder row promotes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data import hooks
from ..data.progress import token_progress

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def loss_recovered(
    model: nn.Module,
    module: str,
    reconstruct: Callable[[Tensor], Tensor],
    chunks: np.ndarray | Tensor,
    mean: Tensor,
    *,
    batch_size: int = 8,
    skip_positions: int = 2,
    outlier_factor: float | None = 10.0,
    norm_limit: float | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Next-token cross-entropy of `model` with a reconstruction in place of a module's output.

    Three passes over `chunks`: original; each row x of the output of `module` replaced by ``reconstruct(x)``; each row
    replaced by `mean`. The first `skip_positions` positions of a chunk and rows whose norm exceeds the limit
    (attention sinks, which the dictionary was not trained on) keep their value in all three. The loss is over all
    next-token predictions. Blocks before `module` are computed once.

    Args:
        model: a causal LM of `transformers` (called with ids ``[batch, ctx]``, returns ``.logits``).
        module: e.g. ``"model.layers.11"``.
        reconstruct: maps rows ``[n, d]`` of the model's dtype to ``[n, d]``.
        chunks: held-out token ids ``[chunks, ctx]``.
        mean: ``[d]``, mean activation, e.g. ``Activations.mean()`` of the training rows.
        norm_limit: as `Activations.norm_limit`. None: `outlier_factor` times the median norm of the first batch.
        outlier_factor: used without `norm_limit`; None lets every norm through to the dictionary.

    Returns:
        ``original``, ``patched``, ``mean_ablated``: nats per token; ``loss_recovered``: (mean_ablated − patched) /
        (mean_ablated − original), 1 for a perfect reconstruction, NaN if ablation changes nothing; ``tokens``:
        predictions counted; ``passed_through``: ``{"first_positions", "norm_outliers"}``, rows that were not replaced.

    Raises `ValueError` or `TypeError` for a bad argument or if `reconstruct` returns another shape or a non-finite
    value.
    """
    chunks = hooks.check_chunks(chunks, model)
    hooks.check_row_options(chunks.shape[1], skip_positions, outlier_factor)
    if chunks.shape[1] < 2:
        raise ValueError("chunks must have at least 2 positions: there is no next token to predict")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
    target = hooks.find_module(model, module)
    before = _earlier_blocks(model, module)
    device = hooks.device_of(model)
    loss = {"original": 0.0, "patched": 0.0, "mean_ablated": 0.0}
    passed = {"first_positions": 0, "norm_outliers": 0}
    total, ctx = chunks.shape
    first_batch = True
    with token_progress(progress) as bar, hooks.evaluating(model):
        task = bar.add_task("loss recovered", total=total * ctx)
        for start in range(0, total, batch_size):
            ids = hooks.ids_of(chunks, start, min(start + batch_size, total), device)
            with _recorded([*before, target]) as outputs:
                loss["original"] += _loss_sum(model, ids)
            if target not in outputs:
                raise ValueError(f"module: {module!r} took no part in the forward pass of {type(model).__name__}")
            hidden = hooks.hidden_of(outputs[target], ids)
            if mean.shape != hidden.shape[-1:]:
                raise ValueError(f"mean must have shape [{hidden.shape[-1]}], got {list(mean.shape)}")
            if first_batch and norm_limit is None:
                norm_limit = hooks.norm_limit_of(hidden, skip_positions, outlier_factor)
            first_batch = False
            use = hooks.rows_to_use(hidden, skip_positions, norm_limit)
            passed["first_positions"] += ids.shape[0] * skip_positions
            passed["norm_outliers"] += int((~use[:, skip_positions:]).sum())
            for name, rows in (("patched", _reconstruct(reconstruct, hidden[use])), ("mean_ablated", mean.to(hidden))):
                changed = hidden.clone()
                changed[use] = rows
                with _answering({**outputs, target: hooks.with_hidden(outputs[target], changed)}):
                    loss[name] += _loss_sum(model, ids)
            bar.update(task, advance=ids.numel())
    tokens = total * (ctx - 1)
    result: dict[str, Any] = {name: value / tokens for name, value in loss.items()}
    gap = result["mean_ablated"] - result["original"]
    result["loss_recovered"] = (result["mean_ablated"] - result["patched"]) / gap if gap != 0 else float("nan")
    return {**result, "tokens": tokens, "passed_through": passed}


def _reconstruct(reconstruct: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    result = reconstruct(rows)
    if not isinstance(result, Tensor) or result.shape != rows.shape:
        got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"reconstruct must return a tensor of the shape it got, {list(rows.shape)}, got {got}")
    if not bool(result.isfinite().all()):
        raise ValueError("reconstruct returned NaN or infinite values")
    return result.to(rows)


def _loss_sum(model: nn.Module, ids: Tensor) -> float:
    """Sum of −log p(next token) over a batch ``[batch, ctx]``, summed in float64."""
    logits = model(ids, **hooks.forward_options(model)).logits
    total = 0.0
    for row, chunk in zip(logits, ids, strict=True):  # one chunk at a time: logits in fp32 are the largest tensors here
        each = nn.functional.cross_entropy(row[:-1].float(), chunk[1:], reduction="none")
        total += float(each.double().sum())
    return total


def _earlier_blocks(model: nn.Module, name: str) -> list[nn.Module]:
    """The siblings before a block of a stack (`nn.ModuleList`), which need not run again; none for other modules."""
    parent_name, _, last = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    return list(parent)[: int(last)] if isinstance(parent, nn.ModuleList) else []


@contextmanager
def _recorded(modules: list[nn.Module]) -> Iterator[dict[nn.Module, Any]]:
    """The output of each of `modules` in the forward pass inside."""
    outputs: dict[nn.Module, Any] = {}
    handles = [m.register_forward_hook(lambda m, _args, output: outputs.__setitem__(m, output)) for m in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _answering(outputs: dict[nn.Module, Any]) -> Iterator[None]:
    """Inside, each of these modules returns the given output instead of computing."""
    had = {module: module.__dict__.get("forward") for module in outputs}
    try:
        for module, output in outputs.items():
            module.forward = lambda *_args, _output=output, **_kwargs: _output
        yield
    finally:
        for module, forward in had.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


# --- logit effects ---------------------------------------------------------------------------------------------------


def logit_effects(
    model: nn.Module,
    tokenizer: Tokenizer,
    decoder_rows: Tensor,
    top: int = 8,
    *,
    background: Tensor | None = None,
) -> list[dict[str, list[str]]]:
    """The tokens whose logits each decoder row raises and lowers most, by its direct path to the output.

    Each row of `decoder_rows` ``[r, d]`` is multiplied with the weight of the model's final norm (and centred before,
    if that is a LayerNorm) and with the unembedding. The norm's division by the row length is left out: it does not
    change the order.

    Args:
        decoder_rows: ``[r, d]``.
        background: ``[m, d]``, e.g. the whole decoder: each token's effect is then taken as its distance from the mean
            effect of these rows on that token, in standard deviations over them. Rare tokens, on which every direction
            of an early layer has a large effect, no longer fill the lists.

    Returns one ``{"promoted": [top strings], "suppressed": [top strings]}`` a row, strongest first.

    Equivalent to::

        effect = lambda rows: (rows * model.model.norm.weight) @ model.lm_head.weight.T
        logits = effect(decoder_rows)
        logits = (logits - effect(background).mean(0)) / effect(background).std(0, correction=0)  # with a background
    """
    from .passages import token_text

    norm, unembedding = _final_norm(model), model.get_output_embeddings().weight
    width = unembedding.shape[1]
    for name, rows, value in (("decoder_rows", "r", decoder_rows), ("background", "m", background)):
        if value is not None and (value.ndim != 2 or value.shape[1] != width):
            raise ValueError(f"{name} must have shape [{rows}, {width}], got {list(value.shape)}")
    effects = []
    with torch.inference_mode():
        centre = isinstance(norm, nn.LayerNorm)
        # RMSNorm of ones is its scale, whether that is kept as w or, in Gemma, as 1 + w.
        scale = norm.weight.float() if centre else norm(torch.ones_like(unembedding[0])).float()

        def scaled(rows: Tensor) -> Tensor:
            rows = rows.detach().to(unembedding.device, torch.float32)
            return (rows - rows.mean(1, keepdim=True) if centre else rows) * scale

        weight = unembedding.float()
        mean, spread = 0.0, 1.0
        if background is not None:
            others = scaled(background)
            mean = weight @ others.mean(0)
            # The variance over the rows, from their covariance: [m, vocabulary] would not fit.
            spread = ((weight @ torch.cov(others.T, correction=0)) * weight).sum(1).clamp_min(1e-30).sqrt()
        for row in scaled(decoder_rows):  # one at a time: [r, vocabulary] may be large
            logits = (weight @ row - mean) / spread
            high, low = (
                logits.topk(min(top, len(logits)), largest=largest).indices.tolist() for largest in (True, False)
            )
            effects.append(
                {
                    "promoted": [token_text(tokenizer, i) for i in high],
                    "suppressed": [token_text(tokenizer, i) for i in low],
                }
            )
    return effects


def _final_norm(model: nn.Module) -> nn.Module:
    base = getattr(model, "base_model", model)
    for name in ("norm", "ln_f", "final_layer_norm", "final_layernorm"):
        norm = getattr(base, name, None)
        if isinstance(norm, nn.Module) and getattr(norm, "weight", None) is not None:
            return norm
    raise ValueError(f"model: {type(model).__name__} has no final norm of a known name (norm, ln_f, final_layer_norm)")
