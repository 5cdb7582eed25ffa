# SPDX-License-Identifier: Apache-2.0
"""dictionary_learning beside itself with fusae under it: its trainers' `update`, its dictionaries' forward and encode.

The step is `update` of its own trainer, Adam and all. "dictionary": only the dictionary was accelerated
(``dict_class``); "trainer": `fusae.accelerate(trainer)`.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from dictionary_learning.dictionary import JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.top_k import TopKTrainer
from rivals_run import besides_gemm, main

import fusae
from fusae.testing.bench_inputs import over
from fusae.testing.workloads import Build, Call, Inputs, threshold_of

HOWS = {
    "dictionary_learning": "tool",
    "dictionary_learning + fusae (dictionary)": "dictionary",
    "dictionary_learning + fusae (trainer)": "trainer",
}


def _load(ae: torch.nn.Module, inputs: Inputs) -> None:
    with torch.no_grad():
        for name, p in ae.named_parameters():
            by_name = {"encoder.weight": inputs.W_enc, "decoder.weight": inputs.W_dec.T, "W_enc": inputs.W_enc.T,
                       "W_dec": inputs.W_dec, "b_dec": inputs.b_dec}  # fmt: skip
            p.copy_(by_name[name]) if name in by_name else p.zero_()


def _accelerated(how: str, trainer: Any) -> Any:
    if how == "dictionary":
        fusae.accelerate(trainer.ae)
    elif how == "trainer":
        fusae.accelerate(trainer)
    return trainer


def _step(how: str, cls: type, **options: Any) -> Build:
    def build(inputs: Inputs, k: int, backend: str) -> Call:
        m, d = inputs.W_enc.shape
        trainer = cls(
            steps=10**6, activation_dim=d, dict_size=m, k=k, layer=0, lm_name="none", device="cpu", seed=0, **options
        )
        _load(trainer.ae, inputs)
        _accelerated(how, trainer)
        steps = itertools.count(1)
        return over(inputs.xs, lambda x: trainer.update(next(steps), x))

    return build


def _inference(how: str, what: str, jumprelu: bool = False) -> Build:
    def build(inputs: Inputs, k: int, backend: str) -> Call:
        m, d = inputs.W_enc.shape
        if jumprelu:
            ae = JumpReluAutoEncoder(d, m)
            _load(ae, inputs)
            ae.b_enc.data.copy_(inputs.bias)
            ae.threshold.data.copy_(threshold_of(inputs, k))
        else:
            ae = TopKTrainer(steps=10**6, activation_dim=d, dict_size=m, k=k, layer=0, lm_name="none", device="cpu").ae
            _load(ae, inputs)
        ae.requires_grad_(False)
        if how != "tool":
            fusae.accelerate(ae)
        return over(inputs.xs, ae if what == "forward" else ae.encode)

    return build


def _beside(build: Any, *args: Any, trainer: bool = True, **options: Any) -> dict[str, Build]:
    return {name: build(how, *args, **options) for name, how in HOWS.items() if trainer or how != "trainer"}


GROUPS = {"group_fractions": [1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2]}
CONTENDERS = besides_gemm({
    "train_step": _beside(_step, TopKTrainer),
    "batch_topk_step": _beside(_step, BatchTopKTrainer),
    "matryoshka_step": _beside(_step, MatryoshkaBatchTopKTrainer, **GROUPS),
    "forward": _beside(_inference, "forward", trainer=False),
    "encode": _beside(_inference, "encode", trainer=False),
    "jumprelu_forward": _beside(_inference, "forward", trainer=False, jumprelu=True),
})  # fmt: skip

if __name__ == "__main__":
    main("rivals_dictionary_learning")
