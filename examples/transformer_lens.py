# SPDX-License-Identifier: Apache-2.0
"""A dictionary in TransformerLens, by its own hooks and by `fusae.hook`, whose modules its hook points are.

    python examples/transformer_lens.py

needs TransformerLens (``pip install transformer-lens``). The model has random weights: it stands for any
`HookedTransformer`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

# This file is called like the package that it shows: its folder must not be searched first.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import fusae  # noqa: E402
from fusae.nn import SparseCoder, SparseCoderConfig  # noqa: E402


def tiny_model(seed: int = 0):
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=2, d_model=32, n_ctx=64, d_head=8, n_heads=4, d_vocab=100, act_fn="gelu", seed=seed, device="cpu"
    )
    return HookedTransformer(config).eval().requires_grad_(False)


def by_their_hooks(model, tokens: Tensor, coder: SparseCoder, point: str, latent: int, value: float) -> Tensor:
    """Logits with a latent set to `value` everywhere, the error kept, by ``model.run_with_hooks``."""

    def edit(x: Tensor, hook) -> Tensor:
        codes = coder.encode(x).to_ragged()
        of_latent = torch.zeros(len(codes), device=x.device, dtype=x.dtype)
        mine = codes.indices == latent
        of_latent[codes.row_ids()[mine]] = codes.values[mine]
        change = (value - of_latent)[:, None] * coder.W_dec[latent]
        return x + change.view_as(x)

    return model.run_with_hooks(tokens, fwd_hooks=[(point, edit)])


def by_fusae(model, tokens: Tensor, coder: SparseCoder, point: str, latent: int, value: float) -> Tensor:
    """The same with `fusae.hook`: a hook point is a module."""
    with fusae.hook(model, point, coder) as h:
        h.edit(latent, value=value)
        return model(tokens)


def main() -> None:
    torch.manual_seed(0)
    model, point = tiny_model(), "blocks.0.hook_resid_post"
    coder = SparseCoder(SparseCoderConfig(d=model.cfg.d_model, m=512, k=8)).requires_grad_(False)
    tokens = torch.randint(0, model.cfg.d_vocab, (2, 10))
    plain = model(tokens)
    theirs, ours = (run(model, tokens, coder, point, 3, 5.0) for run in (by_their_hooks, by_fusae))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    with fusae.hook(model, point, coder) as h:
        assert torch.equal(model(tokens), plain)
    print(f"changed logits by up to {float((ours - plain).abs().max()):.3g}; {h.codes}")


if __name__ == "__main__":
    main()
