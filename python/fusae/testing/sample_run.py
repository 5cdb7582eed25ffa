# SPDX-License-Identifier: Apache-2.0
"""A made-up run directory with everything that a report shows, hostile tokens included."""

from __future__ import annotations

import json
from pathlib import Path

M, K, D = 64, 4, 16
# Data reads better as tables:
# fmt: off
HOSTILE = ['<script>document.title="owned"</script>', '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}", "</style>",
           "&lt;", "\x00\x1b", "\ud83d", "\u202e", "' onmouseover='x"]


def contents() -> dict:
    """A complete run directory: file name → what it holds."""
    metrics = [
        {"step": 10 * i, "tokens": 40960 * i, "seconds": 2.5 * i, "loss": 0.3 + 1 / i, "fvu": 0.25 + 1 / i, "l0": 3.9,
         "dead": max(0, 20 - i), "aux_loss": None if i < 5 else 0.02, "lr": 1e-3, "tokens_per_s": 16000.0 + i,
         "k": K, "grad_norm": None, "wait": 0.01, "dropped": 0}
        for i in range(1, 41)
    ]
    passages = [
        {"tokens": ["The", " river", " rose", ".\n\n", "def", "\t", "f", "    ", "x"],
         "values": [0, 7.25, 3.5, 0, 0, 0, 0, 1.0, 0], "peak": 1},
        {"tokens": ["No", " lamp", " burned"], "values": [0.0, 0.5, 0.0], "peak": 1},
    ]
    features = [
        {"latent": 3, "density": 0.012, "max_value": 7.25, "promoted": [" water", "bank"], "suppressed": [" the"],
         "promoted_values": [4.5, 3.25], "suppressed_values": [-2.0],
         "nearest": [{"latent": 41, "cosine": 0.512}, {"latent": 9, "cosine": 0.25}],
         "histogram": {"width": 0.125, "counts": [0] * 20 + [9, 4, 1]}, "passages": passages},
        {"latent": 41, "density": 0.0004, "max_value": 2.0, "passages": [
            {"tokens": [*HOSTILE, " owl"], "values": [0.0] * len(HOSTILE) + [2.0], "peak": len(HOSTILE)}]},
    ]
    step = {"op": "train_step", "shape": {"n": 4096, "d": D, "m": M, "k": K}, "dtype": "float32"}
    return {
        "config.json": {"model": "tiny-lm", "module": "model.layers.1", "text": "a book",
                        "coder": {"d": D, "m": M, "k": K}, "lr": 1e-3,
                        "versions": {"fusae": "0.0.test", "torch": "2.13.0"}},
        "metrics.jsonl": metrics,
        "eval.json": {
            "tokens": 20000, "fvu": 0.2468, "explained_variance": 0.7532, "l0": 3.97, "dead_latents": 2, "latents": M,
            "cosine": 0.9, "density": [0.0, 0.0] + [10 ** (-1 - i / 30) for i in range(M - 2)],
            "loss": {"original": 3.0, "patched": 3.3, "mean_ablated": 8.0, "loss_recovered": 0.94, "tokens": 9000},
            "kl": {"patched": 0.31, "mean_ablated": 4.9, "kl_recovered": 0.9367}, "l2_ratio": 0.951,
            "relative_bias": 0.987, "dropped": {"first_positions": 10, "norm_outliers": 3, "special": 0},
            "source": {"model": "tiny-lm", "module": "model.layers.1", "text": "a book"},
        },
        "features.json": features,
        "bench.json": {"rows": [
            {**step, "name": "fusae", "p20_ms": 9.5, "p50_ms": 10.0, "p80_ms": 11.0, "peak_bytes": 3 * 2**20},
            {**step, "name": "plain torch", "p20_ms": 51.0, "p50_ms": 52.5, "p80_ms": 55.0, "peak_bytes": None},
            {**step, "op": "encode_topk", "name": "torch.mm", "p20_ms": 4.0, "p50_ms": 4.1, "p80_ms": 4.3},
        ]},
    }
# fmt: on


def write_run(path: Path, files: dict) -> Path:
    path.mkdir(exist_ok=True)
    for name, value in files.items():
        text = "\n".join(map(json.dumps, value)) if name.endswith(".jsonl") else json.dumps(value)
        (path / name).write_text(text, encoding="utf-8")
    return path
