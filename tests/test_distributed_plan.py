# SPDX-License-Identifier: Apache-2.0
"""`fusae plan` with latents shared among devices, and the benchmark that measures it."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fusae.plan import needs, plan
from fusae.plan.memory import bytes_by_degree
from fusae.train import TrainConfig

ROOT = Path(__file__).parent.parent


def config(**fields):
    given = {"m": 4096, "k": 8, "batch_size": 64, "tokens": 64 * 4, "device": "cpu", **fields}
    return TrainConfig(**given).resolve(48, None)


@pytest.mark.parametrize("ranks", [2, 8])
def test_each_device_holds_its_share(ranks):
    whole, part = needs(config()), needs(config(shard_latents=ranks))
    vector = 4 * 48  # b_dec, on every device
    assert part.parts["weights"] - vector == (whole.parts["weights"] - vector) / ranks
    assert part.parts["moments"] - 2 * vector == (whole.parts["moments"] - 2 * vector) / ranks
    assert part.parts["counters"] == whole.parts["counters"] / ranks
    assert "exchange" in part.parts and "exchange" not in whole.parts
    assert part.touched == -(-whole.touched // ranks)


def test_degrees_are_listed_as_far_as_they_go_and_advised():
    listed = bytes_by_degree(config())
    assert list(listed) == [1, 2, 4, 8, 16, 32, 64]
    assert listed[1] == needs(config()).total and listed[2] == needs(config(shard_latents=2)).total
    assert listed[1] > listed[2] > listed[4]
    assert list(bytes_by_degree(config(m=4100))) == [1, 2, 4]
    assert list(bytes_by_degree(config(form="gated"))) == [1]
    tight = plan(config(), room=plan(config(), room=10**12, measured=False).overhead + listed[2], measured=False)
    assert any(line.startswith("shard_latents = 2: ") for line in tight.advice)
    assert tight.to_dict()["total_bytes_by_shard_latents"] == listed
    with pytest.raises(ValueError, match="m must be a multiple of shard_latents = 3, got 4096"):
        needs(dataclasses.replace(config(), shard_latents=3))


def test_the_benchmark_measures_a_small_run_and_writes_a_page(tmp_path):
    script, out, page = str(ROOT / "benchmarks" / "sharded.py"), tmp_path / "out.json", tmp_path / "page.md"
    sizes = ["--m", "256", "--d", "16", "--k", "4", "--n", "32", "--steps", "3", "--grids", "1x1,1x2"]
    subprocess.run([sys.executable, script, "measure", *sizes, "--out", str(out)], check=True)
    one, two = json.loads(out.read_text())["runs"]
    assert len(one["ranks"]) == 1 and len(two["ranks"]) == 2 and two["loss_off"] < 1e-4
    assert two["ranks"][0]["weight_bytes"] - 64 == (one["ranks"][0]["weight_bytes"] - 64) / 2
    page.write_text("# Title\n<!-- results:start -->\nold\n<!-- results:end -->\nrest\n")
    subprocess.run([sys.executable, script, "page", str(out), "--page", str(page)], check=True)
    assert "| 1 x 2 |" in page.read_text() and "old" not in page.read_text() and "rest" in page.read_text()
