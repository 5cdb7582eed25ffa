# SPDX-License-Identifier: Apache-2.0
"""What ``run.py --preset`` runs: ops, shapes, contenders, and the bars that the project states."""

from __future__ import annotations

import dataclasses

from fusae.testing import workloads
from fusae.testing.bench import Measurement


@dataclasses.dataclass(frozen=True)
class Bar:
    """What a run must reach: ``own`` over ``other`` (or the other way round, for a speed-up) within the limit."""

    own: str
    other: str
    limit: float
    speedup: bool = False

    def verdict(self, measured: Measurement) -> str:
        value = measured.ratio(*(self.other, self.own) if self.speedup else (self.own, self.other))
        reached = value >= self.limit if self.speedup else value <= self.limit
        wanted = f"{'≥' if self.speedup else '≤'} {self.limit:g}"
        what = f"{self.own} vs {self.other}" + (" (times faster)" if self.speedup else "")
        mark = "[green]reached[/]" if reached else "[red]MISSED[/] "
        return f"{mark} {what}: {value:.2f}, bar {wanted}"


@dataclasses.dataclass(frozen=True)
class Item:
    """One op at one shape. `names`: these contenders beside fusae's and the baseline (None: as asked on the command
    line); `shares`: the parts of a step instead."""

    op: str
    shape: dict[str, int]
    bars: tuple[Bar, ...] = ()
    names: tuple[str, ...] | None = None
    shares: bool = False
    memory: bool = True


@dataclasses.dataclass(frozen=True)
class Preset:
    items: list[Item]
    rounds: int = 7
    budget: float | None = None  # seconds of rounds for each item
    within: float | None = None  # see `fusae.testing.bench.measure`


def _shape(n: int, d: int, m: int, k: int) -> dict[str, int]:
    return {"n": n, "d": d, "m": m, "k": k}


_GEMM = Bar("fusae", "gemm", 1.10)
_TINY = _shape(64, 32, 512, 8)
_BARS = [
    Item("encode_topk", _shape(2048, 576, 32768, 32), (_GEMM,)),
    Item("encode_topk", _shape(1024, 768, 131072, 64), (_GEMM,)),
    Item("encode_threshold", _shape(4096, 576, 32768, 64), (Bar("fusae", "gemm", 1.15),), memory=False),
    Item("encode_batch_topk", _shape(4096, 576, 32768, 64), (Bar("fusae", "gemm", 1.15),), memory=False),
    Item(
        "train_step", _shape(4096, 576, 32768, 32),
        (Bar("fusae", "gemm", 1.35), Bar("fusae", "plain torch", 4.5, speedup=True)),
    ),
    Item("matryoshka_step", _shape(4096, 576, 32768, 32), (Bar("fusae", "top-k step", 1.25),), memory=False),
    Item("jumprelu_step", _shape(4096, 576, 32768, 64), (Bar("fusae", "plain torch", 4, speedup=True),), memory=False),
]  # fmt: skip
_BESIDE_ENCODE, _BESIDE_TRAIN = ("torch mm + topk",), ("plain torch", "torch embedding_bag")


def _scaling(n: int, d: int, k: int, exponents: range) -> list[Item]:
    """Encoding and training against m, small dictionaries first, where fusae is slower."""
    # Memory, in a process for each contender, at every other m.
    encode = [Item("encode_topk", _shape(n, d, 2**e, k), names=_BESIDE_ENCODE, memory=e % 2 == 0) for e in exponents]
    # A plain step at the largest m would need more memory than small machines have.
    train = [
        Item("train_step", _shape(n, d, 2**e, k), names=_BESIDE_TRAIN, memory=e % 2 == 0) for e in exponents[:-1]
    ]
    return encode + train


PRESETS: dict[str, Preset] = {
    "bars": Preset(_BARS, budget=25),
    # Every op once at a middling shape: the page of all ops, the roofline.
    "ops": Preset(
        [Item(op, _shape(1024, 576, 16384, 32), memory=False) for op in workloads.CONTENDERS], budget=6,
    ),
    "scaling": Preset(_scaling(1024, 576, 32, range(10, 19)), budget=16),
    "shares": Preset([Item("train_step", _shape(1024, 576, 2**e, 32), shares=True) for e in (12, 14, 16)]),
    # Until ratios are known to 4 %: two runs agree within 10 %.
    "quick": Preset(
        [
            Item("encode_topk", _shape(1024, 576, 8192, 32), names=_BESIDE_ENCODE, memory=False),
            Item("decode", _shape(2048, 576, 8192, 32), names=(), memory=False),
            Item("adam_rows", _shape(1024, 576, 8192, 32), memory=False),
            Item("train_step", _shape(1024, 576, 8192, 32), names=("plain torch",), memory=False),
        ],
        rounds=60, budget=25, within=0.04,
    ),
    # The same in seconds, to see that everything runs. The numbers mean nothing.
    "tiny": Preset([Item(op, _TINY) for op in workloads.CONTENDERS]),
    "tiny-bars": Preset([Item(item.op, _TINY) for item in _BARS[2:]], rounds=2, budget=1),
    "tiny-ops": Preset([Item(op, _TINY) for op in workloads.CONTENDERS], rounds=2, budget=1),
    "tiny-scaling": Preset(_scaling(64, 32, 8, range(6, 10)), rounds=2, budget=1),
    "tiny-shares": Preset([Item("train_step", _TINY, shares=True)], rounds=2),
}  # fmt: skip
