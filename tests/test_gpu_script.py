# SPDX-License-Identifier: Apache-2.0
"""The parts of benchmarks/gpu.sh that run without a GPU: what it would do, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def run(*arguments, **environment):
    env = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True, env=env, timeout=240)


@pytest.mark.parametrize("part", ["build", "conform", "sanitize", "bench", "train"])
def test_a_dry_run_names_commands_whose_files_exist(part, tmp_path):
    result = run(part, str(tmp_path / "out"), DRY="1")
    assert result.returncode == 0, result.stderr
    commands = [line[2:] for line in result.stdout.splitlines() if line.startswith("+ ")]
    assert commands and not (tmp_path / "out").exists()
    files = [w for c in commands for w in c.split() if w.startswith(("tests/", "benchmarks/")) and w.endswith(".py")]
    assert all((ROOT / file).is_file() for file in files), files


def test_bench_takes_every_shape_or_those_asked_for(tmp_path):
    assert run("bench", str(tmp_path), DRY="1").stdout.count(" encode_topk ") == 4
    some = run("bench", str(tmp_path), DRY="1", SHAPES="64 32 512 4").stdout
    assert some.count(" encode_topk ") == 1 and "--n 64 --d 32 --m 512 --k 4" in some


def test_an_unknown_part_is_a_usage_error():
    result = run("everything")
    assert result.returncode == 2 and "gpu.sh {build|conform|sanitize|bench|train}" in result.stderr


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU")
def test_without_a_gpu_nothing_runs(tmp_path):
    result = run("conform", str(tmp_path / "out"))
    assert result.returncode == 3 and "no NVIDIA GPU" in result.stderr and not (tmp_path / "out").exists()


def test_a_rehearsal_runs_the_commands_themselves(tmp_path):
    """Tiny, on the CPU: that options are known, files are written where they belong, exit codes are right."""
    out = tmp_path / "out"
    result = run("train", str(out), REHEARSE="1", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stdout + result.stderr + (out / "train.txt").read_text()
    runs = json.loads((out / "training.json").read_text())["runs"]
    assert [r["device"] for r in runs] == ["cpu", "cpu"] and runs[0]["fvu"] == runs[1]["fvu"]
    assert "agrees" in (out / "train.txt").read_text()


def test_a_part_without_time_says_so(tmp_path):
    result = run("train", str(tmp_path), REHEARSE="1", LIMIT="3")
    assert result.returncode == 124 and "3 seconds are over" in (tmp_path / "train.txt").read_text()
