# SPDX-License-Identifier: Apache-2.0
"""sparsify beside itself with fusae under it: its training step with its own optimiser, forward, encode.

The step is that of its `Trainer`, SignSGD wrapped schedule-free: normalise the decoder rows, forward, backward, take
out the parallel part of the decoder's gradient, step. "coder": `fusae.accelerate(coder)`; "trainer": the trainer that
holds coder and optimiser.
"""

from __future__ import annotations

from typing import Any

import torch
from rivals_run import besides_gemm, main
from schedulefree import ScheduleFreeWrapper
from sparsify import SparseCoder, SparseCoderConfig
from sparsify.sign_sgd import SignSGD

import fusae
from fusae.testing.bench_inputs import over
from fusae.testing.workloads import Build, Call, Inputs


class Held:
    """What of sparsify's `Trainer` takes part in a step."""

    def __init__(self, inputs: Inputs, k: int, multi_topk: bool = False) -> None:
        m, d = inputs.W_enc.shape
        coder = SparseCoder(d, SparseCoderConfig(num_latents=m, k=k, multi_topk=multi_topk))
        with torch.no_grad():
            coder.encoder.weight.copy_(inputs.W_enc)
            coder.W_dec.copy_(inputs.W_dec)
            coder.b_dec.copy_(inputs.b_dec)
        optimizer = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=5e-3 / (m / 2**14) ** 0.5), momentum=0.95)
        optimizer.train()
        self.saes, self.optimizers = {"layer": coder}, [optimizer]
        self.fired = torch.zeros(m, dtype=torch.bool)
        self.dead_mask = None

    def step(self, x: torch.Tensor) -> float:
        coder, optimizer = self.saes["layer"], self.optimizers[0]
        coder.set_decoder_norm_to_unit_norm()
        variance = (x - x.mean(0)).pow(2).sum()
        out = coder(x=x, y=x, dead_mask=self.dead_mask, total_variance=variance)
        self.fired[out.latent_indices.flatten()] = True
        loss = out.fvu + out.auxk_loss / 32 + out.multi_topk_fvu / 8
        loss.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        return float(out.fvu.detach())


def _held(how: str, inputs: Inputs, k: int, **options: Any) -> Held:
    held = Held(inputs, k, **options)
    if how == "coder":
        fusae.accelerate(held.saes["layer"])
    elif how == "trainer":
        fusae.accelerate(held)
    return held


def _step(how: str, dead: float = 0.0, **options: Any) -> Build:
    def build(inputs: Inputs, k: int, backend: str) -> Call:
        held = _held(how, inputs, k, **options)
        if dead:
            g = torch.Generator().manual_seed(0)
            held.dead_mask = torch.rand(inputs.W_enc.shape[0], generator=g) < dead
        return over(inputs.xs, held.step)

    return build


def _inference(how: str, what: str) -> Build:
    def build(inputs: Inputs, k: int, backend: str) -> Call:
        coder = _held(how, inputs, k).saes["layer"].requires_grad_(False)
        call = coder if what == "forward" else lambda x: coder.encode(x).top_acts
        return over(inputs.xs, call)

    return build


def _beside(build: Any, *args: Any, trainer: bool = True, **options: Any) -> dict[str, Build]:
    hows = {"sparsify": "tool", "sparsify + fusae (coder)": "coder", "sparsify + fusae (trainer)": "trainer"}
    return {name: build(how, *args, **options) for name, how in hows.items() if trainer or how != "trainer"}


CONTENDERS = besides_gemm({
    "train_step": _beside(_step),
    "auxk_step": _beside(_step, dead=0.1, multi_topk=True),
    "forward": _beside(_inference, "forward", trainer=False),
    "encode": _beside(_inference, "encode", trainer=False),
})  # fmt: skip

if __name__ == "__main__":
    main("rivals_sparsify")
