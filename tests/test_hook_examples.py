# SPDX-License-Identifier: Apache-2.0
"""examples/transformer_lens.py and examples/nnsight.py, from beginning to end, where their packages are."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.mark.parametrize("name", ("transformer_lens", "nnsight"))
def test_example(name):
    """In a process of its own, as it would be run."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")], capture_output=True, text=True, timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "changed logits by up to" in done.stdout
