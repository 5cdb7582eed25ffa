# SPDX-License-Identifier: Apache-2.0
"""A dictionary in nnsight, inside its own trace: codes read, edited and decoded where the model runs.

    python examples/nnsight.py

needs nnsight (``pip install nnsight``). The model has random weights: it stands for any model nnsight wraps.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

# This file is called like the package that it shows: its folder must not be searched first.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import fusae  # noqa: E402
from fusae.nn import SparseCoder, SparseCoderConfig  # noqa: E402


class Tiny(nn.Module):
    def __init__(self, width: int = 32, vocabulary: int = 100) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(2))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def edited(x: Tensor, coder: SparseCoder, latent: int, add: float) -> Tensor:
    """Hidden states ``[..., d]`` with `add` on a latent everywhere, the error kept."""
    codes = coder.encode(x)
    error = x - coder.decode(codes)
    return coder.decode(codes) + add * coder.W_dec[latent] + error


def by_nnsight(model: nn.Module, tokens: Tensor, coder: SparseCoder, latent: int, add: float) -> tuple[Tensor, Tensor]:
    """(logits, values of the codes) from a trace of nnsight, with the edit made inside."""
    from nnsight import NNsight

    traced = NNsight(model)
    with traced.trace(tokens):
        hidden = traced.blocks[0].output
        values = coder.encode(hidden).values.save()
        traced.blocks[0].output = edited(hidden, coder, latent, add)
        logits = traced.output.save()
    return logits, values


def by_fusae(model: nn.Module, tokens: Tensor, coder: SparseCoder, latent: int, add: float) -> tuple[Tensor, Tensor]:
    """The same with `fusae.hook`."""
    with fusae.hook(model, "blocks.0", coder) as h:
        h.edit(latent, add=add)
        return model(tokens), h.codes.values


def main() -> None:
    torch.manual_seed(0)
    model = Tiny().requires_grad_(False)
    coder = SparseCoder(SparseCoderConfig(d=32, m=512, k=8)).requires_grad_(False)
    tokens = torch.randint(0, 100, (2, 10))
    (theirs, their_values), (ours, values) = (run(model, tokens, coder, 3, 5.0) for run in (by_nnsight, by_fusae))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert torch.equal(values, their_values)
    print(f"changed logits by up to {float((ours - model(tokens)).abs().max()):.3g}; codes {list(values.shape)}")


if __name__ == "__main__":
    main()
