# SPDX-License-Identifier: Apache-2.0
"""Builds and installs fusae into the running Python, with what is already there: no network, no other package touched."""

import importlib.util
import subprocess
import sys
from pathlib import Path

NEEDED = {
    "torch": "torch>=2.11", "numpy": "numpy", "safetensors": "safetensors", "rich": "rich", "typer": "typer",
    "pybind11": "pybind11>=2.13", "scikit_build_core": "scikit-build-core>=0.11", "pytest": "pytest>=8",
    "hypothesis": "hypothesis", "pytest_benchmark": "pytest-benchmark",
}  # fmt: skip

missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
if missing:
    sys.exit(f"{sys.executable} lacks: {' '.join(missing)}\nInstall them there, or run make without PYTHON=.")
root = Path(__file__).resolve().parent.parent
subprocess.run(
    [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index", "-e", str(root)],
    check=True,
)
