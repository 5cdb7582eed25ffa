# SPDX-License-Identifier: Apache-2.0
"""The same as `fusae.hook` with dense codes in plain torch, on a small model: what its tests compare with."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from .coders import D, M

B, CTX = 2, 5
N = B * CTX
PLAIN = ("topk", "relu")  # codes of fixed width, ragged codes
ALL = torch.arange(M)
MASK = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)


class Model(nn.Module):
    """Three linear maps of width D, float64. `wrap`: what the second gives for its output; `first` takes it back."""

    def __init__(self, wrap=lambda x: x, first=lambda x: x):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(D, D, dtype=torch.float64)
        self.site = Site(wrap)
        self.outer = nn.Linear(D, D, dtype=torch.float64)
        self.first = first

    def forward(self, x):
        return self.outer(torch.tanh(self.first(self.site(self.inner(x)))))


class Site(nn.Module):
    def __init__(self, wrap=lambda x: x):
        super().__init__()
        self.map, self.wrap = nn.Linear(D, D, dtype=torch.float64), wrap

    def forward(self, hidden_states, scale=1.0):
        return self.wrap(self.map(hidden_states) * scale)


def batch(seed=3):
    return torch.randn(B, CTX, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_codes(coder, x):
    codes = coder.encode(x.reshape(-1, x.shape[-1]))
    return codes.to_dense()


def written(coder, f, x):
    """The output for dense codes, in plain torch."""
    y = f @ coder.W_dec + coder.b_dec
    if coder.config.skip:
        y = y + x.reshape(-1, x.shape[-1]) @ coder.W_skip.T
    return y.reshape(*x.shape[:-1], -1)


@contextlib.contextmanager
def densely(module, coder, mode, change=lambda f: f, detach=False):
    """What `fusae.hook` does at a module's output, with dense codes; yields what it saw."""
    seen = {}

    def hook(_module, _args, x):
        f = dense_codes(coder, x)
        seen["f"] = f.clone() if mode == "error" else f
        seen["error"] = (x - written(coder, f, x)).detach() if detach else x - written(coder, f, x)
        new = written(coder, change(seen["f"]), x)
        return new if mode == "replace" else new + seen["error"]

    handle = module.register_forward_hook(hook)
    yield seen
    handle.remove()


def dense_edit(f: Tensor, latents, options, rows=None) -> Tensor:
    latents = torch.as_tensor([latents] if isinstance(latents, int) else list(latents))
    old = f[:, latents]
    given = dict(options)
    for name, value in options.items():
        if isinstance(value, Tensor) and value.ndim > 1:
            given[name] = value.expand(B, CTX, value.shape[-1]).reshape(N, -1)
    if "value" in given:
        new = torch.as_tensor(given["value"], dtype=f.dtype).expand_as(old)
    else:
        new = old * given.get("scale", 1.0) + given.get("add", 0.0)
        new = new.clamp(min=torch.as_tensor(given["low"]).to(f)) if "low" in given else new
        new = new.clamp(max=torch.as_tensor(given["high"]).to(f)) if "high" in given else new
    if rows is not None:
        new = torch.where(rows.reshape(-1, 1), new, old)
    return f.index_copy(1, latents, new.to(f.dtype))


def rows_of(codes):
    """The row of every entry, int64 ``[nnz]``."""
    return codes.row_ids() if codes.is_ragged else torch.arange(N).repeat_interleave(codes.values.shape[-1])


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
