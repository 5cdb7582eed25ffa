# SPDX-License-Identifier: Apache-2.0
"""Every training loss of fusae in a few lines of plain torch over ``[n, m]``, for autograd: what the tests compare to.

Each takes the coder (for its parameters and its configuration), `x` ``[n, d]``, the target `y`, and a `Moment`.
"""

from __future__ import annotations

import dataclasses

import torch


class Step(torch.autograd.Function):
    """``p > threshold``, in the backward pass a ramp of width eps."""

    @staticmethod
    def forward(ctx, p, threshold, eps, through):
        ctx.save_for_backward(p, threshold)
        ctx.eps, ctx.through = eps, through
        return (p > threshold).to(p.dtype)

    @staticmethod
    def backward(ctx, grad):
        p, threshold = ctx.saved_tensors
        grad = grad * ((p - threshold).abs() < ctx.eps / 2) / ctx.eps
        return grad if ctx.through else None, -grad.sum(0), None, None


class Jump(torch.autograd.Function):
    """``p · (p > threshold)`` by the same ramp, whose height is the threshold."""

    @staticmethod
    def forward(ctx, p, threshold, eps, through):
        ctx.save_for_backward(p, threshold)
        ctx.eps, ctx.through = eps, through
        return p * (p > threshold)

    @staticmethod
    def backward(ctx, grad):
        p, threshold = ctx.saved_tensors
        window = grad * threshold * ((p - threshold).abs() < ctx.eps / 2) / ctx.eps
        return grad * (p > threshold) + (window if ctx.through else 0), -window.sum(0), None, None


def pre_of(c, x):
    return (x - c.b_dec if c.config.pre_bias else x) @ c.W_enc.T + c.b_enc


def output(c, f, x):
    return f @ c.W_dec + c.b_dec + (x @ c.W_skip.T if c.config.skip else 0)


def norms(c):
    return sum(part.norm(dim=1) for part in c.W_dec.split(c.config.sites or (c.config.output_width,), dim=1))


def variance(y, moment):
    if moment.variance is not None:
        return moment.variance
    spread = (y - y.mean(0)).square().sum(1).mean()
    return spread if not torch.allclose(y, y[:1].expand_as(y)) else 1.0


def error(y, y_hat, moment):
    return (y - y_hat).square().sum(1).mean() / variance(y, moment)


def largest(score, k):
    """The k largest of every row as a 0/1 matrix, equal ones by the lower place."""
    order = score.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(score).scatter(1, order, 1.0)


def chosen(c, p, k):
    """The codes of a top-k coder from its pre-activations."""
    config = c.config
    score = (p.abs() if config.select == "abs" else p) * (norms(c) if config.select_by_norm else 1)
    if config.select == "group_max":
        mask = largest(score.reshape(-1, config.m // k), 1).reshape(p.shape)
    elif config.select == "batch_topk":
        mask = largest(score.reshape(1, -1), len(p) * k).reshape(p.shape)
    else:
        mask = largest(score, k)
    return mask.detach() * (p.relu() if config.activation == "relu" else p)


def auxk(c, p, residual, dead):
    """AuxK of the residual of the main codes: 0 without dead latents."""
    if dead is None or not dead.any() or torch.allclose(residual, residual[:1].expand_as(residual)):
        return 0.0
    score = (p.abs() if c.config.select == "abs" else p) * (norms(c) if c.config.select_by_norm else 1)
    mask = largest(score.masked_fill(~dead, -torch.inf), c.config.k_aux) * dead
    f = mask.detach() * (p.relu() if c.config.activation == "relu" else p)
    e = residual.detach()
    return (e - f @ c.W_dec).square().sum() / (e - e.mean(0)).square().sum()


def top_k(c, x, y, moment, aux_coefficient=1 / 32, multi_topk=0.0):
    p = pre_of(c, x)
    y_hat = output(c, chosen(c, p, c.config.k), x)
    loss = error(y, y_hat, moment) + aux_coefficient * auxk(c, p, y - y_hat, moment.dead)
    if multi_topk:
        loss = loss + multi_topk * error(y, output(c, chosen(c, p, min(4 * c.config.k, c.config.m)), x), moment)
    return loss


def relu(c, x, y, moment, sparsity, by_norm=True):
    f = pre_of(c, x).relu()
    l1 = (f * (norms(c) if by_norm else 1)).sum(1).mean()
    return error(y, output(c, f, x), moment) + moment.ramp * sparsity * l1


def gated(c, x, y, moment, sparsity):
    gate = pre_of(c, x)
    f = (gate > 0) * (c.r_mag.exp() * (gate - c.b_enc) + c.b_mag).relu()
    frozen = gate.relu() @ c.W_dec.detach() + c.b_dec.detach()
    if c.config.skip:
        frozen = frozen + x @ c.W_skip.detach().T
    l1 = gate.relu().sum(1).mean()
    return error(y, output(c, f, x), moment) + error(y, frozen, moment) + moment.ramp * sparsity * l1


def jump_relu(c, x, y, moment, penalty, sparsity, bandwidth, through=False, scale=1.0, preact=0.0, prefixes=None):
    p, k = pre_of(c, x), c.config.k
    f = Jump.apply(p, c.threshold, bandwidth, through)
    l0 = Step.apply(p, c.threshold, bandwidth, through).sum(1)
    loss = (
        moment.ramp
        * sparsity
        * {
            "l0": l0.mean(),
            "l0_squared": (2 / k * (l0 - k).square()).mean(),
            "l0_mean_squared": (l0.mean() / k - 1).square(),
            "tanh": torch.tanh(scale * f * norms(c)).sum(1).mean(),
        }[penalty]
    )
    if preact and moment.dead is not None:
        loss = loss + preact * ((c.threshold - p).relu() * norms(c))[:, moment.dead].sum(1).mean()
    order = torch.arange(c.config.m)
    return loss + sum(error(y, output(c, f * (order < g), x), moment) for g in prefixes or [c.config.m])


def matryoshka(c, x, y, moment, prefixes, weights, aux_coefficient=1 / 32):
    p = pre_of(c, x)
    f, order = chosen(c, p, c.config.k), torch.arange(c.config.m)
    errors = [error(y, output(c, f * (order < g), x), moment) for g in prefixes]
    aux = auxk(c, p, y - output(c, f, x), moment.dead)
    return sum(w * e for w, e in zip(weights, errors, strict=True)) + aux_coefficient * aux


def hierarchical(c, x, y, moment, ranks, aux_coefficient=1 / 32):
    p = pre_of(c, x)
    errors = [error(y, output(c, chosen(c, p, j), x), moment) for j in ranks]
    aux = auxk(c, p, y - output(c, chosen(c, p, c.config.k), x), moment.dead)
    return sum(errors) / len(errors) + aux_coefficient * aux


def cross_layer(coder, x, y, moment, form):
    """Of a cross-layer transcoder, `x` ``[n, L, d]`` and `y` ``[n, L, d_out]``; `form` is the objective to follow."""
    config = coder.config
    dead = [None] * config.layers if moment.dead is None else moment.dead.split(config.m)
    pre = [x[:, s] @ c.W_enc.T + c.b_enc for s, c in enumerate(coder.sources)]
    f = (
        _together(coder, pre)
        if config.joint
        else [_active(c, p, form) for c, p in zip(coder.sources, pre, strict=True)]
    )
    y_hat = written(coder, f) + coder.b_dec
    if config.skip:
        y_hat = y_hat + torch.einsum("nld,lod->nlo", x, coder.W_skip.view(config.layers, -1, config.d))
    loss = 0.0
    for t in range(config.layers):
        scale = None if moment.variance is None else moment.variance[t]
        loss = loss + error(y[:, t], y_hat[:, t], dataclasses.replace(moment, variance=scale))
    if config.k_aux and moment.dead is not None:
        residual = (y - y_hat).detach()
        g = [_of_dead(c, p, mask) for c, p, mask in zip(coder.sources, pre, dead, strict=True)]
        for t, e_hat in enumerate(written(coder, g).unbind(1)):
            e = residual[:, t]
            if moment.dead[: (t + 1) * config.m].any() and not torch.allclose(e, e[:1].expand_as(e)):
                loss = loss + form.aux_coefficient * (e - e_hat).square().sum() / (e - e.mean(0)).square().sum()
    for c, p, codes, mask in zip(coder.sources, pre, f, dead, strict=True):
        loss = loss + _charge(c, p, codes, mask, form, moment.ramp)
    return loss


def written(coder, f):
    """``Σ_s f_s W_dec_s`` at every target ``[n, L, d_out]``, of the dense codes of every layer."""
    parts = [(g @ c.W_dec).unflatten(1, (-1, coder.config.target_width)) for g, c in zip(f, coder.sources, strict=True)]
    return sum(torch.nn.functional.pad(part, (0, 0, s, 0)) for s, part in enumerate(parts))


def _active(c, p, form):
    if c.config.select == "threshold":
        return Jump.apply(p, c.threshold, form.bandwidth, form.straight_through)
    return p.relu() if c.config.select == "relu" else chosen(c, p, c.config.k)


def _together(coder, pre):
    """The largest of all rows and layers, equal ones by the lower row, then the lower layer, then the lower latent."""
    config, p = coder.config, torch.cat(pre, 1)
    score = p * torch.cat([norms(c) for c in coder.sources]) if config.select_by_norm else p
    mask = largest(score.reshape(1, -1), len(p) * config.layers * config.k).reshape(p.shape)
    return (mask.detach() * p.relu()).split(config.m, 1)


def _of_dead(c, p, dead):
    score = p * (norms(c) if c.config.select_by_norm else 1)
    mask = largest(score.masked_fill(~dead, -torch.inf), c.config.k_aux) * dead
    return mask.detach() * p.relu()


def _charge(c, p, f, dead, form, ramp):
    if c.config.select == "relu":
        return ramp * form.sparsity * (f * (norms(c) if form.by_norm else 1)).sum(1).mean()
    if c.config.select != "threshold":
        return 0.0
    k, l0 = c.config.k, Step.apply(p, c.threshold, form.bandwidth, form.straight_through).sum(1)
    penalty = {
        "l0": l0.mean(),
        "l0_squared": (2 / k * (l0 - k).square()).mean(),
        "tanh": torch.tanh((form.tanh_scale or 0) * f * norms(c)).sum(1).mean(),
    }[form.penalty]
    preact = 0.0 if dead is None else ((c.threshold - p).relu() * norms(c))[:, dead].sum(1).mean()
    return ramp * form.sparsity * penalty + form.preact_coefficient * preact
