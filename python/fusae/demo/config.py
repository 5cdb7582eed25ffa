# SPDX-License-Identifier: Apache-2.0
"""The choices of a demo run.

The default recipe was chosen by held-out FVU (SmolLM2, k 32): 150,000 tokens x 3 epochs at lr 5e-4, 1e-3, 2e-3 gave
0.239, 0.201, 0.179 with 2, 7, 122 of 8,192 latents dead; 120,000 x 4 at 1.2e-3 gave 0.193 with 16 dead. A token costs
the language model some eight times what it costs the training in an epoch, so a few epochs are cheap.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from .. import _fields
from ..pipeline import DataConfig
from ..train import TrainConfig

#: What the demo's dictionary should reach on held-out text, at its default settings.
BARS = {"fvu": 0.30, "loss_recovered": 0.90}


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """Sizes and recipe. Runs of equal settings (and inputs) are the same run; one goes on with the other's work.

    Attributes:
        tokens: activations to train on.
        held_out: activations of other articles to measure on.
        loss_tokens: of those, how many to run the language model on for the loss (three passes, the costly part).
        m, k: latents, and how many are active per token.
        epochs, batch_size, lr: of the training.
        ctx: tokens of a chunk of text; skip_positions: of these, how many at its start are left out.
        latents, passages: how many latents to show, and how many passages for each.
        bench_rows, bench_rounds: rows of the measured training step, how often it is timed, and bench_memory:
            whether its peak memory is measured too, in processes of their own.
        seed: of weights and data order.
    """

    tokens: int = 120_000
    held_out: int = 12_000
    loss_tokens: int = 6_000
    m: int = 8192
    k: int = 32
    epochs: int = 4
    batch_size: int = 1024
    lr: float = 1.2e-3
    ctx: int = 128
    skip_positions: int = 2
    latents: int = 200
    passages: int = 6
    bench_rows: int = 2048
    bench_rounds: int = 5
    bench_memory: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type == "int":
                least = 0 if field.name in ("seed", "skip_positions") else 1
                _fields.whole(field.name, getattr(self, field.name), least)
        _fields.flag("bench_memory", self.bench_memory)
        _fields.number("lr", self.lr, above=True)
        _fields.whole("k", self.k, 1, self.m, "m")
        _fields.whole("loss_tokens", self.loss_tokens, 1, self.held_out, "held_out")
        _fields.whole("batch_size", self.batch_size, 1, self.tokens, "tokens")
        _fields.whole("skip_positions", self.skip_positions, 0, self.ctx - 2, "ctx - 2")

    @classmethod
    def quick(cls, **given: Any) -> DemoConfig:
        """Everything small: to see that it runs, not to learn anything."""
        small = {
            "tokens": 4_000, "held_out": 1_000, "loss_tokens": 500, "m": 512, "k": 16, "epochs": 2, "batch_size": 256,
            "latents": 4, "passages": 3, "bench_rows": 256, "bench_rounds": 3,
            "bench_memory": False,
        }  # fmt: skip
        return cls(**{**small, **given})

    def training(self) -> TrainConfig:
        """The recipe as the trainer takes it."""
        return TrainConfig(
            m=self.m, k=self.k, epochs=self.epochs, batch_size=self.batch_size, lr=self.lr, seed=self.seed,
            device="cpu", checkpoint_every=100,
        )  # fmt: skip

    def data(self, cache: Path) -> DataConfig:
        """Model, text and rows as the pipeline takes them; files and rows lie in `cache`."""
        return DataConfig(
            model=str(cache / "SmolLM2-135M-Instruct.Q4_1.gguf"), module="model.layers.11",
            text=str(cache / "NewsArticles.zip"), ctx=self.ctx, tails=False, skip_positions=self.skip_positions,
            train_tokens=self.tokens, held_out_tokens=self.held_out, loss_tokens=self.loss_tokens, chunk_batch=32,
            cache=str(cache / "activations"), features=self.latents, passages=self.passages,
        )  # fmt: skip
