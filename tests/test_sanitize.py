# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.kernels
@pytest.mark.skipif(shutil.which("g++") is None, reason="the sanitizer build needs g++ and its runtime libraries")
def test_conformance_under_sanitizers():
    """Every case of the CPU backend in float32 and bfloat16, with out-of-bounds and undefined behaviour trapped."""
    run = subprocess.run(
        ["bash", "tools/sanitize.sh", sys.executable, "cpu and not compile and not fp16"],
        cwd=ROOT, capture_output=True, text=True, timeout=2400,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) > 50, f"hardly any test reached the kernels: {run.stdout[-500:]}"
