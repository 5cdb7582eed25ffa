# SPDX-License-Identifier: Apache-2.0
"""Builds and installs fusae into the running Python with what is already there: no network, no other package touched.

    install_here.py [GOAL ...]        a goal of the Makefile, which decides what has to be there
"""

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

ALWAYS = {
    "torch": "2.11", "numpy": "1.26", "safetensors": "0.4", "rich": "13", "typer": "0.12", "pybind11": "2.13",
    "scikit-build-core": "0.11",
}  # fmt: skip
DEMO = {"transformers": "5", "tokenizers": "0.21", "gguf": "0.17", "jinja2": "3.1", "matplotlib": "3.8"}
TEST = {"pytest": "8", "pytest-benchmark": "4", "hypothesis": "6.100", "jinja2": "3.1", "matplotlib": "3.8"}


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in version.split("+")[0].split(".")[:3])


needed = {**ALWAYS, **(DEMO if "demo" in sys.argv[1:] else TEST)}
if sys.version_info < (3, 11):
    needed["tomli"] = "2"
lacking = []
for package, least in needed.items():
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        lacking.append(f"{package}>={least}")
    else:
        if numbers(found) < numbers(least):
            lacking.append(f"{package}>={least} (it has {found})")
if shutil.which("cmake") is None:
    lacking.append("cmake>=3.25")
if lacking:
    sys.exit(f"{sys.executable} lacks: {', '.join(lacking)}\nInstall that there, or run make without PYTHON=.")
root = Path(__file__).resolve().parent.parent
subprocess.run(
    [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index", "-e", str(root)],
    check=True,
)
