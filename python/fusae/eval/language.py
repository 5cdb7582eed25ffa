# SPDX-License-Identifier: Apache-2.0
"""What a reconstruction does to the language model: loss recovered, KL, and the tokens a decoder row promotes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data import hooks
from ..data.kept import REASONS, RowFilter
from ..data.progress import token_progress
from .patching import Patcher

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LOGITS_BYTES = 2**27


class LossMetrics:
    """Cross-entropy and KL divergence of a model with something else in place of its activations.

    Sums in float64 over next-token predictions; batches add up, and two objects merge, in any order. All values are in
    nats a token:

    ===================  ==============================================================================================
    ``loss``             ``original``, ``patched``, ``mean_ablated``: cross-entropy; ``loss_recovered``: (mean_ablated −
                         patched) / (mean_ablated − original), 1 for a perfect reconstruction, NaN if ablation changes
                         nothing; ``tokens``: predictions counted
    ``kl``               ``patched``, ``mean_ablated``: mean of KL(original ‖ that) over the same predictions;
                         ``kl_recovered``: 1 − patched / mean_ablated, NaN if ablation changes nothing
    ===================  ==============================================================================================

    Equivalent to, for one chunk (logits ``[ctx, vocabulary]``)::

        loss = cross_entropy(logits[:-1], ids[1:])
        kl = (original[:-1].softmax(-1) * (original[:-1].log_softmax(-1) - logits[:-1].log_softmax(-1))).sum(-1).mean()
    """

    NAMES = ("original", "patched", "mean_ablated")

    def __init__(self) -> None:
        self.tokens = 0
        self._loss = dict.fromkeys(self.NAMES, 0.0)
        self._kl = dict.fromkeys(self.NAMES[1:], 0.0)

    def update(self, name: str, logits: Tensor, original: Tensor, targets: Tensor, counted: Tensor) -> LossMetrics:
        """Add one of the three (`NAMES`) of a batch; `original` first, as the one that counts the tokens.

        Args:
            logits, original: ``[batch, ctx, vocabulary]``.
            targets: ids ``[batch, ctx]``.
            counted: bool ``[batch, ctx - 1]``: which predictions (at position t, of the token at t + 1) count.
        """
        # One chunk at a time: logits in fp32 are the largest tensors here.
        for row, reference, ids, use in zip(logits, original, targets, counted, strict=True):
            log_q = row[:-1][use].float().log_softmax(-1)
            losses = -log_q.gather(1, ids[1:][use][:, None])
            self._loss[name] += float(losses.double().sum())
            if name != "original":
                log_p = reference[:-1][use].float().log_softmax(-1)
                p = log_p.exp()
                # A token that the model rules out (a logit of minus infinity) adds nothing.
                each = torch.where(p == 0, 0.0, p * (log_p - log_q))
                self._kl[name] += float(each.sum(-1).double().sum())
        if name == "original":
            self.tokens += int(counted.sum())
        return self

    def merge(self, other: LossMetrics) -> LossMetrics:
        """Add what `other` has seen, as if its batches had come here; returns self."""
        self.tokens += other.tokens
        for mine, theirs in ((self._loss, other._loss), (self._kl, other._kl)):
            for name, value in theirs.items():
                mine[name] += value
        return self

    def result(self) -> dict[str, Any]:
        """``{"loss", "kl"}``, plain numbers (JSON but for NaN). Raises `ValueError` if no prediction was counted."""
        if not self.tokens:
            raise ValueError("no prediction was counted: call update() first, with chunks of at least 2 tokens")
        loss = {name: value / self.tokens for name, value in self._loss.items()}
        gap = loss["mean_ablated"] - loss["original"]
        loss["loss_recovered"] = (loss["mean_ablated"] - loss["patched"]) / gap if gap != 0 else float("nan")
        kl = {name: value / self.tokens for name, value in self._kl.items()}
        kl["kl_recovered"] = 1 - kl["patched"] / kl["mean_ablated"] if kl["mean_ablated"] > 0 else float("nan")
        return {"loss": {**loss, "tokens": self.tokens}, "kl": kl}


def loss_recovered(
    model: nn.Module,
    module: str | Sequence[str],
    reconstruct: Callable[[Tensor], Tensor],
    chunks: Any,
    mean: Tensor,
    *,
    batch_size: int | None = None,
    skip_positions: int = 2,
    outlier_factor: float | None = 10.0,
    norm_limit: float | Sequence[float] | None = None,
    drop_special: bool = True,
    nonfinite: str = "stop",
    keep: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Next-token cross-entropy and KL divergence of `model` with a reconstruction in place of a module's activations.

    Three passes over `chunks`: original; each row x at `module` replaced by ``reconstruct(x)``; each row replaced by
    `mean`. Rows that the dictionary was not trained on (`fusae.data.kept.RowFilter`: first positions, special tokens,
    rows whose norm exceeds the limit) keep their value in all three. The averages are over all next-token predictions,
    but for those of padding and of special tokens. Blocks before `module` are computed once.

    Args:
        model: a causal LM of `transformers` (called with ids ``[batch, ctx]``, returns ``.logits``).
        module: a site, e.g. ``"model.layers.11"`` (a module's output) or ``"model.layers.11.mlp:in"`` (its input), or
            several, whose rows are joined; each is given its part of the reconstruction.
        reconstruct: maps rows ``[n, d]`` of the model's dtype to ``[n, d - keep]``.
        chunks: held-out `fusae.data.TokenChunks`, or token ids ``[chunks, ctx]``.
        batch_size: chunks a forward pass. None: as many as keep one set of logits below `LOGITS_BYTES`; two are alive
            at a time, and they dwarf the rest.
        mean: ``[d - keep]``, mean activation, e.g. ``ReconstructionMetrics.mean()`` of the held-out rows.
        skip_positions, outlier_factor, drop_special, nonfinite: as the activations were collected.
        norm_limit: as `Activations.norm_limit`. None: `outlier_factor` times the median norm of the first batch.
        keep: so many leading columns of the rows keep their value in all three passes: the input of a transcoder.

    Returns:
        `LossMetrics.result`, and ``passed_through``: rows that were not replaced, by reason.

    Raises `ValueError` or `TypeError` for a bad argument, a model without a language-model head, or if `reconstruct`
    returns another shape or a non-finite value.
    """
    if (reason := no_next_token(model)) is not None:
        raise ValueError(f"model: {reason}, so there is no loss to measure")
    chunks = hooks.check_chunks(chunks, model)
    ctx = chunks.shape[1]
    limits = None if norm_limit is None else list(norm_limit if isinstance(norm_limit, Sequence) else [norm_limit])
    kept = RowFilter(skip_positions, (outlier_factor or 10.0) if limits else outlier_factor, drop_special, nonfinite)
    kept.check(ctx)
    if ctx < 2:
        raise ValueError("chunks must have at least 2 positions: there is no next token to predict")
    if batch_size is None:
        batch_size = _chunks_at_once(model, ctx)
    elif not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer of at least 1, or None, got {batch_size!r}")
    patcher = Patcher(model, module)
    device = hooks.device_of(model)
    metrics = LossMetrics()
    passed = dict.fromkeys(REASONS[1:], 0)
    with token_progress(progress) as bar, hooks.evaluating(model):
        task = bar.add_task("loss recovered", total=chunks.tokens)
        for index in chunks.batches(batch_size):
            ids, mask = hooks.batch_of(chunks, index, device)
            in_use = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
            special = hooks.is_special(ids, chunks.special) & in_use
            with patcher.recording(ids) as parts:
                original = _logits(model, ids, mask)
            hidden = torch.cat(parts, -1)
            if mean.shape != (hidden.shape[-1] - keep,):
                raise ValueError(f"mean must have shape [{hidden.shape[-1] - keep}], got {list(mean.shape)}")
            use, counts, limits = kept(hidden, [part.shape[-1] for part in parts], chunks, index, limits)
            use = use.to(device)
            passed = {reason: number + counts[reason] for reason, number in passed.items()}
            counted = in_use[:, 1:] & ~special[:, 1:]
            metrics.update("original", original, original, ids, counted)
            rebuilt = _reconstruct(reconstruct, hidden[use], keep)
            for name, rows in (("patched", rebuilt), ("mean_ablated", mean.to(hidden))):
                changed = hidden.clone()
                changed[..., keep:][use] = rows
                with patcher.replaced(changed):
                    metrics.update(name, _logits(model, ids, mask), original, ids, counted)
            bar.update(task, advance=int(in_use.sum()))
    return {**metrics.result(), "passed_through": passed}


def _chunks_at_once(model: nn.Module, ctx: int) -> int:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        return 1
    each = ctx * head.weight.shape[0] * head.weight.element_size()
    return max(1, LOGITS_BYTES // each)


def _logits(model: nn.Module, ids: Tensor, mask: Tensor | None) -> Tensor:
    return model(ids, **hooks.forward_options(model, mask)).logits


def no_next_token(model: nn.Module) -> str | None:
    """Why a model predicts no next token, as an encoder does not; None for a causal LM, and for what cannot tell."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} is an encoder-decoder"
    if hasattr(model, "can_generate") and not model.can_generate():
        return f"{name} is no causal language model"
    return None


def _reconstruct(reconstruct: Callable[[Tensor], Tensor], rows: Tensor, keep: int) -> Tensor:
    result = reconstruct(rows)
    wanted = (rows.shape[0], rows.shape[1] - keep)
    if not isinstance(result, Tensor) or result.shape != wanted:
        got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"reconstruct must return a tensor of the shape it got, {list(wanted)}, got {got}")
    if not bool(result.isfinite().all()):
        raise ValueError("reconstruct returned NaN or infinite values")
    return result.to(rows)


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

    Returns one ``{"promoted": [top strings], "suppressed": [top strings]}`` a row, strongest first, with the effects
    themselves as "promoted_values" and "suppressed_values".

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
            effect: dict[str, list[Any]] = {}
            for name, largest in (("promoted", True), ("suppressed", False)):
                values, tokens = logits.topk(min(top, len(logits)), largest=largest)
                effect[name] = [token_text(tokenizer, i) for i in tokens.tolist()]
                effect[f"{name}_values"] = values.tolist()
            effects.append(effect)
    return effects


def _final_norm(model: nn.Module) -> nn.Module:
    base = getattr(model, "base_model", model)
    for name in ("norm", "ln_f", "final_layer_norm", "final_layernorm"):
        norm = getattr(base, name, None)
        if isinstance(norm, nn.Module) and getattr(norm, "weight", None) is not None:
            return norm
    raise ValueError(f"model: {type(model).__name__} has no final norm of a known name (norm, ln_f, final_layer_norm)")
