#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes a virtual environment with fusae and what its tests and demo need: setup_env.sh VENV EXTRAS
# Without an NVIDIA GPU it takes a CPU build of torch: the default one brings gigabytes of CUDA libraries.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 extras=$2
torch_version=2.13.0

python=$(command -v python3 || true)
[ -n "$python" ] || { echo "fusae needs Python 3.10 or newer: no python3 on PATH" >&2; exit 1; }
"$python" - <<'PY'
import sys
if sys.version_info < (3, 10):
    sys.exit(f"fusae needs Python 3.10 or newer, python3 is {sys.version.split()[0]}")
PY
for tool in c++ g++ clang++; do compiler=$(command -v "$tool" || true); [ -z "$compiler" ] || break; done
[ -n "$compiler" ] || { echo "fusae needs a C++17 compiler (Debian/Ubuntu: apt install g++)" >&2; exit 1; }

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  "$python" -m venv --clear "$venv" ||
    { echo "fusae needs Python's venv module (Debian/Ubuntu: apt install python3-venv)" >&2; exit 1; }
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

if ! "$venv/bin/python" -c "import torch" 2>/dev/null; then
  if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    pip install "torch==$torch_version"
  elif [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ]; then
    # The local version "+cpu" cannot resolve to a CUDA build. PyTorch's own index has it where no mirror does.
    pip install "torch==$torch_version+cpu" ||
      pip install "torch==$torch_version+cpu" --index-url https://download.pytorch.org/whl/cpu
  else
    pip install "torch==$torch_version"
  fi
fi

# What is installed stays: the constraint keeps any dependency from replacing this torch with another build.
constraint=$(mktemp)
trap 'rm -f "$constraint"' EXIT
pip freeze --exclude-editable | grep -E '^torch==' >"$constraint"
pip install -c "$constraint" "scikit-build-core>=0.11" "pybind11>=2.13" ninja "cmake>=3.25"
pip install -c "$constraint" --no-build-isolation -e ".[$extras]"
