# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiled ahead of time for GPUs that need not be there: see `fusae.kernels.aot`."""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_compiles_and_fits(arch):
    """It compiles, its shared memory fits, hot kernels spill nothing, the sm_90 GEMM has wgmma. In a process of its
    own: here the kernels may be interpreted."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fusae.kernels.aot", "--arch", str(arch)]
    result = subprocess.run(command, capture_output=True, text=True, env={**env, "OMP_NUM_THREADS": "1"}, timeout=1500)
    print(result.stdout)
    bad = [line for line in result.stdout.splitlines() if line.startswith("FAIL")]
    assert result.returncode == 0 and not bad, "\n".join(bad) + result.stderr[-3000:]
    assert result.stdout.strip().endswith("0 failed")


def test_the_check_rejects_what_does_not_fit():
    """A GEMM with more stages than a block has shared memory for, and one without the instructions that are wanted."""
    code = (
        "import dataclasses\n"
        "from fusae.kernels import aot\n"
        "job = next(j for j in aot.jobs() if j.name == 'sample-bf16-sm90')\n"
        "print(aot.check(dataclasses.replace(job, stages=7), 90)[1])\n"
        "print(aot.check(dataclasses.replace(job, want={90: 'tcgen05'}), 90)[1])\n"
    )
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)
    assert "bytes of shared memory, 232448 fit" in result.stdout, result.stdout + result.stderr[-2000:]
    assert "no tcgen05 in its PTX" in result.stdout
