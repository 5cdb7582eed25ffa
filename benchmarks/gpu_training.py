# SPDX-License-Identifier: Apache-2.0
"""One short training of the demo's dictionary on each of some devices: do they reach the same held-out FVU?

    python benchmarks/gpu_training.py [--data ROWS] [--devices cpu cuda] [--out FILE]

The data are rows of a file or folder of activations (`fusae.train.open_data` reads them), or 'planted' sparse ones of a
fixed seed. Weights, order of the rows and recipe are the same everywhere; sums are not in the same order, so single
latents go other ways and the FVU agrees to about a part in a hundred. Exit code 1 where it does not.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from fusae.pipeline.evaluate import measure_rows
from fusae.testing.bench_inputs import planted
from fusae.train import Rows, TrainConfig, Trainer, open_data

WIDTH = 576
"""Of planted rows, as the demo's."""


def rows_of(data: str, tokens: int, m: int, k: int) -> torch.Tensor:
    """``[tokens, d]`` float32."""
    if data == "planted":
        return planted(tokens, WIDTH, m, k, batches=1).xs[0]
    source = open_data(data)
    if source.shape[0] < tokens:
        raise ValueError(f"--tokens must be at most {source.shape[0]}, the rows of {data}, got {tokens}")
    found = []
    for batch in source.batches(min(4096, tokens), seed=0, epochs=1):
        found.append(torch.as_tensor(np.asarray(batch), dtype=torch.float32))
        if sum(map(len, found)) >= tokens:
            break
    return torch.cat(found)[:tokens]


def train(rows: torch.Tensor, held: torch.Tensor, device: str, arguments: argparse.Namespace) -> dict:
    """Train on one device; what was measured on the held-out rows."""
    config = TrainConfig(
        m=arguments.m, k=arguments.k, epochs=arguments.epochs, batch_size=arguments.batch, lr=arguments.lr,
        device=device, b_dec_init="mean",
    )  # fmt: skip
    began = time.perf_counter()
    coder = Trainer(config, rows, None, show=False).run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    coder = coder.to(device).eval()
    result, _ = measure_rows(coder, Rows(held), torch.device(device), False)
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
    return {"device": device, "name": name, "seconds": round(seconds, 2), "fvu": result["fvu"], "l0": result["l0"]}


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", default="planted", help="rows of activations, or 'planted'")
    parser.add_argument("--devices", nargs="+", default=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    for name, default in (("tokens", 40_000), ("m", 4096), ("k", 32), ("epochs", 2), ("batch", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--tolerance", type=float, default=0.01, help="by how much FVUs may differ, as a ratio")
    arguments = parser.parse_args(given)
    rows = rows_of(arguments.data, arguments.tokens, arguments.m, arguments.k)
    cut = len(rows) - max(1, len(rows) // 10)
    results = []
    for device in arguments.devices:
        results.append(train(rows[:cut], rows[cut:], device, arguments))
        print("{device} ({name}): FVU {fvu:.4f}, L0 {l0:.1f}, {seconds:.1f} s".format(**results[-1]), flush=True)
    values = [result["fvu"] for result in results]
    apart = max(values) / min(values) - 1 if all(0 < v < float("inf") for v in values) else float("inf")
    same = apart <= arguments.tolerance
    print(f"FVU apart by {apart:.2%}, {arguments.tolerance:.0%} allowed: {'agrees' if same else 'DOES NOT AGREE'}")
    if arguments.out is not None:
        about = {"data": arguments.data, "runs": results, "apart": apart, "tolerance": arguments.tolerance}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
