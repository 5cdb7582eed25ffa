#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the CPU kernels with AddressSanitizer and UBSan and runs the tests that reach them: sanitize.sh PYTHON [FILTER]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 filter=${2:-"cpu and not compile"}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"$python" -m pip install -q --no-build-isolation --no-deps --no-index --target "$site" . \
  -C build-dir=build/sanitize -C cmake.define.FUSAE_SANITIZE=ON -C install.strip=false
libraries=$(for l in libasan.so libubsan.so libstdc++.so.6; do g++ -print-file-name=$l; done | tr '\n' ' ')
ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 LD_PRELOAD="$libraries" \
  PYTHONPATH="$site" "$python" -m pytest -q tests/test_conformance.py -k "$filter"
